"""Views in a notebook cell: a frame of their own, that needs no network and reaches nothing.

The frame is sandboxed, so that its script cannot touch the notebook, and a policy lets it fetch
nothing. As frames cannot share a script, each holds the bundle, compressed from 1.3 MB to 0.5 MB,
which the browser expands (any since 2023); `hijacklens.views.Sheet` puts several views into one.
"""

from __future__ import annotations

import base64
import gzip
import html
import math
from collections.abc import Sequence
from functools import cache

from hijacklens.views.page import POLICY, STYLE, bundle, fragment
from hijacklens.views.view import View

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
