"""Views: interactive pages of circuitsvis that open with no network.

circuitsvis by itself points to a script on the network, or repeats its own 1.3 MB in every view.
Here any number of views share one copy of the bundle that comes with the package, in one HTML
file, and a view that starts folded is drawn when it is opened.

>>> text = page([coloured_tokens("Parts of the shift", ["<s>", "Guam"], [0.0, 1.5])], title="demo")
>>> "‹s›" in text, text.count("CircuitsVis.render"), "https://unpkg.com" in text
(True, 1, False)
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hijacklens.errors import InputError
from hijacklens.results import write_whole

DIGITS = 4
"""Of each number in a page: enough to read, and a third of the size."""
SHOWN = str.maketrans(
    {
        "<": "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}",
        ">": "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}",
        "\n": "↵",
    }
)
NEGATIVE, POSITIVE = "#2166AC", "#B2182B"
"""The ends of the maps of `hijacklens.plots`: blue and red."""


@dataclass(frozen=True, slots=True)
class View:
    """One circuitsvis component under a heading."""

    heading: str
    component: str
    """Name of the component, such as `AttentionHeads`."""
    props: dict[str, Any]
    """Its properties, ready for JSON."""
    folded: bool = False
    """Whether only the heading shows until it is opened."""


def visible(token: str) -> str:
    """A token as text that the page shows: `<s>` would be read as markup and disappear.

    >>> visible("<s>"), visible(" ")
    ('‹s›', '␣')
    """
    shown = token.translate(SHOWN)
    return shown if shown.strip() else shown.replace(" ", "␣") or "∅"


def attention_heads(
    heading: str,
    tokens: Sequence[str],
    patterns: Float[np.ndarray, "head query key"],
    names: Sequence[str],
    *,
    folded: bool = False,
) -> View:
    """Attention patterns of several heads, a small map each; a chosen one is shown in full.

    Args:
        heading: Stands above the view.
        tokens: The tokens of the prompt.
        patterns: Attention, between 0 and 1.
        names: A name per head.
        folded: Start folded.

    Raises:
        InputError: Tokens, names and patterns differ in number.
    """
    heads, queries, keys = patterns.shape
    if len(tokens) != queries or queries != keys or len(names) != heads:
        raise InputError(
            f"patterns of shape {patterns.shape} need a token per query and key and a name per "
            f"head; given {len(tokens)} tokens and {len(names)} names."
        )
    props = {
        "attention": patterns.round(DIGITS).tolist(),
        "tokens": [visible(token) for token in tokens],
        "attentionHeadNames": list(names),
        "maxValue": 1,
        "minValue": -1,
        "negativeColor": NEGATIVE,
        "positiveColor": POSITIVE,
        "maskUpperTri": True,
    }
    return View(heading, "AttentionHeads", props, folded)


def coloured_tokens(heading: str, tokens: Sequence[str], values: Sequence[float]) -> View:
    """Tokens coloured by a number each: red above zero, blue below, and the number on hovering.

    Raises:
        InputError: Tokens and values differ in number.
    """
    if len(tokens) != len(values):
        raise InputError(f"{len(tokens)} tokens need as many values, not {len(values)}.")
    most = max((abs(float(value)) for value in values), default=1.0) or 1.0
    props = {
        # With a space behind each token, words do not run together.
        "tokens": [f"{visible(token)} " for token in tokens],
        "values": [round(float(value), DIGITS) for value in values],
        "minValue": -most,
        "maxValue": most,
        "negativeColor": NEGATIVE,
        "positiveColor": POSITIVE,
    }
    return View(heading, "ColoredTokens", props)


def page(views: Sequence[View], *, title: str, note: str = "") -> str:
    """The HTML of a page with all views; it needs no network.

    Args:
        views: From top to bottom.
        title: The title and first line of the page.
        note: A paragraph below it.
    """
    import circuitsvis

    bundle = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    script = bundle.read_text(encoding="utf-8").replace("</script>", "<\\/script>")
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(note)}</p>"] if note else []
    calls = []
    for i, view in enumerate(views):
        heading, place = html.escape(view.heading), f'<div id="view{i}"></div>'
        # A tag in a text would end the script.
        props = json.dumps(view.props, ensure_ascii=False).replace("</", "<\\/")
        call = f'CircuitsVis.render("view{i}", CircuitsVis.{view.component}, {props})'
        if view.folded:
            body.append(f'<details id="fold{i}"><summary>{heading}</summary>{place}</details>')
            calls.append(
                f'document.getElementById("fold{i}").addEventListener("toggle", () => {call}, '
                "{once: true});"
            )
        else:
            body.append(f"<h2>{heading}</h2>{place}")
            calls.append(f"{call};")
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{STYLE}</style></head><body>",
            *body,
            f"<script>{script}</script>",
            "<script>",
            *calls,
            "</script></body></html>",
        ]
    )


STYLE = (
    "body{font-family:system-ui,sans-serif;margin:2rem auto;max-width:72rem;color:#222}"
    "h1{font-size:1.3rem}h2,summary{font-size:1.05rem;margin:1.2rem 0 .4rem}"
    "summary{cursor:pointer}p{color:#555}"
)


def save_page(views: Sequence[View], path: Path, *, title: str, note: str = "") -> None:
    """Write `page` to a file, whole or not at all."""
    text = page(views, title=title, note=note)

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    write_whole(path, write)
