"""Making views from tokens and numbers: one function per circuitsvis component.

`heading` is the text above the view; a view with `folded` starts folded on a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.views.figures import NEGATIVE, POSITIVE
from hijacklens.views.sheet import View

DIGITS = 4
"""Decimals of each number on a page: enough to read, at a third of the size."""
LETTERS = str.maketrans("<>\n", "\u2039\u203a↵")


def visible(token: str) -> str:
    """Return a token as visible text: angle brackets would be read as markup, as in `<s>`."""
    text = plots.visible(token).translate(LETTERS)
    return text if text.strip() else text.replace(" ", "␣") or "∅"


def attention_heads(
    heading: str,
    tokens: Sequence[str],
    patterns: Float[np.ndarray, "head query key"],
    names: Sequence[str],
    *,
    folded: bool = False,
) -> View:
    """View the attention patterns of several heads: small maps of all, and one head in full.

    Raises:
        InputError: Tokens, names and patterns differ in number.
    """
    heads, queries, keys = patterns.shape
    if len(tokens) != queries or queries != keys or len(names) != heads:
        raise InputError(
            f"patterns of shape {patterns.shape} need a token per query and key and a name per "
            f"head; given {len(tokens)} tokens and {len(names)} names."
        )
    props = {**_attention(tokens, patterns), "attentionHeadNames": list(names)}
    return View(heading, "AttentionHeads", props, folded)


def attention_pattern(
    heading: str,
    tokens: Sequence[str],
    pattern: Float[np.ndarray, "query key"],
    *,
    folded: bool = False,
) -> View:
    """View the attention pattern of one head in full.

    Raises:
        InputError: Tokens and pattern differ in number.
    """
    if pattern.shape != (len(tokens), len(tokens)):
        raise InputError(
            f"a pattern of shape {pattern.shape} needs a token per query and key; given "
            f"{len(tokens)} tokens."
        )
    props = {**_attention(tokens, pattern), "showAxisLabels": True}
    return View(heading, "AttentionPattern", props, folded)


def coloured_tokens(heading: str, tokens: Sequence[str], values: Sequence[float]) -> View:
    """View tokens coloured by numbers: red above zero, blue below; hover to see the number.

    Raises:
        InputError: Tokens and values differ in number.
    """
    if len(tokens) != len(values):
        raise InputError(f"{len(tokens)} tokens need as many values, not {len(values)}.")
    largest = max((abs(float(value)) for value in values), default=1.0) or 1.0
    props = {
        # A space after each token keeps words apart.
        "tokens": [f"{visible(token)} " for token in tokens],
        "values": [round(float(value), DIGITS) for value in values],
        **_colours(largest),
    }
    return View(heading, "ColoredTokens", props)


def _attention(tokens: Sequence[str], patterns: np.ndarray) -> dict[str, Any]:
    return {
        "attention": patterns.round(DIGITS).tolist(),
        "tokens": [visible(token) for token in tokens],
        **_colours(1),
        "maskUpperTri": True,
    }


def _colours(largest: float | int) -> dict[str, Any]:
    limits = {"minValue": -largest, "maxValue": largest}
    return {**limits, "negativeColor": NEGATIVE, "positiveColor": POSITIVE}
