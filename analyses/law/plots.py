"""Figures of a comparison of laws: a panel per model and scheme."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.law.evaluation import calibration
from hijacklens import plots
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
    height = {"laws": 2.6, "residuals": 4.6}.get(what, 3.1)
    with plots.canvas(-(-len(cells) // columns), columns, width=3.3, height=height) as (fig, axes):
        for ax, ((model, scheme), part) in zip(axes, cells, strict=False):
            DRAWN[what](ax, part, law)
            ax.set_title(plots.escape(f"{model}, {scheme}"), fontsize=9)
        for ax in axes[len(cells) :]:
            ax.set_axis_off()
    return fig


def _bars(ax: Axes, found: Any, size: int) -> None:
    for i, (_, value, low, high) in enumerate(found):
        ax.plot([low, high], [i, i], color=plots.COLOURS[0], linewidth=size / 2)
        ax.plot(value, i, "o", color="black", markersize=size)
    labels = [plots.escape(name) for name, *_ in found]
    ax.set_yticks(range(len(found)), labels, fontsize=6 if len(found) > 12 else 9)
    ax.axvline(0, **LINE)


def _laws(ax: Axes, part: Any, law: str) -> None:
    _bars(ax, part[["law", "r2", "r2_low", "r2_high"]].values.tolist(), 4)
    ax.invert_yaxis()
    # A law that fails badly would squeeze the others.
    ax.set_xlim(max(-1.0, min(-0.1, part["r2_low"].min() - 0.05)), 1)
    ax.set_xlabel("R² on new relations")


def _predicted(ax: Axes, part: Any, law: str) -> None:
    ends = [part[["predicted", "shift"]].to_numpy().min(), part[["predicted", "shift"]].max().max()]
    ax.plot(ends, ends, **LINE)
    for i, (known, some) in enumerate(part.groupby(part["prior"] < 0)):
        label, style = "known" if known else "not known", {"markersize": 3, "alpha": 0.4}
        ax.plot(some["predicted"], some["shift"], ".", color=plots.COLOURS[i], label=label, **style)
    ax.set_xlabel(f"shift predicted by {law} (nats)")
    ax.set_ylabel("measured shift (nats)")
    ax.legend(fontsize=8, markerscale=3)


def _calibration(ax: Axes, part: Any, law: str) -> None:
    bins = calibration(part)
    low, high = wilson((bins["flipped"] * bins["n"]).to_numpy(), bins["n"].to_numpy())
    ax.plot([0, 1], [0, 1], **LINE)
    ax.vlines(bins["probability"], low, high, color=plots.COLOURS[0])
    ax.plot(bins["probability"], bins["flipped"], "o", color=plots.COLOURS[0], markersize=4)
    ax.set_xlabel(f"probability of a flip by {law}")
    ax.set_ylabel("fraction that flips")


def _residuals(ax: Axes, part: Any, law: str) -> None:
    groups = part.assign(rest=part["shift"] - part["predicted"]).groupby("relation_id")["rest"]
    found = [(name, clustered(rest.to_numpy())) for name, rest in groups if len(rest) > 1]
    found.sort(key=lambda one: one[1].value)
    _bars(ax, [(name, one.value, one.low, one.high) for name, one in found], 3)
    values = [one.value for _, one in found] or [0.0]  # no relation may have two facts
    ax.set_xlim(min(values) - 2, max(values) + 2)
    ax.set_xlabel(f"measured - predicted by {law} (nats)")


DRAWN = {
    "laws": _laws,
    "predicted": _predicted,
    "calibration": _calibration,
    "residuals": _residuals,
}
