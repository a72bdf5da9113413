"""The page of a report: one file with style, scripts, figures and data inside.

Its content security policy forbids the browser to fetch anything and to run scripts other than
those of the page, which the policy names by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.files import json_text
from hijacklens.report.tables import links, pack, table_part
from hijacklens.results.exhibits import Drawing, Exhibit, Facts, Table, Views
from hijacklens.results.glance import singular
from hijacklens.results.result import Result
from hijacklens.views.page import bundle, fragment, templates, visible

FOLDER = Path(__file__).parent
SCRIPTS = ("data.js", "tables.js", "facts.js", "start.js")
PIXELS = 76
"""Pixels per figure inch, so that figure text matches page text."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A result in a report, and where it was found."""

    result: Result
    folder: str = ""
    """The folder as the user named it; empty for a result that was never saved."""


def page(entries: Sequence[Entry], *, title: str) -> str:
    """Return the HTML of a report."""
    keys, results = (f"part{i}" for i in count()), []
    for entry in entries:
        result, provenance = entry.result, entry.result.provenance
        with warnings.catch_warnings():
            # The reader's browser draws letters that matplotlib's font lacks.
            warnings.simplefilter("ignore", plots.FigureWarning)
            parts = [_part(exhibit, next(keys)) for exhibit in result.exhibits()]
        # A JSON text inside JSON, in ASCII and without a tag that could end the script element.
        record = json_text({**result.configuration(), "provenance": asdict(provenance)})
        glance = result.glance()
        results.append(
            {
                "heading": _heading(entry),
                "glance": glance,
                "lines": [singular(line) for line in (glance.what, *glance.notes)],
                "made": day(provenance.created),
                "folder": entry.folder,
                "parts": parts,
                "provenance": provenance,
                "configuration": json.loads(json_text(result.configuration())),
                "record": Markup(json.dumps(record).replace("<", "\\u003c")),
            }
        )
    calls = [part["script"] for result in results for part in result["parts"] if part["script"]]
    # The bundle is 1.3 MB, and only some results have views.
    scripts = [*([bundle()] if calls else []), *calls, _files(*SCRIPTS)]
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        templates(FOLDER)
        .get_template("page.html")
        .render(
            title=title,
            style=_files("report.css"),
            results=results,
            scripts=scripts,
            hashes=Markup(hashes),
        )
    )


def _part(exhibit: Exhibit, key: str) -> dict[str, Any]:
    """Return what the templates show of an exhibit."""
    part = {
        "kind": type(exhibit).__name__.lower(),
        "key": key,
        "exhibit": exhibit,
        "folded": isinstance(exhibit, (Drawing, Table)) and exhibit.folded,
        "script": "",
    }
    match exhibit:
        case Drawing():
            part |= _image(exhibit.figure) | {"alt": exhibit.alt or description(exhibit.figure)}
        case Table():
            part |= table_part(exhibit)
        case Facts(items=items, prompts=prompts):
            packs = {"items": items, "prompts": prompts, "links": links(items, prompts)}
            part["packs"] = {name: pack(table) for name, table in packs.items()}
        case Views():
            # The bundle reads ids as selectors, so they hold only our own letters.
            views = fragment(exhibit.views, prefix=f"{key}view", level=4)
            part |= {"body": views.body, "script": views.script}
    return part


def _image(figure: Figure) -> dict[str, Any]:
    """Return a figure as an image, in which nothing can run and whose style stays inside."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    # XML must not hold control characters; a token may.
    svg = visible(buffer.getvalue().decode(), keep="\n\r\t")
    # Margins are cut, so the drawing is not as wide as the figure.
    points = float(svg.split(' width="', 1)[1].split("pt", 1)[0])
    image = base64.b64encode(svg.encode()).decode()
    return {"image": image, "width": round(points / 72 * PIXELS)}


def description(figure: Figure) -> str:
    """Describe a figure in words: titles and axes of its panels, and its legend."""
    panels = []
    for ax in figure.axes:
        axes = [ax.get_ylabel(), ax.get_xlabel()]
        words = [ax.get_title(), " against ".join(axis for axis in axes if axis)]
        panels.append(": ".join(word.replace("\n", " ") for word in words if word))
    panels += [", ".join(t.get_text() for t in legend.get_texts()) for legend in figure.legends]
    # As a reader sees it, without the escape of `plots.escape`.
    return "Figure. " + "; ".join(panel for panel in panels if panel).replace(r"\$", "$")


def day(created: str) -> str:
    """Write a time as readers do.

    >>> day("2026-11-21T09:58:03+00:00")
    '21 November 2026, 09:58 UTC'
    """
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{when.day} {when:%B %Y, %H:%M}{when.strftime(' %Z')}"


def _heading(entry: Entry) -> str:
    """Return the type of a result in words, with the name of its folder."""
    words = " ".join(re.findall("[A-Z][a-z]*", type(entry.result).__name__)).capitalize()
    name = Path(entry.folder).resolve().name if entry.folder else ""
    return f"{words}: {name}" if name else words


@cache
def _files(*names: str) -> Markup:
    return Markup("\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names))
