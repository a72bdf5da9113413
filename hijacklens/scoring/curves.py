"""Efficacy against dose, a small panel for each relation: where a pooled curve comes from."""

from __future__ import annotations

import math
from textwrap import shorten

import pandas as pd
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.facts.relations import relations

COLUMNS = 6
PANEL = (1.9, 1.7)
"""Inches."""
WIDEST = 30
"""Characters of a relation's label that fit above a panel."""


def relation_curves(table: pd.DataFrame, line: str = "model") -> Figure:
    """Draw a panel for each relation, in the order of the property numbers.

    Args:
        table: Rows of `summary.csv` under one rule, for all facts; `relation` is not `all`.
        line: The column whose values are lines: `model` or `scheme`.
    """
    shown = sorted(table["relation"].unique(), key=_number)
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    names = list(table[line].unique())
    width, height = PANEL
    if len(shown) == 1:
        width, height = 2 * width, 2 * height
    with plots.canvas(rows, columns, width=width, height=height, share_y=True) as (figure, axes):
        for ax, relation in zip(axes, shown, strict=False):
            own = table[table["relation"] == relation]
            for i, name in enumerate(names):
                curve = own[own[line] == name]
                colour, marker = plots.series(i)
                ax.plot(
                    curve["dose"],
                    curve["efficacy"],
                    color=colour,
                    marker=marker,
                    markersize=3.5,
                    linewidth=1.2,
                    label=name,
                )
                ax.fill_between(
                    curve["dose"],
                    curve["efficacy_low"],
                    curve["efficacy_high"],
                    color=colour,
                    alpha=0.2,
                    linewidth=0,
                )
            ax.axhline(0.5, color="#888888", linewidth=0.7, linestyle=":")
            known = relations().get(relation)
            label = f"\n{shorten(known.label, WIDEST, placeholder=' …')}" if known else ""
            ax.set_title(f"{relation}, n = {own['n'].max():,}{label}", fontsize=7.5)
            ax.set(ylim=(-0.04, 1.04), xticks=sorted(table["dose"].unique()))
            ax.tick_params(labelsize=7)
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        figure.supxlabel("dose (hijacking sentences)", fontsize=9)
        figure.supylabel("efficacy: share with false > true (95% interval)", fontsize=9)
        if len(names) > 1:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(
                handles, labels, loc="outside upper center", ncols=min(len(names), 4), fontsize=8
            )
    return figure


def _number(relation: str) -> tuple[int, str]:
    digits = relation.removeprefix("P")
    return (int(digits) if digits.isdecimal() else 0, relation)
