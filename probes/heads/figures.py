"""The figures of a search for heads and of its held-out test."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hijacklens import plots
from hijacklens.scoring import efficacy

MOST_BARS = 24
"""At most this many ablated heads are drawn, those with the largest effects."""
NO_ABLATION, SET, RANDOM = "#000000", plots.COLOURS[1], "#9A9A9A"


def search_figure(
    table: pd.DataFrame, attribution: Float[np.ndarray, "layer head"], *, title: str, axis: str
) -> Figure:
    """Draw mean attribution with the chosen heads framed, and the exact effects of `table`."""
    tested = table.dropna(subset="carried").sort_values("carried", ascending=False)
    with plots.canvas(1, 2, width=5.6, height=max(3.6, 0.15 * len(attribution))) as (figure, axes):
        layers, heads = map(range, attribution.shape)
        label = f"{axis} (logits)"
        plots.heat_map(axes[0], attribution, rows=layers, columns=heads, label=label, cmap="PuOr_r")
        for layer, head in table.loc[table["chosen"], ["layer", "head"]].to_numpy():
            frame = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, linewidth=1.6)
            axes[0].add_patch(frame)
        axes[0].set(xlabel="head", ylabel="layer")
        axes[0].set_title("attribution; chosen heads framed", fontsize=9)
        _bars(axes[1], tested.head(MOST_BARS), axis)
        figure.suptitle(title, fontsize=10)
    return figure


def _bars(ax: Axes, rows: pd.DataFrame, axis: str) -> None:
    places = np.arange(len(rows))
    colours = [SET if chosen else "#C8C8C8" for chosen in rows["chosen"]]
    finite = rows[["low", "high"]].replace([-np.inf, np.inf], np.nan)
    ends = np.stack([rows["carried"] - finite["low"], finite["high"] - rows["carried"]])
    ax.barh(places, rows["carried"], color=colours, height=0.75)
    ax.errorbar(
        rows["carried"], places, xerr=ends, fmt="none", ecolor="#444444", elinewidth=0.9, capsize=2
    )
    ax.plot(rows["attribution"], places, "D", color=plots.COLOURS[0], ms=4, label=axis)
    names = [f"{layer}.{head}" for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    ax.set_yticks(places, names, fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="#444444", linewidth=0.8)
    ax.set(
        xlabel="shift carried by the head (logits, 95% interval)",
        ylabel="layer.head",
        title="ablated one by one; chosen heads coloured",
    )
    ax.title.set_fontsize(9)
    ax.legend(fontsize=8, loc="best")


def held_out_figure(
    items: pd.DataFrame, sets: pd.DataFrame, *, rule: efficacy.Rule, title: str
) -> Figure:
    """Draw efficacy and shift by scheme and dose, and bare retention, under every ablation."""
    margin = efficacy.margin(items, rule)
    groups = items.assign(bare=margin.where(items["dose"] == 0)).groupby(
        ["ablation", "scheme", "case_id"]
    )
    bare = groups["bare"].transform("first")
    table = items.assign(efficacy=margin > 0, shift=margin - bare, retention=bare < 0)
    hijacked = table.loc[table["dose"] > 0]
    by_run = ["ablation", "scheme", "dose"]
    means = hijacked.groupby(by_run, sort=False)[["efficacy", "shift"]].mean().reset_index()
    means["run"] = means["scheme"] + "\ndose " + means["dose"].astype(str)
    once = table.loc[~table.duplicated(subset=["ablation", "case_id"])].assign(run="bare query")
    recall = once.groupby(["ablation", "run"], sort=False)[["retention"]].mean().reset_index()
    with plots.canvas(1, 3, width=4.4) as (figure, axes):
        for ax, rows, column, label, name in (
            (axes[0], means, "efficacy", f"fraction with false > true\n(rule: {rule})", "hijacked"),
            (axes[1], means, "shift", "mean, from the bare query (nats)", "hijacked"),
            (axes[2], recall, "retention", "fraction with true > false", "side effect on recall"),
        ):
            _dots(ax, rows, column, sets)
            ax.set_ylabel(f"{column}: {label}")
            ax.set_title(name, fontsize=9)
            if column != "shift":
                ax.set_ylim(-0.02, 1.02)
        axes[1].axhline(0, color="#888888", linewidth=0.8)
        axes[0].legend(fontsize=8, loc="best")
        figure.suptitle(title, fontsize=10)
    return figure


def _dots(ax: Axes, means: pd.DataFrame, column: str, sets: pd.DataFrame) -> None:
    """Draw a column of dots for every run: random sets in grey, no ablation and the set."""
    runs = list(dict.fromkeys(means["run"]))
    kinds = dict(zip(sets["ablation"], sets["kind"], strict=True))
    looks: dict[str, tuple[str, float, str, str, int]] = {
        "layers": ("random sets, same layers", -0.16, "o", RANDOM, 4),
        "model": ("random sets, any layer", 0.16, "x", RANDOM, 4),
        "none": ("no ablation", 0.0, "_", NO_ABLATION, 18),
        "chosen": ("found heads ablated", 0.0, "D", SET, 7),
    }
    of_kind = means["ablation"].map(kinds)
    for kind, (label, offset, marker, colour, size) in looks.items():
        rows = means[of_kind == kind]
        if len(rows):
            places = [runs.index(run) + offset for run in rows["run"]]
            style = {"marker": marker, "color": colour, "markersize": size, "label": label}
            ax.plot(places, rows[column], linestyle="none", **style)
    ax.set_xticks(range(len(runs)), runs, fontsize=8)
    ax.set_xlim(-0.6, len(runs) - 0.4)
