"""The result of a memory fit: statistics of each matrix and of its controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import choice
from hijacklens.facts.fact import Skipped
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from probes.memory_fit.outer_products import STATISTICS

CONTROLS = ("shuffled", "rotated")
SITE = ["model", "layer", "head", "statistic"]
COLUMNS = (*SITE, "value", "control", "mean", "std", "z", "p", "p_family")
LABELS = {
    "cosine": "cosine to the memory",
    "span": "fraction of |W|² in the span",
    "recall": "recall (area under ROC)",
}
MOST_POINTS = 16
"""Up to this many matrices are drawn as points; more become a map over layer and head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFitSettings:
    """The settings of a memory fit, and a label and the counts of its associations."""

    associations: str
    pairs: int
    sources: int
    targets: int
    skipped: tuple[Skipped, ...]
    scaling: str
    draws: int
    """The number of draws of each control."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryFit(Result):
    """How much of the memory of given associations is in each matrix and in two controls."""

    table: Annotated[pd.DataFrame, Stored("memory_fit.parquet", columns=COLUMNS)]
    """A row per matrix, statistic and control: `model, layer, head` (a query head; both -1 for a
    matrix that was given as such), `statistic` (`cosine`, `span`, `recall`; see
    `probes.memory_fit.outer_products`), its `value`, `control` (`shuffled` associations, or
    `rotated`: random matrices with the same singular values), `mean` and `std` of the control's
    draws, `z`, the one-sided p-value `p`, and `p_family`, corrected for all matrices of the
    model."""
    settings: MemoryFitSettings
    provenance: Provenance
    derived: ClassVar = {"verdicts.csv": "verdicts"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return a copy of `table`."""
        return self.table.copy()

    def verdicts(self) -> pd.DataFrame:
        """Return a row per matrix and statistic, with the less favourable control.

        `model, layer, head, statistic, value, z` (the smaller one) and `p, p_family` (the larger
        ones): significance here is significance against both controls.
        """
        groups = self.table.groupby(SITE, sort=False)
        return groups.agg(
            value=("value", "first"), z=("z", "min"), p=("p", "max"), p_family=("p_family", "max")
        ).reset_index()

    def summary(self) -> pd.DataFrame:
        """Return a row per model and statistic, from the verdicts.

        `model, statistic, matrices`, the `mean` value over matrices; `layer, head, value, z, p,
        p_family` of the matrix with the largest z; the number of `significant` matrices (p_family
        < .05).
        """
        verdicts, keys = self.verdicts(), ["model", "statistic"]
        groups = verdicts.groupby(keys, sort=False)
        columns = [*keys, "layer", "head", "value", "z", "p", "p_family"]
        best = verdicts.loc[groups["z"].idxmax(), columns].set_index(keys)
        significant = (verdicts["p_family"] < 0.05).groupby([verdicts[k] for k in keys]).sum()
        best.insert(0, "matrices", groups.size())
        best.insert(1, "mean", groups["value"].mean())
        return best.assign(significant=significant).reset_index()

    def best(self, *, statistic: str = "recall", count: int = 10) -> pd.DataFrame:
        """Return the verdicts with the largest z of a statistic, the largest first.

        Raises:
            InputError: An unknown statistic.
        """
        choice("statistic", statistic, STATISTICS)
        verdicts = self.verdicts()
        rows = verdicts.loc[verdicts["statistic"] == statistic, :]
        return rows.sort_values("z", ascending=False).head(count).reset_index(drop=True)

    def plot(self) -> Figure:
        """Plot each matrix and its controls, a panel per statistic.

        Up to 16 matrices are points with the mean and two standard deviations of both controls.
        More become a map over layer and head of the smaller z-score, a row per model.
        """
        models = list(self.table["model"].unique())
        verdicts = self.verdicts()
        by_head = len(verdicts) > MOST_POINTS * len(STATISTICS) and (verdicts["layer"] >= 0).all()
        rows = len(models) if by_head else 1
        with plots.canvas(rows, len(STATISTICS), width=4.0, height=3.6) as (figure, axes):
            for i, ax in enumerate(axes):
                row, column = divmod(i, len(STATISTICS))
                statistic = STATISTICS[column]
                ax.set_title(LABELS[statistic], fontsize=10)
                if by_head:
                    of_model = verdicts["model"] == models[row]
                    _draw_map(ax, verdicts.loc[of_model & (verdicts["statistic"] == statistic), :])
                    name = plots.escape(models[row])
                    ax.set(xlabel="layer", ylabel="head" if column else f"{name}\nhead")
                else:
                    _draw_points(ax, self.table.loc[self.table["statistic"] == statistic, :])
                    ax.tick_params(labelleft=not column)
            title = f"{self.settings.associations} ({self.settings.pairs} pairs)"
            figure.suptitle(plots.escape(title), fontsize=11)
            plots.legend_below(figure, axes)
        return figure

    def glance(self) -> Glance:
        """The summary: the matrix with the largest z of each model and statistic."""
        rows = [
            row | {"best": "" if row["layer"] < 0 else f"{row['layer']:.0f}.{row['head']:.0f}"}
            for row in self.summary().to_dict("records")
        ]
        columns = {
            "model": "{model}",
            "statistic": "{statistic}",
            "mean": "{mean:.3f}",
            "best": "{best:>}",
            "its value": "{value:.3f}",
            "its z": "{z:.1f}",
            "significant": "{significant} of {matrices}",
        }
        return Glance(
            f"{self.settings.associations} ({self.settings.pairs} pairs)",
            (Grid.of(rows, columns),),
            steps=("summary()", "verdicts()", "best()", "plot()", "save(folder)"),
        )

    def findings(self) -> dict[str, Any]:
        """Return the summary."""
        return {"summary": self.summary().to_dict("records")}


def _draw_points(ax: Axes, rows: pd.DataFrame) -> None:
    first = rows.loc[rows["control"] == CONTROLS[0], :]
    y = np.arange(len(first))[::-1]
    styles = (("#999999", 0.16), (plots.COLOURS[5], -0.16))
    for control, (colour, shift) in zip(CONTROLS, styles, strict=True):
        drawn = rows[rows["control"] == control]
        look = {"fmt": "|", "ms": 7, "lw": 3, "color": colour, "label": f"{control}, ± 2 sd"}
        ax.errorbar(drawn["mean"], y + shift, xerr=2 * drawn["std"], **look)
    ax.plot(first["value"], y, "o", color=plots.COLOURS[1], ms=6, label="measured")
    labels = first["model"].astype(str)
    if not labels.is_unique:
        labels += " " + first["layer"].astype(str) + "." + first["head"].astype(str)
    ax.set_yticks(y, list(map(plots.escape, labels)), fontsize=9)
    ax.set_ylim(-0.7, len(first) - 0.3)


def _draw_map(ax: Axes, rows: pd.DataFrame) -> None:
    z = rows.pivot(index="head", columns="layer", values="z")
    values = z.to_numpy(dtype=float)
    limit = max(float(np.nanmax(np.abs(values))), 1.0)
    look: dict[str, Any] = {"origin": "lower", "interpolation": "nearest"}
    label = "smaller z of both controls (* p < .05)"
    plots.heat_map(ax, values, rows=z.index, columns=z.columns, label=label, limit=limit, **look)
    sure = rows[rows["p_family"] < 0.05]
    columns, lines = z.columns.get_indexer(sure["layer"]), z.index.get_indexer(sure["head"])
    ax.plot(columns, lines, "*", color="black", mec="white", mew=0.5, ms=8)
