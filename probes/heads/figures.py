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
    """Draw attribution by layer and head with the chosen heads framed, and the exact effects.

    Args:
        table: A row per head, as `HeadSearch.to_dataframe` gives it.
        attribution: Mean attribution, in logits.
        title: Model, facts, scheme and dose.
        axis: The name of the attribution.
    """
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
    table = items.assign(margin=efficacy.margin(items, rule))
    keys = ["ablation", "scheme", "case_id"]
    bare = table.loc[table["dose"] == 0, [*keys, "margin"]].rename(columns={"margin": "bare"})
    table = table.merge(bare, on=keys, validate="many_to_one")
    table = table.assign(
        efficacy=(table["margin"] > 0).astype(float),
        shift=table["margin"] - table["bare"],
        retention=(table["bare"] < 0).astype(float),
    )
    hijacked = table.loc[table["dose"] > 0]
    by_run = ["ablation", "scheme", "dose"]
    means = hijacked.groupby(by_run, sort=False)[["efficacy", "shift"]].mean().reset_index()
    means["run"] = means["scheme"] + "\ndose " + means["dose"].astype(str)
    once = table.loc[~table.duplicated(subset=["ablation", "case_id"])].assign(run="bare query")
    recall = once.groupby(["ablation", "run"], sort=False)[["retention"]].mean().reset_index()
    with plots.canvas(1, 3, width=4.4) as (figure, axes):
        _dots(axes[0], means, "efficacy", sets)
        _dots(axes[1], means, "shift", sets)
        _dots(axes[2], recall, "retention", sets)
        efficacy_label = f"efficacy: fraction with false > true\n(rule: {rule})"
        axes[0].set(ylabel=efficacy_label, ylim=(-0.02, 1.02))
        axes[1].set_ylabel("mean shift from the bare query (nats)")
        axes[1].axhline(0, color="#888888", linewidth=0.8)
        axes[2].set(ylabel="retention: fraction with true > false", ylim=(-0.02, 1.02))
        for ax, name in zip(axes, ("hijacked", "hijacked", "side effect on recall"), strict=True):
            ax.set_title(name, fontsize=9)
        axes[0].legend(fontsize=8, loc="best")
        figure.suptitle(title, fontsize=10)
    return figure


def _dots(ax: Axes, means: pd.DataFrame, column: str, sets: pd.DataFrame) -> None:
    """Draw a column of dots for every run: random sets in grey, no ablation and the set."""
    runs = list(dict.fromkeys(means["run"]))
    kinds = dict(zip(sets["ablation"], sets["kind"], strict=True))
    labels = {
        "layers": "random sets, same layers",
        "model": "random sets, any layer",
        "none": "no ablation",
        "chosen": "found heads ablated",
    }
    looks: dict[str, tuple[float, str, str, int]] = {
        "layers": (-0.16, "o", RANDOM, 4),
        "model": (0.16, "x", RANDOM, 4),
        "none": (0.0, "_", NO_ABLATION, 18),
        "chosen": (0.0, "D", SET, 7),
    }
    of_kind = means["ablation"].map(kinds)
    for kind, (offset, marker, colour, size) in looks.items():
        rows = means[of_kind == kind]
        if rows.empty:
            continue
        places = [runs.index(run) + offset for run in rows["run"]]
        style = {"marker": marker, "color": colour, "markersize": size, "label": labels[kind]}
        ax.plot(places, rows[column], linestyle="none", **style)
    ax.set_xticks(range(len(runs)), runs, fontsize=8)
    ax.set_xlim(-0.6, len(runs) - 0.4)
