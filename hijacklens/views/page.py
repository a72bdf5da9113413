"""Pages of views: one HTML text with one copy of the circuitsvis bundle, which needs no network.

A view that starts folded is drawn when a reader opens it.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from hijacklens.files import write_text
from hijacklens.plots import HIDDEN
from hijacklens.results.exhibits import View


@cache
def templates(folder: Path) -> Environment:
    r"""Return the Jinja2 templates in a folder; every text stays text, except `Markup` values.

    They escape tags and quotes, and write out the characters of `HIDDEN`.

    >>> templates(Path()).from_string("{{ text }}").render(text="<b>\x00\u202e\n</b>")
    '&lt;b&gt;␀⟨U+202E⟩↵&lt;/b&gt;'
    """
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else visible(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def visible(text: str, *, keep: str = "") -> str:
    """Write out the hidden characters of a text, except those in `keep`."""

    def written(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in keep:
            return match[0]
        if code == 0x0A:
            return "↵"
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return HIDDEN.sub(written, text)


TEMPLATES = templates(Path(__file__).parent)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Views as parts of a page."""

    body: Markup
    """HTML: a heading and an element for each view."""
    script: Markup
    """JavaScript that draws them; it must follow `bundle()` and the body."""


@cache
def bundle() -> Markup:
    """Return the script of circuitsvis, 1.3 MB, made safe for a script element."""
    import circuitsvis

    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    return Markup(path.read_text(encoding="utf-8").replace("</script>", "<\\/script>"))


def fragment(views: Sequence[View], *, prefix: str = "view", level: int = 2) -> Fragment:
    """Return the parts of a page for some views, with headings of a level, 2 for `<h2>`.

    `prefix` begins the ids of their elements; it must differ between the fragments of a page.
    """
    calls = []
    for i, view in enumerate(views):
        # A closing tag in a text would end the script.
        props = json.dumps(view.props, ensure_ascii=False).replace("</", "<\\/")
        call = f'CircuitsVis.render("{prefix}{i}", CircuitsVis.{view.component}, {props})'
        if view.folded:
            fold = f'document.getElementById("{prefix}-fold{i}")'
            call = f'{fold}.addEventListener("toggle", () => {call}, {{once: true}})'
        calls.append(f"{call};")
    body = TEMPLATES.get_template("views.html").render(views=views, prefix=prefix, level=level)
    return Fragment(Markup(body), Markup("\n".join(calls)))


def page(views: Sequence[View], *, title: str, note: str = "") -> str:
    """Return the HTML of a page with all views; it needs no network.

    The page begins with `title`, also as a heading, and the paragraph `note`.
    """
    return TEMPLATES.get_template("page.html").render(
        views=fragment(views), title=title, note=note, bundle=bundle(), packed=""
    )


def save_page(views: Sequence[View], path: Path, *, title: str, note: str = "") -> None:
    """Write `page` to a file, completely or not at all."""
    write_text(path, page(views, title=title, note=note))


def frame(views: Sequence[View], *, note: str = "") -> str:
    """Return the HTML of a notebook cell that shows views below a note, in one frame."""
    inside = TEMPLATES.get_template("page.html").render(
        views=fragment(views), title="", note=note, packed=_packed()
    )
    title = "; ".join(view.heading for view in views)
    height = 30 * bool(note) + sum(map(_height, views))
    return (
        f'<iframe sandbox="allow-scripts" title="{escape(title)}" srcdoc="{escape(inside)}" '
        f'style="width:100%;height:{height}px;border:0;resize:vertical;overflow:auto"></iframe>'
    )


@cache
def _packed() -> str:
    # Without a time, equal views give equal cells.
    return base64.b64encode(gzip.compress(bundle().encode(), 9, mtime=0)).decode()


def _height(view: View) -> int:
    """Return the pixels that a view takes in a cell of usual width, as measured in Chromium.

    A sandboxed frame cannot report its height to the notebook; readers can drag its lower edge.
    """
    heading = 34
    if view.folded:
        return heading
    if view.component == "ColoredTokens":
        letters = sum(len(token) for token in view.props["tokens"])
        return heading + 30 * math.ceil((letters + 1) / 85)
    if view.component == "AttentionHeads":
        return min(heading + 780 + 117 * math.ceil(len(view.props["attention"]) / 6), 1400)
    return heading + 580
