"""Figure C.4: accuracy of trained against frozen embeddings as d crosses V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, lowest, mean
from analyses.reproduction.drawing import draw_over_dims
from analyses.reproduction.settings import RECIPE_OURS, TrainingSettings, best_rows
from analyses.reproduction.workbench import Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthSettings(TrainingSettings):
    """Figure C.4."""

    dims: tuple[int, ...]
    length: int


def trained_against_frozen(settings: WidthSettings, bench: Workbench) -> pd.DataFrame:
    """Accuracy per m, d, condition and seed at the condition's better learning rate."""
    rows = []
    for bits in settings.bits:
        task = settings.task(bits, settings.length)
        for dim in settings.dims:
            for condition in ("trained", "frozen"):
                recipe = settings.recipe(
                    dim,
                    freeze=("W_E",) if condition == "frozen" else (),
                )
                for row in best_rows(bench.trained(task, recipe)):
                    rows.append({"bits": bits, "dim": dim, "condition": condition, **row})
    return pd.DataFrame(rows)


def draw_widths(table: pd.DataFrame, settings: WidthSettings) -> Figure:
    """Accuracy over d for trained and frozen embeddings, a panel per m; dotted: d = V."""
    return draw_over_dims(
        table,
        settings,
        column="condition",
        names={"trained": "trained $W_E$", "frozen": "$W_E$ frozen at its start"},
        value="accuracy",
        label="accuracy",
    )


def _paired(table: Any, dim: Any) -> Any:
    """Trained minus frozen accuracy at one d, per m and seed."""
    wide = table[table.dim == dim].pivot(
        index=["bits", "seed"], columns="condition", values="accuracy"
    )
    return wide["trained"] - wide["frozen"]


def _gain(table: Any, dim: Any) -> list[Any]:
    """The same as one interval over seeds for each m."""
    return [mean(own) for _, own in _paired(table, dim).groupby("bits")]


FIGURE_C4 = Analysis(
    id="figc4",
    settings={
        "quick": WidthSettings(
            bits=(5,),
            dims=(8, 32, 128),
            length=256,
            seeds=3,
            steps=2000,
            learning_rates=(0.01,),
        ),
        "paper": WidthSettings(
            bits=(5, 6, 7, 8),
            dims=(8, 16, 32, 64, 128, 256, 512),
            length=256,
            seeds=5,
            steps=4000,
        ),
    },
    ours=(*RECIPE_OURS, "dims", "length"),
    run=trained_against_frozen,
    draw=draw_widths,
    checks=(
        above(
            "trained embeddings gain more than .1 at the smallest d for every m",
            lambda t: lowest(_gain(t, t.dim.min())),
            0.1,
        ),
        above(
            "at the largest d, above V, the gain is under a quarter of that, on average over m",
            lambda t: mean(_paired(t, t.dim.min()) - 4 * _paired(t, t.dim.max())),
            0.0,
        ),
    ),
)
