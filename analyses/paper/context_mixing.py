"""Figures C.13 and C.14: contexts of two labels mixed at a rate, and contexts of any length.

C.13    fractions of answers with the first and the second label against the mixing rate: context
        hijacking in the one-layer model
C.14    accuracy against L

Both show the Bayes rule and the constructed model for comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, every, exact, highest, lowest, paired
from analyses.reproduction.drawing import FINE, draw_means, draw_panels, log2_axis, over_seeds
from analyses.reproduction.settings import (
    RECIPE_OURS,
    LengthSettings,
    TrainingSettings,
    best_rows,
    scales,
)
from analyses.reproduction.workbench import Workbench
from hijacklens.one_layer import memory
from hijacklens.one_layer.evaluation import BayesRule, answers, hits, rounding
from hijacklens.one_layer.model import OneLayerTransformer

WAYS = ("trained", "constructed", "Bayes")
"""The three ways of answering; entries of the column `way`."""
ANSWERED = {"first": "-", "second": "--", "other": ":"}
"""Columns of answers and their line styles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingSettings(TrainingSettings):
    """Settings of figure C.13."""

    d_model: int = 256
    length: int = 256
    rates: tuple[float, ...]
    contexts: int
    mix_last: bool = True


def mixed(settings: MixingSettings, bench: Workbench) -> pd.DataFrame:
    """Return the fractions that answer the first label, the second, and another one.

    There is a row per m, rate, way of answering and seed. `wins` is the fraction of contexts in
    which the second label has the higher score of the two; a tie, which equation 5.1 often gives on
    short contexts, counts one half.
    """
    rows = []
    for bits in settings.bits:
        task = settings.task(bits, settings.length)
        constructed = OneLayerTransformer.from_weights(memory.theorem_1(task))
        result = bench.trained(task, settings.recipe(settings.d_model))
        for seed, model in enumerate(result.best()):
            scorers = (answers(model, task), answers(constructed, task), BayesRule(task))
            for rate in settings.rates:
                draw = torch.Generator().manual_seed(100_000 * seed + round(1_000 * rate))
                contexts = task.sample_mixed(
                    settings.contexts, rate, draw, mix_last=settings.mix_last
                )
                for way, scores_of in zip(WAYS, scorers, strict=True):
                    scores = scores_of(contexts.tokens).detach()
                    first = float(hits(scores, contexts.first).mean())
                    second = float(hits(scores, contexts.second).mean())
                    pair = scores.gather(1, torch.stack([contexts.first, contexts.second], 1))
                    ahead = pair[:, 1] - pair[:, 0]
                    ahead = ahead.sign().masked_fill(ahead.abs() <= rounding(scores)[:, 0], 0)
                    rows.append(
                        {
                            "bits": bits,
                            "rate": rate,
                            "way": way,
                            "seed": seed,
                            "lr": result.best_learning_rate if way == "trained" else math.nan,
                            "first": first,
                            "second": second,
                            "other": 1 - first - second,
                            "wins": float((ahead.double().mean() + 1) / 2),
                        }
                    )
    return pd.DataFrame(rows)


def by_length(settings: LengthSettings, bench: Workbench) -> pd.DataFrame:
    """Return the accuracy of trained models and of the Bayes rule per m, L and seed."""
    names = {
        "accuracy": "trained",
        "bayes_accuracy": "bayes",
        "constructed_accuracy": "constructed",
    }
    recipe = settings.recipe(settings.d_model)
    rows = [
        {"bits": bits, "length": length, **row}
        for bits in settings.bits
        for length in settings.lengths
        for row in best_rows(bench.trained(settings.task(bits, length), recipe))
    ]
    return pd.DataFrame(rows).rename(columns=names)


def draw_mixed(table: pd.DataFrame, settings: MixingSettings) -> Figure:
    """Draw the fractions against the mixing rate in a panel per m.

    The dotted line is the fraction of trained models that answer neither label. The paper has bars;
    lines fit the three ways of answering into one panel.
    """

    def draw(panel: Axes, table: Any, bits: int) -> None:
        for i, way in enumerate(WAYS):
            by = table[table["way"] == way].groupby("rate")
            for column, style in ANSWERED.items():
                if column == "other" and way != "trained":
                    continue
                options: dict[str, Any] = {"marker": None} if column == "other" else {}
                label = way if column == "first" else None
                options |= {"markersize": 3.5, "linewidth": 1.2, "linestyle": style, "label": label}
                draw_means(panel, by[column], i, **options)
        for column, style in ANSWERED.items():
            label = "neither label (trained)" if column == "other" else f"{column} label"
            panel.plot([], [], style, color="black", linewidth=1.2, label=label)

    legend = over_seeds(settings)
    return draw_panels(table, draw, x="mixing rate", y="fraction of answers", legend=legend)


def draw_lengths(table: pd.DataFrame, settings: LengthSettings) -> Figure:
    """Draw accuracy against L in a panel per m: trained, constructed, and the Bayes rule."""

    def draw(panel: Axes, rows: Any, bits: int) -> None:
        for i, way in enumerate(WAYS):
            draw_means(panel, rows.groupby("length")[way.lower()], i, label=way, **FINE)
        log2_axis(panel, settings.lengths)
        panel.set_ylim(0, 1.02)

    legend = over_seeds(settings)
    return draw_panels(table, draw, x="context length L", y="accuracy", legend=legend)


MIXING_RATES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
MIXING_ANCHORS = {
    (5, "first"): (0.9997, 0.9883, 0.9341, 0.7618, 0.4509, 0.1710, 0.0384, 0.0046),
    (5, "second"): (0.0, 0.0046, 0.0373, 0.1688, 0.4500, 0.7575, 0.9326, 0.9878),
    (8, "first"): (0.9955, 0.9739, 0.9194, 0.7545, 0.4487, 0.1590, 0.0304, 0.0034),
    (8, "second"): (0.0, 0.0031, 0.0290, 0.1550, 0.4421, 0.7533, 0.9187, 0.9738),
}
"""(m, label) -> fraction of answers by the constructed model at each of `MIXING_RATES` and L = 256,
from 65,536 contexts (standard error at most .002): anchors 7.5, derived by us."""
BAYES_ANCHORS = {
    (bits, length): accuracy
    for bits, accuracies in {
        5: (0.7074, 0.9232, 0.9956, 1.0),
        6: (0.6872, 0.9223, 0.9963, 1.0),
        7: (0.6651, 0.9212, 0.9965, 1.0),
        8: (0.6472, 0.9150, 0.9963, 1.0),
    }.items()
    for length, accuracy in zip((32, 64, 128, 256), accuracies, strict=True)
}
"""(m, L) -> accuracy of the Bayes rule at omega = .5, beta = 1, from 131,072 contexts (standard
error at most .0014): anchors 7.2, derived by us."""


def _swing(table: Any) -> Any:
    """Return how much the second label's fraction grows from rate 0 to 1 in trained models."""
    trained = table[table.way == "trained"]
    return lowest(every(paired(trained, "second", ["bits", "seed"], rate=(1.0, 0.0)), "bits"))


def _apart(table: Any) -> Any:
    """Return the largest difference of trained from constructed models, at an m, rate and label."""
    gaps = [
        paired(table, label, ["bits", "rate", "seed"], way=("trained", "constructed"))
        for label in ("first", "second")
    ]
    signed = [sign * gap for gap in gaps for sign in (1, -1)]
    return highest([size for gap in signed for size in every(gap, ["bits", "rate"])])


def _mixing_gap(table: Any) -> Any:
    """Return the largest gap between the constructed model's mean fractions and an anchor."""
    rows = table[table.way == "constructed"].round({"rate": 6})
    means = rows.melt(["bits", "rate"], ["first", "second"], "label")
    anchors = {
        (*of, rate): anchor
        for of, fractions in MIXING_ANCHORS.items()
        for rate, anchor in zip(MIXING_RATES, fractions, strict=True)
    }
    return _gap(means.groupby(["bits", "label", "rate"]).value.mean(), anchors)


def _gap(means: Any, anchors: Any) -> Any:
    """Return the largest gap between a mean and its anchor, over the anchors that have one."""
    gaps = [abs(means[key] - anchor) for key, anchor in anchors.items() if key in means.index]
    return highest(list(map(exact, gaps)))


def _gain(table: Any) -> Any:
    """Return the accuracy at the longest L minus that at the shortest."""
    ends = (table.length.max(), table.length.min())
    return lowest(every(paired(table, "trained", ["bits", "seed"], length=ends), "bits"))


ANALYSES = (
    Analysis(
        id="figc13",
        settings=scales(
            MixingSettings(
                rates=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), contexts=8192
            ),
            bits=(5, 6),
            d_model=32,
            rates=(0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0),
            seeds=2,
            steps=1500,
            contexts=2048,
        ),
        ours=(*RECIPE_OURS, "d_model", "length", "rates", "contexts", "mix_last"),
        run=mixed,
        draw=draw_mixed,
        checks=(
            above(
                "the fraction of the second label grows by .9 from rate 0 to 1 for every m",
                _swing,
                0.9,
            ),
            below(
                "trained models answer each label as often as the constructed model at every m and "
                "rate, within .05 (largest difference)",
                _apart,
                0.05,
                scales=("full",),
                remark="compared at the sizes of the paper only",
                origin="own",
            ),
            below(
                "the constructed model matches the anchors of 7.5 at every m and rate that they "
                "cover (largest gap)",
                _mixing_gap,
                0.025,
                known_at={"omega": 0.5, "beta": 1.0, "length": 256, "mix_last": True},
                origin="identity",
            ),
        ),
    ),
    Analysis(
        id="figc14",
        settings=scales(
            LengthSettings(lengths=(16, 32, 64, 128, 256, 512)),
            bits=(5,),
            d_model=64,
            lengths=(16, 64, 256),
            seeds=3,
            steps=1500,
        ),
        ours=(*RECIPE_OURS, "d_model", "lengths"),
        run=by_length,
        draw=draw_lengths,
        checks=(
            above(
                "accuracy at the longest L exceeds that at the shortest by .3 for every m",
                _gain,
                0.3,
            ),
            below(
                "no model exceeds the Bayes rule beyond chance (largest trained - Bayes)",
                lambda t: exact((t.trained - t.bayes).max()),
                0.02,
                origin="identity",
            ),
            below(
                "the Bayes rule is as accurate as the anchors of 7.2 (largest gap)",
                lambda t: _gap(t.groupby(["bits", "length"]).bayes.mean(), BAYES_ANCHORS),
                0.015,
                known_at={"omega": 0.5, "beta": 1.0},
                origin="identity",
            ),
        ),
    ),
)
