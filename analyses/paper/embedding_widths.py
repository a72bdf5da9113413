"""Figure C.4: accuracy of trained against frozen embeddings as d crosses V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, lowest, mean
from analyses.reproduction.drawing import draw_over_widths
from analyses.reproduction.settings import RECIPE_OURS, TrainingSettings, best_rows
from analyses.reproduction.workbench import Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthSettings(TrainingSettings):
    """Figure C.4."""

    d_models: tuple[int, ...]
    length: int


def trained_against_frozen(settings: WidthSettings, bench: Workbench) -> pd.DataFrame:
    """Accuracy per m, d, condition and seed at the condition's better learning rate."""
    rows = []
    for bits in settings.bits:
        task = settings.task(bits, settings.length)
        for d_model in settings.d_models:
            for condition in ("trained", "frozen"):
                recipe = settings.recipe(
                    d_model,
                    freeze=("W_E",) if condition == "frozen" else (),
                )
                for row in best_rows(bench.trained(task, recipe)):
                    rows.append({"bits": bits, "dim": d_model, "condition": condition, **row})
    return pd.DataFrame(rows)


def draw_widths(table: pd.DataFrame, settings: WidthSettings) -> Figure:
    """Accuracy over d for trained and frozen embeddings, a panel per m; dotted: d = V."""
    return draw_over_widths(
        table,
        settings,
        column="condition",
        names={"trained": "trained $W_E$", "frozen": "$W_E$ frozen at its start"},
        value="accuracy",
        label="accuracy",
    )


def _paired(table: Any, d_model: Any) -> Any:
    """Trained minus frozen accuracy at one d, per m and seed."""
    wide = table[table.dim == d_model].pivot(
        index=["bits", "seed"], columns="condition", values="accuracy"
    )
    return wide["trained"] - wide["frozen"]


def _gain(table: Any, d_model: Any) -> list[Any]:
    """The same as one interval over seeds for each m."""
    return [mean(own) for _, own in _paired(table, d_model).groupby("bits")]


FIGURE_C4 = Analysis(
    id="figc4",
    settings={
        "quick": WidthSettings(
            bits=(5,),
            d_models=(8, 32, 128),
            length=256,
            seeds=3,
            steps=2000,
            learning_rates=(0.01,),
        ),
        "paper": WidthSettings(
            bits=(5, 6, 7, 8),
            d_models=(8, 16, 32, 64, 128, 256, 512),
            length=256,
            seeds=5,
            steps=4000,
        ),
    },
    ours=(*RECIPE_OURS, "d_models", "length"),
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
