"""A view: one circuitsvis component with its tokens and numbers, under a heading.

>>> view = coloured_tokens("Parts of the shift", ["<s>", "Guam"], [0.0, 1.5])
>>> view.component, view.props["values"], [text.get_text() for text in view.plot().axes[0].texts]
('ColoredTokens', [0.0, 1.5], ['‹s›', 'Guam'])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from hijacklens.errors import InputError

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
    """One circuitsvis component under a heading; as the last value of a cell it shows itself."""

    heading: str
    component: str
    """Name of the component, such as `AttentionHeads`."""
    props: dict[str, Any]
    """Its properties, ready for JSON."""
    folded: bool = False
    """Whether only the heading shows on a page until it is opened."""

    def plot(self) -> Figure:
        """The same numbers as a matplotlib figure: maps of heads, or a strip of tokens.

        Raises:
            InputError: The component has no figure.
        """
        from hijacklens.views import figures

        return figures.draw(self)

    def save(self, path: str | Path) -> Path:
        """Write the view to a file and return its path.

        Args:
            path: Ends in `.html` for a page that needs no network, or in `.png`, `.svg` or `.pdf`
                for the figure.

        Raises:
            InputError: The name ends otherwise, or its folder is not there.
        """
        from hijacklens.views.sheet import Sheet

        return Sheet((self,), title=self.heading).save(path)

    def __repr__(self) -> str:
        tokens = len(self.props.get("tokens", ()))
        return f"View({self.heading!r}, {self.component}, {tokens} tokens)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from hijacklens.views.sheet import Sheet

        return Sheet((self,))._repr_mimebundle_(include, exclude) | {"text/plain": repr(self)}


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
        **_colours(1),
        "maskUpperTri": True,
    }
    return View(heading, "AttentionHeads", props, folded)


def attention_pattern(
    heading: str,
    tokens: Sequence[str],
    pattern: Float[np.ndarray, "query key"],
    *,
    folded: bool = False,
) -> View:
    """The attention pattern of one head, in full.

    Args:
        heading: Stands above the view.
        tokens: The tokens of the prompt.
        pattern: Attention, between 0 and 1.
        folded: Start folded.

    Raises:
        InputError: Tokens and pattern differ in number.
    """
    if pattern.shape != (len(tokens), len(tokens)):
        raise InputError(
            f"a pattern of shape {pattern.shape} needs a token per query and key; given "
            f"{len(tokens)} tokens."
        )
    props = {
        "attention": pattern.round(DIGITS).tolist(),
        "tokens": [visible(token) for token in tokens],
        **_colours(1),
        "showAxisLabels": True,
        "maskUpperTri": True,
    }
    return View(heading, "AttentionPattern", props, folded)


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
        **_colours(most),
    }
    return View(heading, "ColoredTokens", props)


def _colours(most: float | int) -> dict[str, Any]:
    return {
        "minValue": -most,
        "maxValue": most,
        "negativeColor": NEGATIVE,
        "positiveColor": POSITIVE,
    }
