"""The result of a memory fit: statistics of each matrix and of its controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

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
    """The settings of a memory fit, and the counts of its associations."""

    associations: str
    """A short description."""
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
        """Return the table: a row per matrix, statistic and control."""
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
        rows = []
        keys = ["model", "statistic"]
        for key, of in self.verdicts().groupby(keys, sort=False):
            best = of.loc[of["z"].idxmax()]
            rows.append(
                {
                    **dict(zip(keys, cast("tuple[str, str]", key), strict=True)),
                    "matrices": len(of),
                    "mean": of["value"].mean(),
                    **best[["layer", "head", "value", "z", "p", "p_family"]].to_dict(),
                    "significant": int((of["p_family"] < 0.05).sum()),
                }
            )
        return pd.DataFrame(rows)

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
                    drawn = verdicts.loc[of_model & (verdicts["statistic"] == statistic), :]
                    _draw_map(figure, ax, drawn)
                else:
                    _draw_points(ax, self.table.loc[self.table["statistic"] == statistic, :])
                if column and not by_head:
                    ax.tick_params(labelleft=False)
                if not column and by_head:
                    ax.set_ylabel(f"{models[row]}\nhead")
            title = f"{self.settings.associations} ({self.settings.pairs} pairs)"
            figure.suptitle(title, fontsize=11)
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
        ax.errorbar(
            drawn["mean"],
            y + shift,
            xerr=2 * drawn["std"],
            fmt="|",
            color=colour,
            ms=7,
            lw=3,
            label=f"{control}, ± 2 sd",
        )
    ax.plot(first["value"], y, "o", color=plots.COLOURS[1], ms=6, label="measured")
    alone = len(first) == first["model"].nunique()
    labels = [
        str(row.model) if alone else f"{row.model} {row.layer}.{row.head}"
        for row in first.itertuples()
    ]
    ax.set_yticks(y, labels, fontsize=9)
    ax.set_ylim(-0.7, len(first) - 0.3)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3,
              handletextpad=0.3, columnspacing=0.8)  # fmt: skip


def _draw_map(figure: Figure, ax: Axes, rows: pd.DataFrame) -> None:
    z = rows.pivot(index="head", columns="layer", values="z")
    values = z.to_numpy(dtype=float)
    most = max(float(np.nanmax(np.abs(values))), 1.0)
    image = ax.imshow(
        values,
        cmap="RdBu_r",
        vmin=-most,
        vmax=most,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    for axis, names in (("x", z.columns), ("y", z.index)):
        step = max(1, len(names) // 9)
        places = range(0, len(names), step)
        ax.set(**{f"{axis}ticks": places, f"{axis}ticklabels": [names[i] for i in places]})
    sure = rows[rows["p_family"] < 0.05]
    columns, lines = z.columns.get_indexer(sure["layer"]), z.index.get_indexer(sure["head"])
    ax.plot(columns, lines, "*", color="black", mec="white", mew=0.5, ms=8)
    ax.set(xlabel="layer", ylabel="head")
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label="smaller z of both controls (* p < .05)", shrink=0.95)
