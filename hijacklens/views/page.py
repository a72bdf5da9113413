"""Pages of views: one HTML text with one copy of the bundle, that needs no network.

    fragment(views)     what a page holds for its views: places in the body, and calls of a script
    bundle()            the script that those calls need, once in a page
    page(views)         both, as a whole page

A view that starts folded is drawn when it is opened.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hijacklens.files import write_whole
from hijacklens.views.view import View

STYLE = (
    "body{font-family:system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;"
    "color:#222;background:#fff;color-scheme:light}"
    "h1{font-size:1.3rem}h2,summary{font-size:1.05rem;margin:1.2rem 0 .4rem}"
    "summary{cursor:pointer}p{color:#555}.words{line-height:1.7}"
    # A map grows with its place, and should fit a screen.
    ".map{max-width:34rem}.maps{max-width:44rem}"
)

KINDS = {"ColoredTokens": "words", "AttentionHeads": "maps"}
"""Component -> class of its place, for the style."""

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""What the browser is told to refuse: everything that is not in the page itself."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Views as parts of a page."""

    body: str
    """HTML: a heading and a place for each view."""
    script: str
    """JavaScript that draws them; it stands behind `bundle()` and behind the body."""


@cache
def bundle() -> str:
    """The script of circuitsvis, 1.3 MB, safe to stand in a script element."""
    import circuitsvis

    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    return path.read_text(encoding="utf-8").replace("</script>", "<\\/script>")


def fragment(views: Sequence[View], *, prefix: str = "view", level: int = 2) -> Fragment:
    """The parts of a page for some views.

    Args:
        views: From top to bottom.
        prefix: Begins the ids of their elements; another one for each fragment of a page.
        level: Level of their headings, 2 for `<h2>`.
    """
    body, calls = [], []
    for i, view in enumerate(views):
        name, fold = f"{prefix}{i}", f"{prefix}-fold{i}"
        kind = KINDS.get(view.component, "map")
        heading, place = html.escape(view.heading), f'<div id="{name}" class="{kind}"></div>'
        # A tag in a text would end the script.
        props = json.dumps(view.props, ensure_ascii=False).replace("</", "<\\/")
        call = f'CircuitsVis.render("{name}", CircuitsVis.{view.component}, {props})'
        if view.folded:
            body.append(f'<details id="{fold}"><summary>{heading}</summary>{place}</details>')
            calls.append(
                f'document.getElementById("{fold}").addEventListener("toggle", () => {call}, '
                "{once: true});"
            )
        else:
            title = f"<h{level}>{heading}</h{level}>" if heading else ""
            body.append(f"{title}{place}")
            calls.append(f"{call};")
    return Fragment("\n".join(body), "\n".join(calls))


def page(views: Sequence[View], *, title: str, note: str = "") -> str:
    """The HTML of a page with all views; it needs no network.

    Args:
        views: From top to bottom.
        title: The title and first line of the page.
        note: A paragraph below it.
    """
    parts = fragment(views)
    head = [f"<h1>{html.escape(title)}</h1>"]
    head += [f"<p>{html.escape(note)}</p>"] if note else []
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            *head,
            parts.body,
            f"<script>{bundle()}</script>",
            f"<script>\n{parts.script}\n</script></body></html>",
        ]
    )


def save_page(views: Sequence[View], path: Path, *, title: str, note: str = "") -> None:
    """Write `page` to a file, whole or not at all."""
    text = page(views, title=title, note=note)

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    write_whole(path, write)


CELL_STYLE = STYLE + "body{margin:.4rem}h2{font-size:.95rem;font-weight:600}p{margin:.3rem 0}"

LOADER = (
    "(async () => {"
    'const packed = Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0));'
    'const open = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));'
    'const script = document.createElement("script");'
    "script.textContent = await new Response(open).text();"
    "document.head.append(script);\n%s\n})();"
)


def frame(views: Sequence[View], *, note: str = "") -> str:
    """The HTML of a notebook cell that shows views: one frame, one copy of the bundle.

    Args:
        views: From top to bottom.
        note: A paragraph above them.
    """
    parts = fragment(views)
    head = f"<p>{html.escape(note)}</p>" if note else ""
    inside = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{CELL_STYLE}</style></head><body>{head}{parts.body}"
        f"<script>{LOADER % (_packed(), parts.script)}</script></body></html>"
    )
    title = html.escape("; ".join(view.heading for view in views), quote=True)
    high = 30 * bool(note) + sum(_height(view) for view in views)
    return (
        f'<iframe sandbox="allow-scripts" title="{title}" srcdoc="{html.escape(inside)}" '
        f'style="width:100%;height:{high}px;border:0;resize:vertical;overflow:auto"></iframe>'
    )


@cache
def _packed() -> str:
    # Without a time, equal views give equal cells.
    return base64.b64encode(gzip.compress(bundle().encode(), 9, mtime=0)).decode()


def _height(view: View) -> int:
    """Pixels that a view takes in a cell of usual width, measured in Chromium.

    A frame in a sandbox cannot tell its height to the notebook; its lower edge can be pulled.
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
