"""Drawing shared by the figures of several analyses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.statistics import Interval

OVER_SEEDS = "standard errors over {} seeds"
"""The meaning of the error bars of trained models, for legends."""
WILSON = "95% Wilson intervals"
"""The meaning of the error bars of measured fractions, for legends."""
BOUND: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2}
"""The style of a line with which measured values are compared."""
FINE: dict[str, Any] = {"markersize": 4, "linewidth": 1.2}
"""The style of curves of which several share a panel."""


def over_seeds(settings: Any, columns: int = 3) -> dict[str, Any]:
    """Return the options of a legend whose error bars are standard errors over seeds."""
    return {"bars": OVER_SEEDS.format(settings.seeds), "columns": columns}


def draw_panels(
    table: pd.DataFrame,
    draw: Callable[[Axes, Any, Any], None],
    *,
    x: str,
    y: str,
    legend: Mapping[str, Any],
    by: str | list[str] = "bits",
    title: str = "m = {}",
    **layout: Any,
) -> Figure:
    """Draw one panel per group of rows, with one legend for all of them.

    Args:
        table: The table of an analysis.
        draw: Draws one group: `draw(panel, rows, entry)`, with a tuple of entries for several
            columns.
        x: Label of the x axes.
        y: Label of the y axes.
        legend: Options of `plots.legend_below`.
        by: The columns whose entries define the groups.
        title: The title of a panel, with a field `{}` for each entry.
        **layout: Options of `plots.panels`; by default the panels share the y axis.
    """
    groups = list(table.groupby(by, sort=False))
    with plots.panels(len(groups), **{"share_y": True, **layout}) as (figure, axes):
        for panel, (entry, rows) in zip(axes, groups, strict=True):
            panel.set_title(
                title.format(*(entry if isinstance(entry, tuple) else (entry,))), fontsize=9
            )
            draw(panel, rows, entry)
        plots.label_outer(axes, x=x, y=y)
        plots.legend_below(figure, axes, **legend)
        return figure


def draw_means(panel: Axes, groups: Any, i: int, *, shift: float = 1.0, **style: Any) -> None:
    """Draw group means with their standard errors as the i-th series of a panel.

    Args:
        panel: Where they are drawn.
        groups: A column, grouped by the values of the x axis.
        i: Index of the colour and marker.
        shift: Factor on x, so that equal values of several series stay visible.
        **style: Options of `Axes.errorbar`, such as `label`.
    """
    colour, marker = plots.series(i)
    means = groups.mean()
    options = {"color": colour, "marker": marker, "capsize": 2, **style}
    panel.errorbar(means.index * shift, means, yerr=groups.sem(), **options)


def draw_intervals(panel: Axes, x: Any, values: Iterable[Interval], i: int, **style: Any) -> None:
    """Draw values with their intervals as the i-th series of a panel (`style` as above)."""
    colour, marker = plots.series(i)
    points = list(values)
    options = {"color": colour, "marker": marker, **style}
    panel.errorbar(x, [each.value for each in points], yerr=plots.whiskers(points), **options)


def log2_axis(panel: Axes, values: Sequence[int], **style: Any) -> None:
    """Make the x axis logarithmic to base 2, with a tick at each value."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [str(value) for value in values], **style)


def sideways(i: int, count: int) -> float:
    """Return the distance of the i-th of `count` neighbours from their middle, in steps."""
    return i - (count - 1) / 2


def intervals(rows: Any) -> list[Interval]:
    """Return the intervals of the columns `error`, `error_low` and `error_high`, row by row."""
    return [Interval(row.error, row.error_low, row.error_high) for row in rows.itertuples()]


def draw_errors(panel: Axes, x: Any, rows: Any, i: int, label: str) -> None:
    """Draw errors with their intervals as the i-th series of a panel with a logarithmic y axis.

    A row without any error is drawn as an arrow that hangs from the upper end of its interval.

    Args:
        panel: Where they are drawn.
        x: x of each row, as a column with the same index.
        rows: Rows with `error`, `error_low`, `error_high`.
        i: Index of the colour and marker.
        label: Name in the legend.
    """
    seen = rows["error"] > 0
    draw_intervals(panel, x[seen], intervals(rows[seen]), i, capsize=2, label=label, **FINE)
    upper = rows["error_high"][~seen]
    colour, _ = plots.series(i)
    arrow = {"uplims": True, "color": colour, "linestyle": "none", "linewidth": 1.2}
    panel.errorbar(x[~seen], upper, yerr=upper / 2, **arrow)


def draw_over_widths(
    table: pd.DataFrame,
    settings: Any,
    *,
    column: str,
    names: Mapping[str, str],
    value: str,
    label: str,
) -> Figure:
    """Draw curves over d, one per entry of a column, in a panel per m; a dotted line marks d = V.

    Points at the same d are shifted sideways, so that equal values stay visible.

    Args:
        table: Rows per `bits`, `dim`, `seed` and entry; several rows of a seed are averaged.
        settings: Settings with `d_models` and `seeds`.
        column: The column whose entries are the curves.
        names: Entry -> name in the legend.
        value: The column that is drawn.
        label: Label of the y axis.
    """

    def draw(panel: Axes, rows: Any, bits: int) -> None:
        for i, (entry, name) in enumerate(names.items()):
            runs = rows[rows[column] == entry].groupby(["dim", "seed"])[value].mean()
            shift = 2 ** (0.14 * sideways(i, len(names)))
            draw_means(panel, runs.groupby("dim"), i, shift=shift, label=name, **FINE)
        panel.axvline(2**bits, color="#666666", **BOUND, label="d = V")
        log2_axis(panel, settings.d_models, fontsize=8)
        panel.set_title(f"m = {bits} (V = {2**bits})", fontsize=9)
        panel.set_ylim(0, None)

    legend = over_seeds(settings, columns=4)
    return draw_panels(table, draw, x="embedding dimension d", y=label, legend=legend)
