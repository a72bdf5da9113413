"""Figures C.13 and C.14: contexts of two labels mixed at a rate, and contexts of any length.

C.13    share that answers the first and the second label against the mixing rate: the one-layer
        picture of context hijacking
C.14    accuracy against L; both with the curve of the Bayes rule
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analyses.check import above, lowest, mean, near
from analyses.drawing import OVER_SEEDS
from analyses.registry import Analysis
from analyses.training_settings import TrainingSettings
from analyses.workbench import Workbench
from hijacklens import plots
from hijacklens.concepts import bayes, memory
from hijacklens.concepts.bayes import BayesRule
from hijacklens.concepts.evaluation import answers
from hijacklens.concepts.model import OneLayerTransformer
from hijacklens.concepts.task import ConceptTask

WAYS = ("trained", "constructed", "Bayes")
ANSWERED = {"first": "-", "second": "--", "other": ":"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingSettings(TrainingSettings):
    """Figure C.13."""

    dim: int
    length: int
    rates: tuple[float, ...]
    contexts: int
    mix_last: bool = True
    evaluation: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSettings(TrainingSettings):
    """Figure C.14."""

    dim: int
    lengths: tuple[int, ...]
    """Lengths that models are trained and evaluated at, each its own."""


def mixed(settings: MixingSettings, bench: Workbench) -> pd.DataFrame:
    """Shares answering the first label, the second, and another, per m, rate, way and seed."""
    rows = []
    for bits in settings.bits:
        task = settings.task(bits, settings.length)
        built = OneLayerTransformer.from_weights(memory.theorem_1(task))
        for seed, model in enumerate(_models(task, settings, bench)):
            ways: Mapping[str, Callable[[Tensor], Tensor]] = {
                "trained": answers(model, task),
                "constructed": answers(built, task),
                "Bayes": BayesRule(task),
            }
            for rate in settings.rates:
                draw = torch.Generator().manual_seed(1_000 * seed + round(1_000 * rate))
                contexts = task.sample_mixed(
                    settings.contexts, rate, draw, mix_last=settings.mix_last
                )
                for way, scores_of in ways.items():
                    scores = scores_of(contexts.tokens)
                    first = float(bayes.hits(scores, contexts.first).mean())
                    second = float(bayes.hits(scores, contexts.second).mean())
                    rows.append(
                        {
                            "bits": bits,
                            "rate": rate,
                            "way": way,
                            "seed": seed,
                            "first": first,
                            "second": second,
                            "other": 1 - first - second,
                        }
                    )
    return pd.DataFrame(rows)


def _models(task: ConceptTask, settings: Any, bench: Workbench) -> tuple[OneLayerTransformer, ...]:
    recipe = settings.recipe(settings.dim)
    return bench.trained(task, recipe).best()


def by_length(settings: LengthSettings, bench: Workbench) -> pd.DataFrame:
    """Accuracy of trained models and of the Bayes rule per m, L and seed."""
    rows = []
    for bits in settings.bits:
        for length in settings.lengths:
            task = settings.task(bits, length)
            recipe = settings.recipe(settings.dim)
            result = bench.trained(task, recipe)
            table: Any = result.summary()
            for row in table[table["lr"] == result.best_learning_rate].to_dict("records"):
                rows.append(
                    {
                        "bits": bits,
                        "length": length,
                        "seed": row["seed"],
                        "trained": row["accuracy"],
                        "bayes": row["bayes_accuracy"],
                        "constructed": row["constructed_accuracy"],
                    }
                )
    return pd.DataFrame(rows)


def draw_mixed(table: pd.DataFrame, settings: MixingSettings) -> Figure:
    """Shares against the mixing rate, a panel per m; dotted: trained models that answer neither.

    Lines in place of the paper's bars: three ways of answering stand in one panel.
    """
    with plots.panels(len(settings.bits), share_y=True) as (figure, axes):
        for panel, bits in zip(axes, settings.bits, strict=True):
            for i, way in enumerate(WAYS):
                rows = table[(table["bits"] == bits) & (table["way"] == way)]
                colour, marker = plots.series(i)
                for column, style in ANSWERED.items():
                    if column == "other" and way != "trained":
                        continue
                    by: Any = rows.groupby("rate")[column]
                    panel.errorbar(
                        by.mean().index,
                        by.mean(),
                        yerr=by.sem(),
                        color=colour,
                        marker=marker if column != "other" else None,
                        markersize=3.5,
                        linewidth=1.2,
                        linestyle=style,
                        capsize=2,
                        label=way if column == "first" else None,
                    )
            for column, style in ANSWERED.items():
                label = "neither label (trained)" if column == "other" else f"{column} label"
                panel.plot([], [], style, color="black", linewidth=1.2, label=label)
            panel.set_title(f"m = {bits}", fontsize=9)
        figure.supxlabel("mixing rate: share of tokens from the second label", fontsize=10)
        figure.supylabel("share of answers", fontsize=10)
        plots.legend_below(figure, axes, bars=OVER_SEEDS.format(settings.seeds))
        return figure


def draw_lengths(table: pd.DataFrame, settings: LengthSettings) -> Figure:
    """Accuracy against L, a panel per m: trained, constructed, and the Bayes rule."""
    with plots.panels(len(settings.bits), share_y=True) as (figure, axes):
        for panel, bits in zip(axes, settings.bits, strict=True):
            by: Any = table[table["bits"] == bits].groupby("length")
            for i, way in enumerate(WAYS):
                colour, marker = plots.series(i)
                accuracy = by[way.lower()].mean()
                panel.errorbar(
                    accuracy.index * 2 ** (0.14 * (i - 1)),
                    accuracy,
                    yerr=by[way.lower()].sem(),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.2,
                    capsize=2,
                    label=way,
                )
            panel.set_xscale("log", base=2)
            panel.set_ylim(0, 1.02)
            panel.set_xticks(settings.lengths, [str(length) for length in settings.lengths])
            panel.set_title(f"m = {bits}", fontsize=9)
        figure.supxlabel("context length L", fontsize=10)
        figure.supylabel("accuracy", fontsize=10)
        plots.legend_below(figure, axes, bars=OVER_SEEDS.format(settings.seeds))
        return figure


def _at(table: Any, way: str, rate: float) -> Any:
    return table[(table.way == way) & ((table.rate - rate).abs() < 1e-9)]


def _swing(table: Any) -> Any:
    """How much the share of the second label grows from rate 0 to 1 in trained models, per m."""
    start, end = (
        _at(table, "trained", rate).set_index(["bits", "seed"]).second for rate in (0.0, 1.0)
    )
    return lowest([mean(own) for _, own in (end - start).groupby("bits")])


def _anchor(table: Any, rate: float, column: str) -> Any:
    rows = _at(table, "constructed", rate)
    return mean(rows[rows.bits == 5][column])


def _gain(table: Any) -> Any:
    """Accuracy at the longest L minus that at the shortest, over seeds, per m."""
    wide = table.pivot(index=["bits", "seed"], columns="length", values="trained")
    gain = wide[table.length.max()] - wide[table.length.min()]
    return lowest([mean(own) for _, own in gain.groupby("bits")])


ANALYSES = (
    Analysis(
        id="figc13",
        settings={
            "quick": MixingSettings(
                bits=(5, 6),
                dim=32,
                length=256,
                rates=(0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0),
                seeds=2,
                steps=1500,
                contexts=2048,
                learning_rates=(0.01,),
            ),
            "paper": MixingSettings(
                bits=(5, 6, 7, 8),
                dim=256,
                length=256,
                rates=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
                seeds=5,
                steps=4000,
                contexts=8192,
            ),
        },
        ours=("dim", "length", "rates", "seeds", "steps", "contexts", "mix_last", "batch"),
        run=mixed,
        draw=draw_mixed,
        checks=(
            above(
                "the share of the second label grows by .9 from rate 0 to 1 for every m",
                _swing,
                0.9,
            ),
            near(
                "constructed model at m = 5, rate .2: share of the first label (anchor 7.5)",
                lambda t: _anchor(t, 0.2, "first"),
                0.9883,
                0.01,
            ),
            near(
                "constructed model at m = 5, rate .4: share of the first label (anchor 7.5)",
                lambda t: _anchor(t, 0.4, "first"),
                0.7618,
                0.025,
            ),
            near(
                "constructed model at m = 5, rate .4: share of the second label (anchor 7.5)",
                lambda t: _anchor(t, 0.4, "second"),
                0.1688,
                0.025,
            ),
        ),
    ),
    Analysis(
        id="figc14",
        settings={
            "quick": LengthSettings(
                bits=(5,),
                dim=64,
                lengths=(16, 64, 256),
                seeds=3,
                steps=1500,
                learning_rates=(0.01,),
            ),
            "paper": LengthSettings(
                bits=(5, 6, 7, 8),
                dim=256,
                lengths=(16, 32, 64, 128, 256, 512),
                seeds=5,
                steps=4000,
            ),
        },
        ours=("dim", "lengths", "seeds", "steps", "batch", "evaluation", "omega", "beta"),
        run=by_length,
        draw=draw_lengths,
        checks=(
            above(
                "accuracy at the longest L is above that at the shortest by .3 for every m",
                _gain,
                0.3,
            ),
            above(
                "no model is surely above the Bayes rule (least of Bayes - trained + .02)",
                lambda t: mean([(t.bayes - t.trained).min() + 0.02] * 2),
                0.0,
            ),
        ),
    ),
)
