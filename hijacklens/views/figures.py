"""Views as matplotlib figures, with the numbers of the page, for papers and previews.

As on the page, the rows of a map are the tokens that attend, the columns those attended to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from hijacklens import plots
from hijacklens.errors import unknown
from hijacklens.results.exhibits import View

NEGATIVE, POSITIVE = "#2166AC", "#B2182B"  # blue and red
COLOURS = LinearSegmentedColormap.from_list("views", [NEGATIVE, "#FFFFFF", POSITIVE])
"""White at zero, as in circuitsvis."""
FRACTIONS = LinearSegmentedColormap.from_list("fractions", ["#FFFFFF", POSITIVE])
"""The upper half of it, for numbers that are never negative."""
COLUMNS = 4
MOST_MAPS = 16
"""Up to this many heads get a labelled map each; beyond it, one unlabelled mosaic."""
LINE = 470.0
"""Width of a line of coloured tokens, in points (72 per inch)."""


def draw(view: View) -> Figure:
    """Draw a view.

    Raises:
        InputError: The component has no figure.
    """
    if view.component not in DRAWN:
        raise unknown("component with a figure", view.component, DRAWN)
    return DRAWN[view.component](view.heading, view.props)


def _heads(heading: str, props: dict[str, Any]) -> Figure:
    """Draw a map for each head, with tokens next to the outer maps."""
    patterns, names = props["attention"], props["attentionHeadNames"]
    if len(patterns) > MOST_MAPS:
        return _mosaic(heading, props)
    columns = min(COLUMNS, len(patterns))
    rows = math.ceil(len(patterns) / columns)
    side = min(_side(len(props["tokens"])), 20 / columns)
    largest = _scale(patterns)
    with plots.canvas(rows, columns, width=side, height=side) as (figure, axes):
        for i, (ax, pattern, name) in enumerate(zip(axes, patterns, names, strict=False)):
            _map(ax, props, pattern, largest)
            ax.set_title(plots.escape(name), fontsize=9)
            if i % columns:
                ax.set_yticklabels([])
            if i + columns < len(patterns):
                ax.set_xticklabels([])
        for ax in axes[len(patterns) :]:
            ax.set_visible(False)
        _bar(figure, axes, axes[0].images[0], largest)
        figure.suptitle(plots.escape(heading), fontsize=10)
    return figure


def _mosaic(heading: str, props: dict[str, Any]) -> Figure:
    """Draw all heads as one picture, each under its name, for an overview of a model."""
    patterns, names = np.array(props["attention"], dtype=float), props["attentionHeadNames"]
    heads, size = patterns.shape[:2]
    columns = math.ceil(math.sqrt(heads * 1.2))
    rows = math.ceil(heads / columns)
    gap = max(2, size // 4)
    step = size + gap
    # NaN is drawn as background.
    picture = np.full((rows * step, columns * step - gap), np.nan)
    width, height = 0.62 * columns, 0.62 * rows + 0.4
    with plots.canvas(width=width, height=height) as (figure, axes):
        for i, (pattern, name) in enumerate(zip(patterns, names, strict=True)):
            y, x = gap + i // columns * step, i % columns * step
            picture[y : y + size, x : x + size] = pattern
            middle = x + (size - 1) / 2
            axes[0].text(
                middle, y - 0.7, plots.escape(name), ha="center", va="bottom", fontsize=4.5
            )
        largest = _scale(props["attention"])
        image = axes[0].imshow(picture, cmap=FRACTIONS, vmin=0, vmax=largest, aspect="auto")
        _bar(figure, axes, image, largest)
        axes[0].axis("off")
        axes[0].set_title(plots.escape(heading), fontsize=10)
    return figure


def _pattern(heading: str, props: dict[str, Any]) -> Figure:
    side = _side(len(props["tokens"])) + 0.8
    with plots.canvas(width=side + 0.5, height=side) as (figure, axes):
        largest = _scale([props["attention"]])
        image = _map(axes[0], props, props["attention"], largest)
        axes[0].set_title(plots.escape(heading), fontsize=10)
        axes[0].set(xlabel="attended to", ylabel="attending")
        _bar(figure, axes, image, largest)
    return figure


def _scale(patterns: Sequence[Sequence[Sequence[float]]]) -> float:
    """Return the weight with the darkest colour: the largest to a token other than the first.

    Most heads rest on the first token (the attention sink), next to which nothing else shows.
    """
    return float(np.max(np.array(patterns)[:, :, 1:], initial=0.0)) or 1.0


def _bar(figure: Figure, axes: Sequence[Axes], image: Any, largest: float) -> None:
    extend = "max" if largest < 1 else "neither"
    figure.colorbar(image, ax=list(axes), shrink=0.6, label="attention", extend=extend)


def _map(ax: Axes, props: dict[str, Any], pattern: Any, largest: float) -> Any:
    values = np.array(pattern, dtype=float)
    if props["maskUpperTri"]:
        values = np.ma.array(values, mask=np.triu(np.ones_like(values, dtype=bool), 1))
    image = ax.imshow(values, cmap=FRACTIONS, vmin=0, vmax=largest)
    tokens = [plots.escape(token) for token in props["tokens"]]
    size = min(8.0, 8.0 * 34 / max(len(tokens), 1))
    if len(tokens) <= 80:
        ax.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=size)
        ax.set_yticks(range(len(tokens)), tokens, fontsize=size)
    ax.grid(visible=False)
    return image


def _coloured(heading: str, props: dict[str, Any]) -> Figure:
    """Draw the tokens in lines, each on its colour, with the scale below."""
    tokens = [plots.escape(token.removesuffix(" ")) for token in props["tokens"]]
    largest = props["maxValue"]
    norm = Normalize(-largest, largest)
    x, row, boxes = 0.0, 0, []
    for token in tokens:
        width = TextPath((0, 0), token or " ", size=9).get_extents().width + 8  # its margin
        if x and x + width > LINE:
            x, row = 0.0, row + 1
        boxes.append((x, row, width))
        x += width + 5
    with plots.canvas(width=7.2, height=1.16 + 0.26 * row) as (figure, axes):
        ax = axes[0]
        for token, value, (x, y, width) in zip(tokens, props["values"], boxes, strict=True):
            colour = COLOURS(norm(value))
            dark = sum(c * w for c, w in zip(colour, (0.3, 0.59, 0.11), strict=False)) < 0.55
            ink = "white" if dark else "#222222"
            ax.add_patch(Rectangle((x, y - 0.42), width, 0.84, fc=colour, ec="#DDD"))
            text = ax.text(x + width / 2, y, token, fontsize=9, color=ink)
            text.set(ha="center", va="center_baseline")
        ax.set(xlim=(-2, LINE + 8), ylim=(row + 0.6, -0.6))
        ax.axis("off")
        ax.set_title(plots.escape(heading), fontsize=10, loc="left")
        scale = ScalarMappable(norm, COLOURS)
        if min(props["values"], default=0) >= 0:  # no blue half
            scale = ScalarMappable(Normalize(0, largest), FRACTIONS)
        bar = figure.colorbar(scale, ax=ax, orientation="horizontal", shrink=0.4, aspect=40)
        bar.locator = MaxNLocator(5)
        bar.ax.tick_params(labelsize=8)
    return figure


DRAWN: dict[str, Callable[[str, dict[str, Any]], Figure]] = {
    "AttentionHeads": _heads,
    "AttentionPattern": _pattern,
    "ColoredTokens": _coloured,
}


def _side(tokens: int) -> float:
    """Return the inches of a map that make its token labels readable."""
    return min(max(2.2, 0.16 * tokens + 0.8), 7.0)
