"""Pages of views: one HTML text with one copy of the circuitsvis bundle, which needs no network.

    fragment(views)     the parts of a page for some views: elements of its body, calls of a script
    bundle()            the script that those calls need, once per page
    page(views)         a complete page
    frame(views)        the HTML of a notebook cell

A view that starts folded is drawn when a reader opens it.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markupsafe import Markup, escape

from hijacklens.files import write_text
from hijacklens.results.exhibits import View
from hijacklens.views.markup import templates

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
    """Return the parts of a page for some views.

    Args:
        views: From top to bottom.
        prefix: Begins the ids of their elements; must differ between the fragments of a page.
        level: Level of their headings, 2 for `<h2>`.
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

    Args:
        views: From top to bottom.
        title: The title and first line of the page.
        note: A paragraph below it.
    """
    return TEMPLATES.get_template("page.html").render(
        views=fragment(views), title=title, note=note, bundle=bundle(), packed=""
    )


def save_page(views: Sequence[View], path: Path, *, title: str, note: str = "") -> None:
    """Write `page` to a file, completely or not at all."""
    write_text(path, page(views, title=title, note=note))


def frame(views: Sequence[View], *, note: str = "") -> str:
    """Return the HTML of a notebook cell that shows views: one frame, one copy of the bundle.

    Args:
        views: From top to bottom.
        note: A paragraph above them.
    """
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
