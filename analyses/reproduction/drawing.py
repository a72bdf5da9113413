"""Drawing shared by the figures of several analyses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.statistics import Interval

OVER_SEEDS = "standard errors over {} seeds"
"""The meaning of the error bars of trained models, for legends."""
BOUND: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2}
"""The style of a line with which measured values are compared."""


def intervals(rows: Any) -> list[Interval]:
    """Return the intervals of the columns `error`, `error_low` and `error_high`, row by row."""
    return [Interval(row.error, row.error_low, row.error_high) for row in rows.itertuples()]


def draw_errors(panel: Axes, place: Any, rows: Any, *, i: int, label: str) -> None:
    """Errors with their intervals as the i-th line of a panel with a logarithmic axis.

    Where no error was seen, an arrow hangs from the upper end of the interval.

    Args:
        panel: Where it is drawn.
        place: x of each row, as a column with the same index.
        rows: With `error`, `error_low`, `error_high`.
        i: Which colour and marker it has.
        label: Its name in the legend.
    """
    colour, marker = plots.series(i)
    seen = rows["error"] > 0
    panel.errorbar(
        place[seen],
        rows["error"][seen],
        yerr=plots.whiskers(intervals(rows[seen])),
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label=label,
    )
    upper = rows["error_high"][~seen]
    panel.errorbar(
        place[~seen],
        upper,
        yerr=upper / 2,
        uplims=True,
        color=colour,
        linestyle="none",
        linewidth=1.2,
    )


def draw_over_widths(
    table: pd.DataFrame,
    settings: Any,
    *,
    column: str,
    names: Mapping[str, str],
    value: str,
    label: str,
) -> Figure:
    """Draw lines over d, one per entry of a column, with a panel per m and a dotted mark at d = V.

    Points at the same d are shifted sideways, so that equal values stay visible.
    """
    with plots.panels(len(settings.bits), share_y=True) as (figure, axes):
        for panel, bits in zip(axes, settings.bits, strict=True):
            for i, (entry, name) in enumerate(names.items()):
                rows = table[(table["bits"] == bits) & (table[column] == entry)]
                by_seed: Any = rows.groupby(["dim", "seed"])[value].mean()
                by = by_seed.groupby("dim")
                colour, marker = plots.series(i)
                panel.errorbar(
                    by.mean().index * 2 ** (0.14 * (i - (len(names) - 1) / 2)),
                    by.mean(),
                    yerr=by.sem(),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.2,
                    capsize=2,
                    label=name,
                )
            panel.axvline(2**bits, color="#666666", **BOUND, label="d = V")
            panel.set_xscale("log", base=2)
            panel.set_xticks(
                settings.d_models, [str(d_model) for d_model in settings.d_models], fontsize=8
            )
            panel.set_title(f"m = {bits} (V = {2**bits})", fontsize=9)
            panel.set_ylim(0, None)
        plots.label_outer(axes, x="embedding dimension d", y=label)
        plots.legend_below(figure, axes, bars=OVER_SEEDS.format(settings.seeds), columns=4)
        return figure
