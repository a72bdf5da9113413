"""The page of a report: what it is made of, and what its browser is told to refuse.

One file: style, script, figures and data stand inside. Its policy lets the browser fetch nothing
and run nothing but the scripts of the page, which are named by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import count
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.report.facts import facts_html
from hijacklens.report.markup import attributes, paragraphs, shown, written_out
from hijacklens.report.records import day, record_html
from hijacklens.report.tables import table_html
from hijacklens.results.exhibits import Drawing, Exhibit, Facts, Table, Text, Views
from hijacklens.results.result import Result
from hijacklens.views.page import bundle, fragment

SCRIPTS = ("data.js", "tables.js", "facts.js", "start.js")
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
PIXELS = 76
"""Of an inch of a figure: its text is then as large as that of the page."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A result in a report, and where it was found."""

    result: Result
    source: str = ""
    """The folder, as it was named; empty for a result that was never saved."""


def page(entries: Sequence[Entry], *, title: str) -> str:
    """The HTML of a report."""
    keys, calls = count(), []
    sections, contents = [], []
    for i, entry in enumerate(entries, start=1):
        body, links = [], []
        for exhibit in entry.result.exhibits():
            key = f"part{next(keys)}"
            html, call = _exhibit(exhibit, key)
            calls.extend(call)
            body.append(f'<section aria-labelledby="{key}-title">{html}</section>')
            links.append(f'<li><a href="#{key}-title">{shown(exhibit.heading)}</a></li>')
        heading, lead = _heading(entry), _lead(entry)
        end = f"record{i}"
        links.append(f'<li><a href="#{end}-title">Record</a></li>')
        body.append(
            f'<section aria-labelledby="{end}-title"><h3 id="{end}-title">Record</h3>'
            f"{record_html(entry.result, key=end)}</section>"
        )
        sections.append(
            f'<section class=result aria-labelledby="result{i}"><h2 id="result{i}" tabindex="-1">'
            f"{heading}</h2>{lead}{''.join(body)}</section>"
        )
        contents.append(f'<li><a href="#result{i}">{heading}</a><ul>{"".join(links)}</ul></li>')
    # The bundle is 1.3 MB, and only some results have views.
    scripts = [bundle(), *calls] if calls else []
    scripts.append(_script())
    return _document(title, contents, sections, scripts)


def _document(
    title: str, contents: Sequence[str], sections: Sequence[str], scripts: Sequence[str]
) -> str:
    policy = POLICY.format(scripts=" ".join(f"'{_hash(script)}'" for script in scripts))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<link rel="icon" href="data:,">',
            f"<title>{shown(title)}</title><style>{_file('report.css')}</style></head><body>",
            '<a class="skip" href="#main">Skip to the results</a>',
            f"<header><h1>{shown(title)}</h1></header>",
            f'<nav aria-label="Contents"><ol>{"".join(contents)}</ol></nav>',
            '<main id="main" tabindex="-1">',
            *sections,
            "</main>",
            "<footer><p>Made by hijacklens. This file needs no network and asks for none; the data "
            "behind every table is in it.</p></footer>",
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _exhibit(exhibit: Exhibit, key: str) -> tuple[str, list[str]]:
    """The HTML of an exhibit, its heading included, and what the page's script calls for it."""
    heading = f'<h3 id="{key}-title">{shown(exhibit.heading)}</h3>'
    match exhibit:
        case Text():
            body, calls = _text(exhibit), []
        case Drawing():
            body, calls = _drawing(exhibit), []
        case Table():
            body, calls = table_html(exhibit, key=key), []
        case Facts():
            body, calls = facts_html(exhibit, key=key), []
        case Views():
            # The bundle's script reads ids, which therefore hold nothing but our own letters.
            parts = fragment(exhibit.views, prefix=f"{key}view", level=4)
            body = f"{paragraphs(exhibit.note)}<div class=card>{parts.body}</div>"
            calls = [parts.script]
    if isinstance(exhibit, (Drawing, Table)) and exhibit.folded:
        return f"<details><summary>{heading}</summary>{body}</details>", calls
    return heading + body, calls


def _text(text: Text) -> str:
    points = "".join(f"<li>{shown(point)}</li>" for point in text.points)
    terms = "".join(
        f"<dt>{shown(term)}</dt><dd>{shown(meaning)}</dd>" for term, meaning in text.terms.items()
    )
    return (
        paragraphs(text.paragraphs)
        + (f"<ul>{points}</ul>" if points else "")
        + (f"<dl>{terms}</dl>" if terms else "")
    )


def _drawing(drawing: Drawing) -> str:
    """The figure as an image: nothing in it can run, and its style stays inside it."""
    buffer = BytesIO()
    with matplotlib.rc_context(plots.STYLE), warnings.catch_warnings():
        # Letters that matplotlib's font lacks are drawn by the reader's browser.
        warnings.filterwarnings("ignore", message="Glyph")
        drawing.figure.savefig(buffer, format="svg", metadata={"Date": None})
    # No XML may hold control characters; a token may.
    svg = written_out(buffer.getvalue().decode())
    image = base64.b64encode(svg.encode()).decode()
    # Margins are cut, so that the figure's own width is not that of the drawing.
    width = round(float(svg.split(' width="', 1)[1].split("pt", 1)[0]) / 72 * PIXELS)
    alt = drawing.alt or description(drawing.figure)
    return (
        f"<figure class=card><img{attributes(alt=alt, width=width)} "
        f'src="data:image/svg+xml;base64,{image}"></figure>{paragraphs(drawing.note)}'
    )


def description(figure: Figure) -> str:
    """What a figure shows, in words: titles, axes and lines of its panels."""
    panels = []
    for ax in figure.axes:
        legend = ax.get_legend()
        lines = [text.get_text() for text in legend.get_texts()] if legend else []
        axes = [ax.get_ylabel(), ax.get_xlabel()]
        words = [ax.get_title(), " against ".join(axis for axis in axes if axis), ", ".join(lines)]
        panels.append(": ".join(word.replace("\n", " ") for word in words if word))
    return "Figure. " + "; ".join(panel for panel in panels if panel)


def _heading(entry: Entry) -> str:
    """The type of a result, in words, and the name of its folder."""
    words = " ".join(re.findall("[A-Z][a-z]*", type(entry.result).__name__)).capitalize()
    name = Path(entry.source).resolve().name if entry.source else ""
    return shown(f"{words}: {name}" if name else words)


def _lead(entry: Entry) -> str:
    """What a result is of, its main numbers, when it was made, and where it was found."""
    glance = entry.result.glance()
    made = f"Made {day(entry.result.provenance.created)}"
    source = f"{made}; read from {entry.source}." if entry.source else f"{made}."
    lead = f"<p class=what>{shown(glance.what)}</p><p class=source>{shown(source)}</p>"
    if not glance.rows:
        return lead
    head = "".join(f'<th scope="col">{shown(cell)}</th>' for cell in glance.header)
    rows = "".join(
        f'<tr><th scope="row"><bdi>{shown(first)}</bdi></th>'
        + "".join(f"<td>{shown(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in glance.rows
    )
    return (
        f'{lead}<div class="scroll glance" role="region" aria-label="Main numbers" tabindex="0">'
        f"<table><caption>Main numbers</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@cache
def _script() -> str:
    return "\n".join(_file(name) for name in SCRIPTS)


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
