"""Figures of a comparison of laws: a panel per model and scheme."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.law.evaluation import calibration
from hijacklens import plots
from hijacklens.facts.relations import relation_title
from hijacklens.statistics import clustered, wilson

TITLES = {
    "laws": "How much of the shift each law predicts",
    "predicted": "Predicted and measured shift",
    "calibration": "Calibration of predicted flips",
    "residuals": "Residuals by relation",
}
LINE = {"color": "#888888", "linewidth": 0.8, "linestyle": ":"}


def draw(rows: pd.DataFrame, what: str, law: str) -> Figure:
    """Draw a figure: a panel per model and scheme.

    Args:
        rows: For `laws` the table of laws, otherwise the predictions of one law.
        what: A key of `TITLES`.
        law: The name of that law.
    """
    cells: Any = list(rows.groupby(["model", "scheme"], sort=False))
    columns = min(4, len(cells), max(2, rows["scheme"].nunique()))
    form, height, x, y = {
        "laws": (_laws, 2.6, "R² on new relations\n95% intervals, relations like these", ""),
        "predicted": (_predicted, 3.1, "shift predicted by {} (nats)", "measured shift (nats)"),
        "calibration": (
            _calibration,
            3.1,
            "probability of a flip by {}",
            "fraction that flips\n95% Wilson, these facts",
        ),
        "residuals": (
            _residuals,
            5.2,
            "measured - predicted by {} (nats)\n95% intervals, facts of the relation",
            "",
        ),
    }[what]
    with plots.canvas(-(-len(cells) // columns), columns, width=3.3, height=height) as (fig, axes):
        for ax, (key, part) in zip(axes, cells, strict=False):
            form(ax, part)
            ax.set_title(plots.escape(", ".join(key)), fontsize=9)
        plots.label_outer(axes[: len(cells)], x=x.format(law), y=y)
        for ax in axes[len(cells) :]:
            ax.set_axis_off()
        plots.legend_below(fig, axes, markerscale=3)
    return fig


def _laws(ax: Axes, part: Any) -> None:
    _bars(ax, part[["law", "r2", "r2_low", "r2_high"]].iloc[::-1].values.tolist())
    # A law that fails badly would squeeze the others.
    ax.set_xlim(max(-1.0, min(-0.1, part["r2_low"].min() - 0.05)), 1)


def _residuals(ax: Axes, part: Any) -> None:
    groups = part.assign(rest=part["shift"] - part["predicted"]).groupby("relation_id")["rest"]
    found = [(name, clustered(rest.to_numpy())) for name, rest in groups if len(rest) > 1]
    titles = [shorten(relation_title(str(name)), 30, placeholder=" …") for name, _ in found]
    bars = [(t, one.value, one.low, one.high) for t, (_, one) in zip(titles, found, strict=True)]
    _bars(ax, sorted(bars, key=lambda bar: bar[1]))
    values = [value for _, value, *_ in bars] or [0.0]  # no relation may have two facts
    ax.set_xlim(min(values) - 2, max(values) + 2)


def _bars(ax: Axes, found: Any) -> None:
    for i, (_, value, low, high) in enumerate(found):
        ax.plot([low, high], [i, i], color=plots.COLOURS[0], linewidth=2)
        ax.plot(value, i, "o", color="black", markersize=3)
    labels = [plots.escape(name) for name, *_ in found]
    ax.set_yticks(range(len(found)), labels, fontsize=6 if len(found) > 12 else 9)
    ax.axvline(0, **LINE)


def _predicted(ax: Axes, part: Any) -> None:
    both = part[["predicted", "shift"]]
    ax.plot([both.min().min(), both.max().max()], [both.min().min(), both.max().max()], **LINE)
    for i, (label, some) in enumerate(
        (("known", part["prior"] < 0), ("not known", part["prior"] >= 0))
    ):
        ax.plot(
            part["predicted"][some], part["shift"][some], ".", color=plots.COLOURS[i], label=label,
            markersize=3, alpha=0.4,
        )  # fmt: skip


def _calibration(ax: Axes, part: Any) -> None:
    bins = calibration(part)
    low, high = wilson((bins["flipped"] * bins["n"]).to_numpy(), bins["n"].to_numpy())
    ax.plot([0, 1], [0, 1], **LINE)
    ax.vlines(bins["probability"], low, high, color=plots.COLOURS[0])
    ax.plot(bins["probability"], bins["flipped"], "o", color=plots.COLOURS[0], markersize=4)
