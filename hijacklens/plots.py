"""The style of every figure: one layout, one palette that is safe for colour-blind readers.

Functions return the matplotlib figure and show nothing. The colours are the eight of Okabe and Ito
(2008). Lines also differ in marker and dash, so that a dozen are distinguishable, in grey too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.text import Text

from hijacklens.errors import warn
from hijacklens.statistics import Interval

PAGE = 6.9
"""Width of a printed page in inches; figures of many panels keep to it so that text is legible."""
COLOURS = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # green
    "#CC79A7",  # purple
    "#E69F00",  # orange
    "#56B4E9",  # sky
    "#000000",
    "#B8A800",  # yellow, darkened for white paper
)
MOST_LABELS = 24
"""Beyond this many rows or columns of a map only every second, third, ... number is a label."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")

STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hijacklens",  # equal figures give equal files
}
HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that a reader could not see or that would reverse the text around them: control
characters, writing directions, line ends, broken code points. `report/data.js` has the same."""
NO_GLYPH = (
    "no installed font has some letters of a figure, which are boxes in pictures; SVG files have "
    "the text. Install a font with them, such as Noto Sans CJK"
)
# matplotlib's own warnings, one for each letter; `warn_of_boxes` warns once.
warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")


class _StyledFigure(Figure):
    """A figure that is saved in our style: complete, however long its texts are."""

    def savefig(self, *arguments: Any, **options: Any) -> None:
        """Save the figure, as `Figure.savefig`."""
        with plt.rc_context(STYLE):
            super().savefig(*arguments, **options)


class FigureWarning(UserWarning):
    """A figure does not look as it should."""


def series(i: int) -> tuple[str, str]:
    """Return colour and marker of the i-th line; pairs repeat after 64.

    Each round of the colours shifts the markers by one.

    >>> series(0), series(8)
    (('#0072B2', 'o'), ('#0072B2', 's'))
    """
    n = len(COLOURS)
    return COLOURS[i % n], MARKERS[(i + i // n) % len(MARKERS)]


def line(i: int) -> dict[str, Any]:
    """Return the style of the i-th line, for `Axes.plot`: colour, marker, dashes from the ninth."""
    colour, marker = series(i)
    return {
        "color": colour,
        "marker": marker,
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        "markersize": 5,
    }


@contextmanager
def canvas(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 5.2,
    height: float = 3.6,
    share_y: bool = False,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Provide a styled figure and its axes, row by row; `width` and `height` are inches per axes.

    The figure is removed from pyplot's list, so that a notebook shows it once (as the value of a
    cell) and long runs do not accumulate figures.

    Warns:
        FigureWarning: No installed font has some of the letters.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width * columns, height * rows),
            squeeze=False,
            FigureClass=_StyledFigure,
            sharey=share_y,
            layout="constrained",
        )
        try:
            yield figure, list(axes.flat)
            if not add_fonts(figure):
                warn_of_boxes()
        finally:
            plt.close(figure)


@contextmanager
def panels(
    count: int, *, height: float = 2.5, share_y: bool = False
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Provide a styled figure of `count` similar panels, wrapped to the width of a page.

    `height` is the inches of a row. Unused cells are blank.
    """
    columns = count if count <= 3 else 2 if count == 4 else 3
    rows = -(-count // columns)
    width = 5.2 if count == 1 else PAGE / columns
    with canvas(rows, columns, width=width, height=height, share_y=share_y) as (figure, axes):
        for blank in axes[count:]:
            blank.set_axis_off()
        yield figure, axes[:count]


def heat_map(
    ax: Axes,
    values: np.ndarray,
    *,
    rows: Iterable[object],
    columns: Iterable[object],
    label: str,
    limit: float | None = None,
    **image: Any,
) -> None:
    """Draw a table of numbers as colours, symmetric about 0, with a colour bar.

    Args:
        ax: The axes to draw on.
        values: The numbers, [row, column]; cells that are not finite stay blank.
        rows: Labels of the rows. Beyond `MOST_LABELS` only some whole numbers are labelled, and
            all texts.
        columns: Labels of the columns.
        label: What the colours mean.
        limit: The number with the darkest colour; by default the largest in size.
        image: Further arguments of `Axes.imshow`.
    """
    finite = np.abs(values[np.isfinite(values)])
    limit = limit or (float(finite.max()) if finite.any() else 1.0)
    image = {"cmap": "RdBu_r", "aspect": "auto", "vmin": -limit, "vmax": limit, **image}
    figure: Any = ax.figure
    bar = figure.colorbar(ax.imshow(values, **image), ax=ax, label=escape(label))
    bar.outline.set_visible(False)
    ax.grid(visible=False)
    for axis, names in ((ax.yaxis, list(rows)), (ax.xaxis, list(columns))):
        step = -(-len(names) // MOST_LABELS)
        ticks = [i for i, name in enumerate(names) if i % step == 0 or isinstance(name, str)]
        axis.set_ticks(ticks, [escape(str(names[i]).replace("\n", "↵")) for i in ticks])


def escape(text: str) -> str:
    r"""Escape `$`, which would begin mathematics, and a leading `_`, which legends leave out.

    Hidden characters are written out; an SVG file with a control character cannot be opened.

    >>> escape("US$"), escape("_edited"), escape("a\x00")
    ('US\\$', ' _edited', 'a⟨U+0000⟩')
    """
    return (" " if text.startswith("_") else "") + visible(text).replace("$", r"\$")


def visible(text: str) -> str:
    """Write out the hidden characters of a text, except line ends.

    By numbers, since fonts of figures lack the signs of control characters that pages show.
    """
    return HIDDEN.sub(
        lambda found: found[0] if found[0] == "\n" else f"⟨U+{ord(found[0]):04X}⟩", text
    )


def label_outer(axes: Sequence[Axes], *, x: str, y: str) -> None:
    """Label the axes of similar panels: x below each column, y left of each row."""
    for k, panel in enumerate(axes):
        cell = panel.get_subplotspec()
        assert cell is not None  # as `canvas` makes them
        if k + cell.get_gridspec().ncols >= len(axes):
            panel.set_xlabel(x)
        if cell.is_first_col():
            panel.set_ylabel(y)


def legend_below(
    figure: Figure, axes: Sequence[Axes], *, bars: str = "", columns: int = 3, **options: Any
) -> None:
    """Draw one legend for all panels below them, where it covers nothing.

    Measured values come first, then their references. `bars` is the meaning of the error bars, e.g.
    `95% Wilson intervals`; `options` are those of `Figure.legend`.
    """
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    ordered = sorted(entries.items(), key=lambda entry: not isinstance(entry[1], Container))
    figure.legend(
        handles=[handle for _, handle in ordered],
        labels=[label for label, _ in ordered],
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        title=f"bars: {bars}" if bars else None,
        title_fontsize=8,
        **options,
    )


def whiskers(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return the lengths of error bars below and above their values, for `Axes.errorbar`.

    An infinite bar is not drawn, since it would leave no scale for the others.
    """
    ends = [(each.value - each.low, each.high - each.value) for each in intervals]
    return np.where(np.isfinite(ends), np.maximum(ends, 0.0), np.nan).reshape(-1, 2).T.tolist()


def add_fonts(figure: Figure) -> bool:
    """Let texts use installed fonts for letters that the usual one lacks.

    Returns:
        Whether every letter has a font. The others appear as boxes, except in SVG files.
    """
    complete = True
    for text in figure.findobj(Text):
        if not isinstance(text, Text) or text.get_text().isascii():
            continue
        usual = font_manager.findfont(text.get_fontproperties())
        lacking = set(map(ord, text.get_text())) - _letters(usual) - {ord("\n")}
        families = list(text.get_fontfamily())
        for name in _fonts_with(lacking):
            families += [name] * (name not in families)
        text.set_fontfamily(families)
        complete &= not lacking
    return complete


@cache
def warn_of_boxes() -> None:
    """Warn that letters of a figure have no font, once in a process."""
    warn(NO_GLYPH, FigureWarning)


def _fonts_with(letters: set[int]) -> Iterator[str]:
    """Yield the fonts that together have these letters, and remove the letters that they have."""
    while letters:
        found = {entry.name: _letters(entry.fname) & letters for entry in _installed_fonts()}
        name = max(found, key=lambda name: len(found[name]), default="")
        if not found.get(name):
            return
        letters -= found[name]
        yield name


def _installed_fonts() -> list[font_manager.FontEntry]:
    """Return upright fonts of normal weight, without those of matplotlib for mathematics."""
    own = matplotlib.get_data_path()
    return [
        entry
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal" and entry.weight == 400 and not entry.fname.startswith(own)
    ]


@cache
def _letters(font: str) -> frozenset[int]:
    """Return the code points of the letters in a font file; none if it cannot be drawn."""
    try:
        return frozenset(font_manager.get_font(font).get_charmap())
    except (OSError, RuntimeError):  # damaged, or of coloured pictures
        return frozenset()


def write(figure: Figure, path: Path) -> None:
    """Save a figure in the format of its file ending; equal figures give equal files."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
