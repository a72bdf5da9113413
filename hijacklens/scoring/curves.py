"""Efficacy against dose: the one way in which all figures of a hijack run draw it.

All tables are rows of `summary.csv` under one rule, for one set of facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.facts.fact import property_number
from hijacklens.facts.relations import relations
from hijacklens.results.exhibits import Drawing

MODELS_PER_FIGURE = 2
"""Models in one figure of a report if each has a panel; more panels would be too small."""
MEASURES = {
    "efficacy": ("efficacy: fraction with false > true", "95% Wilson", 0.5),
    "retention": ("retention: fraction with true > false", "95% Wilson", 0.5),
    "margin": ("mean margin, false - true (nats)", "95% t", 0.0),
}
"""Measure -> its name on the axis, its interval, and the value without a preference."""
BAND = "band: {}, these facts"
APART = 0.008
"""Distance of neighbouring lines, in axes: equal curves of several schemes hide nothing."""
COLUMNS = 6
PANEL = (1.9, 1.7)
"""Size of the panel of a relation, in inches."""
WIDEST = 30
"""Characters of a relation's label that fit above a panel."""


def dose_curves(
    ax: Axes,
    table: pd.DataFrame,
    *,
    line: str,
    labels: Mapping[str, str],
    measure: str = "efficacy",
    small: bool = False,
) -> None:
    """Draw a measure against dose with 95% intervals, a line for each name.

    Args:
        ax: Where to draw.
        table: The rows of one relation.
        line: The column whose values are lines: `model` or `scheme`.
        labels: All values of that column in the figure, so that a name keeps its colour, with
            their labels in the legend.
        measure: One of `MEASURES`; the table has its ends, `_low` and `_high`, too.
        small: Draw thin lines.
    """
    for i, (name, label) in enumerate(labels.items()):
        rows: Any = table[table[line] == name]
        if rows.empty:
            continue
        style: Any = plots.line(i) | ({"markersize": 3.5, "linewidth": 1.2} if small else {})
        doses = rows["dose"] + APART * (i - (len(labels) - 1) / 2) * table["dose"].max()
        ax.plot(doses, rows[measure], label=plots.escape(label), **style)
        ends = rows[[f"{measure}_low", f"{measure}_high"]].replace([-math.inf, math.inf], math.nan)
        ax.fill_between(doses, *ends.to_numpy().T, color=style["color"], alpha=0.15, linewidth=0)
    ax.axhline(MEASURES[measure][2], color="#888888", linewidth=0.8, linestyle=":")
    if measure != "margin":
        ax.set_ylim(-0.03, 1.03)


def curves(
    table: pd.DataFrame, rule: str, measure: str = "efficacy", *, probes: Sequence[str] = ()
) -> Figure:
    """Draw a panel per model with a line per scheme, or one panel if there is one scheme."""
    panel, line = ("model", "scheme") if table["scheme"].nunique() > 1 else ("scheme", "model")
    panels = list(table[panel].unique())
    counts: Any = table.groupby(line, sort=False)["n"].unique()
    labels = {name: f"{name} (n = {', '.join(map(str, n))})" for name, n in counts.items()}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with plots.canvas(rows, columns, share_y=True) as (figure, axes):
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        axes = axes[: len(panels)]
        for ax, title in zip(axes, panels, strict=True):
            dose_curves(
                ax, table.loc[table[panel] == title], line=line, labels=labels, measure=measure
            )
            ax.set_title(plots.escape(title))
            ax.set_xticks(sorted(table["dose"].unique()))
            ax.yaxis.label.set_fontsize(9)
        name, interval, _ = MEASURES[measure]
        said = f"{name}\n(rule: {rule}; {BAND.format(interval)})"
        plots.label_outer(axes, x="dose (hijacking sentences)", y=said)
        plots.legend_below(figure, axes)
        say_probes(figure, probes)
    return figure


def say_probes(figure: Figure, probes: Sequence[str]) -> None:
    """Say above a figure which probes changed the models."""
    for line in _changed(probes):
        figure.suptitle(plots.escape(line), fontsize=9)


def _changed(probes: Sequence[str]) -> list[str]:
    return [f"with {', '.join(probes)}"] if probes else []


def relation_curves(table: pd.DataFrame, rule: str, *, probes: Sequence[str] = ()) -> Figure:
    """Draw a small panel for each relation, in the order of the property numbers."""
    ids = sorted(table["relation"].unique(), key=property_number)
    names = {name: name for name in table["model"].unique()}
    columns = min(COLUMNS, len(ids))
    scale = 2 if len(ids) == 1 else 1
    width, height = (scale * inches for inches in PANEL)
    rows = math.ceil(len(ids) / columns)
    with plots.canvas(rows, columns, width=width, height=height, share_y=True) as (figure, axes):
        for ax, relation in zip(axes, ids, strict=False):
            of_relation = table.loc[table["relation"] == relation]
            dose_curves(ax, of_relation, line="model", labels=names, small=True)
            known = relations().get(relation)
            label = f"\n{shorten(known.label, WIDEST, placeholder=' …')}" if known else ""
            title = f"{relation}, n = {of_relation['n'].max():,}{label}"
            ax.set_title(plots.escape(title), fontsize=7.5)
            ax.set_xticks(sorted(table["dose"].unique()))
            ax.tick_params(labelsize=7)
        for ax in axes[len(ids) :]:
            ax.set_axis_off()
        plots.label_outer(axes[: len(ids)], x="dose", y="efficacy")
        if len(names) > 1:
            plots.legend_below(figure, axes)
        name, interval, _ = MEASURES["efficacy"]
        of = " · ".join([*(names if len(names) == 1 else ()), *table["scheme"].unique()])
        title = f"{of}\n{name} (rule: {rule}; {BAND.format(interval)})"
        figure.suptitle(plots.escape("\n".join([title, *_changed(probes)])), fontsize=9)
    return figure


def drawings(
    summaries: Mapping[str, pd.DataFrame], *, probes: Sequence[str] = ()
) -> Iterator[Drawing]:
    """Yield the curves under each rule, a few models at a time; only the first rule is unfolded."""
    for rule, table in summaries.items():
        models = list(table["model"].unique())
        count = len(models) if table["scheme"].nunique() == 1 else MODELS_PER_FIGURE
        for start in range(0, len(models), count):
            names = models[start : start + count]
            part: Any = table[table["model"].isin(names)]
            yield Drawing(
                f"Efficacy by dose, rule {rule}"
                + (f" ({', '.join(names)})" if len(models) > count else ""),
                curves(part, rule, probes=probes),
                alt=_in_words(part, rule, probes),
                folded=rule != next(iter(summaries)),
            )


def _in_words(summary: pd.DataFrame, rule: str, probes: Sequence[str]) -> str:
    """Describe the curves by the efficacy at the lowest and the highest dose."""
    lines = []
    ordered: Any = summary.sort_values("dose", kind="stable")
    for (model, scheme), rows in ordered.groupby(["model", "scheme"], sort=False):
        words = [f"{rows['efficacy'].iloc[i]:.3f} at dose {rows['dose'].iloc[i]}" for i in (0, -1)]
        lines.append(f"{model}, {scheme}: {' to '.join(dict.fromkeys(words))}")
    return (
        f"{', '.join(['Curves of efficacy', *_changed(probes)])} (rule {rule}) against dose with "
        f"95% intervals. {'; '.join(lines)}. The table below has all values."
    )
