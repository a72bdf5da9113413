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

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError, utf8
from hijacklens.files import RECORD, check_folder, json_text, named_path, write_text
from hijacklens.report.tables import links, pack, table_part
from hijacklens.results.exhibits import Drawing, Exhibit, Facts, Table, Views
from hijacklens.results.result import Result, load_result
from hijacklens.views.page import bundle, fragment, templates, visible

FOLDER = Path(__file__).parent
SCRIPTS = ("data.js", "tables.js", "facts.js", "start.js")
TITLE = "Context hijacking: a report"
PIXELS = 76
"""Pixels per figure inch, so that figure text matches page text."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A result in a report, and where it was found."""

    result: Result
    folder: str = ""
    """The folder as the user named it; empty for a result that was never saved."""


def write_report(
    results: Result | str | Path | Sequence[Result | str | Path],
    *,
    out: str | Path,
    title: str = TITLE,
    overwrite: bool = False,
) -> Path:
    """Write saved results as one HTML file that opens with no network.

    Args:
        results: One or several: folders that a run wrote, or results themselves. A folder of
            such folders, as `hijacklens reproduce` writes, means all of them.
        out: The HTML file.
        title: Title of the page.
        overwrite: Replace the file if it exists.

    Returns:
        The path of the file.

    Raises:
        InputError: There is no result, a folder holds none, the file exists already, or its
            folder does not exist or is not writable.
        OSError: There is no room for the file.

    Note:
        The file holds all rows of all tables, compressed: about 45 bytes for an item of a hijack
        run, and 1.3 MB of script if there are views.
    """
    utf8("the title", title, "'My runs'")
    sources = [results] if isinstance(results, (Result, str, Path)) else list(results)
    if not sources:
        raise InputError("a report needs at least one result; name the folders that runs wrote.")
    path = named_path(out, "file")
    if path.is_dir():
        raise InputError(f"{str(out)!r} is a folder; name a file for the report, such as r.html.")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {str(out)!r}: there is no folder {str(path.parent)!r}.")
    if path.exists() and not overwrite:
        raise InputError(
            f"{str(out)!r} already exists. Choose another name, or pass overwrite=True "
            "(--overwrite on the command line) to replace it."
        )
    check_folder(path.parent, overwrite=True)
    entries = [
        Entry(one) if isinstance(one, Result) else Entry(load_result(one), str(one))
        for source in sources
        for one in _results_in(source)
    ]
    write_text(path, page(entries, title=title))
    return path


def _results_in(source: Result | str | Path) -> Sequence[Result | str | Path]:
    """Return the results inside a folder that is not one itself; otherwise the source alone."""
    if isinstance(source, Result):
        return [source]
    folder = named_path(source, "folder")
    records = [] if (folder / RECORD).exists() else sorted(folder.glob(f"[!.]*/{RECORD}"))
    return [path.parent for path in records] or [source]


def page(entries: Sequence[Entry], *, title: str) -> str:
    """Return the HTML of a report."""
    keys, results = (f"part{i}" for i in count()), []
    for entry in entries:
        result, provenance = entry.result, entry.result.provenance
        parts = [_part(exhibit, next(keys)) for exhibit in result.exhibits()]
        # A JSON text inside JSON, in ASCII and without a tag that could end the script element.
        record = json_text({**result.configuration(), "provenance": asdict(provenance)})
        results.append(
            {
                "heading": _heading(entry),
                "glance": result.glance(),
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
    with matplotlib.rc_context(plots.STYLE), warnings.catch_warnings():
        # The reader's browser draws letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    # XML must not hold control characters; a token may.
    svg = visible(buffer.getvalue().decode(), keep="\n\r\t")
    # Margins are cut, so the drawing is not as wide as the figure.
    points = float(svg.split(' width="', 1)[1].split("pt", 1)[0])
    image = base64.b64encode(svg.encode()).decode()
    return {"image": image, "width": round(points / 72 * PIXELS)}


def description(figure: Figure) -> str:
    """Describe a figure in words: titles, axes and lines of its panels."""
    panels = []
    for ax in figure.axes:
        legend = ax.get_legend()
        lines = [text.get_text() for text in legend.get_texts()] if legend else []
        axes = [ax.get_ylabel(), ax.get_xlabel()]
        words = [ax.get_title(), " against ".join(axis for axis in axes if axis), ", ".join(lines)]
        panels.append(": ".join(word.replace("\n", " ") for word in words if word))
    return "Figure. " + "; ".join(panel for panel in panels if panel)


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
