"""Theorem 1 (7 in the appendix) and Lemma 2: the error of the constructed model.

The model has orthonormal embeddings, uniform attention and the memory of equation 5.1. Its error is
compared with Chernoff's bound, an exact statement at every L that replaces the constants of the
appendix, which we know from memory only. Its exponent is compared with the most that one token can
tell about the label (`analyses.paper.error_exponent`). Theorem 1 is about omega = 1; the figures
use omega = .5, so both are measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.paper.error_exponent import (
    chernoff_bound,
    chernoff_information,
    label_divergence,
    token_logits,
)
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, exact, highest, lowest, near
from analyses.reproduction.drawing import (
    WILSON,
    draw_errors,
    draw_intervals,
    draw_panels,
    intervals,
    log2_axis,
    sideways,
)
from analyses.reproduction.settings import scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.one_layer import evaluation, memory
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.statistics import Interval

ANCHORS = {
    (1.0, 5): {32: 0.9639, 64: 0.9992, 128: 1.0},
    (1.0, 6): {32: 0.9262, 64: 0.9961, 128: 1.0},
    (1.0, 7): {32: 0.8628, 64: 0.9863, 128: 0.9998},
    (1.0, 8): {32: 0.7806, 64: 0.9627, 128: 0.9991},
    (0.5, 5): {32: 0.5883, 64: 0.8393, 128: 0.9794, 256: 0.9997},
    (0.5, 6): {32: 0.5249, 64: 0.7960, 128: 0.9702, 256: 0.9994},
    (0.5, 7): {32: 0.4552, 64: 0.7402, 128: 0.9510, 256: 0.9985},
    (0.5, 8): {32: 0.3872, 64: 0.6704, 128: 0.9201, 256: 0.9956},
}
"""(omega, m) -> L -> accuracy of the constructed model at beta = 1 (reference page, 7.2)."""
ANCHOR_CONTEXTS = {1.0: 65_536, 0.5: 131_072}
"""omega -> number of contexts from which the anchors were measured."""
ANCHOR_ROUNDING = 5e-5
"""Rounding error of the anchors, which have four digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LemmaSettings:
    """Lemma 2: the constructed memory and the identity on the Hamming-1 support."""

    bits: tuple[int, ...] = (3, 5, 6, 7, 8)
    lengths: tuple[int, ...]
    contexts: int
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSettings(LemmaSettings):
    """Theorem 1: error of the constructed model against L."""

    omegas: tuple[float, ...] = (1.0, 0.5)
    """The theorem has 1, the figures .5."""
    beta: float = 1.0


def measured_error(
    model: OneLayerTransformer, task: ConceptTask, settings: Any, **options: Any
) -> dict[str, float]:
    """Return the error on fresh contexts with its interval: `error`, `error_low`, `error_high`.

    `settings` has the number of `contexts` and the `seed`; `options` are those of
    `evaluation.accuracy`, such as `ties`.
    """
    right = evaluation.accuracy(
        model.last_logits,
        task,
        contexts_count=settings.contexts,
        generator=torch.Generator().manual_seed(settings.seed),
        **options,
    )
    return {"error": 1 - right.value, "error_low": 1 - right.high, "error_high": 1 - right.low}


def error_by_length(settings: ErrorSettings, bench: Workbench) -> pd.DataFrame:
    """Return the measured error per omega, m and L, with the bounds that it is compared with.

    `bound`, `exponent`, `information` and `divergence` are defined in
    `analyses.paper.error_exponent`. `margin` is the margin of the logits at infinite L, from the
    model's matrices; `closed_margin` is its closed form.
    """
    rows = []
    for omega, bits in product(settings.omegas, settings.bits):
        task = ConceptTask(bits=bits, omega=omega, beta=settings.beta)
        model = OneLayerTransformer.from_weights(memory.theorem_1(task))
        bound = chernoff_bound(task, model)
        of_task = {
            "exponent": bound.exponent,
            "information": chernoff_information(task),
            "divergence": label_divergence(task),
            "margin": _margin(task, model),
            "closed_margin": memory.margin(memory.construction_logits(task)),
        }
        for length in settings.lengths:
            sized = ConceptTask(bits=bits, omega=omega, beta=settings.beta, length=length)
            rows.append(
                {
                    "omega": omega,
                    "bits": bits,
                    "length": length,
                    "contexts": settings.contexts,
                    **measured_error(model, sized, settings),
                    "bound": bound.at(length),
                    **of_task,
                }
            )
    return pd.DataFrame(rows)


def _margin(task: ConceptTask, model: OneLayerTransformer) -> float:
    """Return the smallest margin over labels of the model's logits at infinite L."""
    logits = task.token_distribution() @ token_logits(model)
    others = logits.clone().fill_diagonal_(-torch.inf).amax(1)
    return float((logits.diagonal() - others).min())


def draw_lengths(table: pd.DataFrame, settings: ErrorSettings) -> Figure:
    """Draw error against L on logarithmic axes in a panel per omega, with Chernoff's bound dashed.

    A measurement without any error is an arrow that hangs from the upper end of its interval. The
    bound is a sum of exponentials in L, so its logarithm is convex; between the lengths it is
    interpolated linearly in L, which is again a bound.
    """
    grid = np.geomspace(min(settings.lengths), max(settings.lengths), 200)

    def draw(panel: Axes, table: Any, omega: float) -> None:
        lines = ["  m  margin  exponent"]
        for i, (bits, rows) in enumerate(table.groupby("bits", sort=False)):
            colour, _ = plots.series(i)
            x = rows["length"] * 2 ** (0.1 * sideways(i, len(settings.bits)))
            draw_errors(panel, x, rows, i, label=f"m = {bits}")
            bound = np.exp(np.interp(grid, rows["length"], np.log(rows["bound"])))
            inside = bound < 1
            panel.plot(grid[inside], bound[inside], color=colour, linestyle="--", linewidth=1)
            first = rows.iloc[0]
            lines.append(f"{bits:3d}  {first.margin:6.3f}  {first.exponent:8.4f}")
        box = {"facecolor": "white", "edgecolor": "#BBBBBB", "linewidth": 0.6}
        style = {"transform": panel.transAxes, "family": "monospace", "fontsize": 7, "bbox": box}
        panel.text(0.03, 0.05, "\n".join(lines), **style)
        log2_axis(panel, settings.lengths)
        panel.set_yscale("log")
        panel.set_ylim(0.3 / settings.contexts, 1.2)
        panel.plot([], [], color="black", linestyle="--", linewidth=1, label="Chernoff's bound")

    return draw_panels(
        table,
        draw,
        x="context length L",
        y="error of the constructed model",
        legend={"bars": f"{WILSON}; arrows: no error seen; exponents in nats per token"},
        by="omega",
        title="$\\omega$ = {:g}",
        height=3.6,
    )


def lemma_errors(settings: LemmaSettings, bench: Workbench) -> pd.DataFrame:
    """Return the error of the constructed memory and of the identity, under both rules for ties."""
    rows = []
    for bits, length in product(settings.bits, settings.lengths):
        task = ConceptTask(bits=bits, omega=1.0, length=length, support="hamming-1")
        constructed = OneLayerTransformer.from_weights(memory.theorem_1(task))
        identity = constructed.with_value(memory.identity(task.vocab))
        models = {"constructed": constructed, "identity": identity}
        for (name, model), ties in product(models.items(), ("label", "split")):
            error = measured_error(model, task, settings, ties=ties)
            rows.append({"bits": bits, "length": length, "memory": name, "ties": ties, **error})
    return pd.DataFrame(rows)


def draw_lemma(table: pd.DataFrame, settings: LemmaSettings) -> Figure:
    """Draw error against L for both memories; filled: ties count for the label, hollow: split."""

    def draw(panel: Axes, table: Any, bits: int) -> None:
        for i, name in enumerate(("constructed", "identity")):
            for ties, style, size in (("label", "-", 3.5), ("split", ":", 6.5)):
                rows = _lemma(table, name, ties)
                draw_intervals(
                    panel,
                    rows["length"],
                    intervals(rows),
                    i,
                    linestyle=style,
                    linewidth=1.2,
                    markersize=size,
                    markerfacecolor=plots.series(i)[0] if ties == "label" else "none",
                    label=f"{name}, ties {'for the label' if ties == 'label' else 'split'}",
                )
        panel.set_xscale("log", base=2)

    legend = {"bars": WILSON, "columns": 2}
    return draw_panels(table, draw, x="context length L", y="error", legend=legend, height=2.2)


def lowest_error(rows: Any) -> Interval:
    """Return the error with the lowest lower end, which decides a claim from below."""
    return lowest(intervals(rows))


def highest_error(rows: Any) -> Interval:
    """Return the error with the highest upper end, which decides a claim from above."""
    return highest(intervals(rows))


def anchor_gap(table: Any) -> Interval:
    """Return the largest distance of an accuracy from its anchor, in standard errors of both."""
    gaps = []
    for row in table.itertuples():
        anchor = ANCHORS.get((row.omega, row.bits), {}).get(row.length)
        if anchor is not None:
            n, m = row.contexts, ANCHOR_CONTEXTS[row.omega]
            pooled = (n * (1 - row.error) + m * anchor) / (n + m)
            noise = pooled * (1 - pooled) * (1 / n + 1 / m) + ANCHOR_ROUNDING**2
            gaps.append(abs(1 - row.error - anchor) / noise**0.5)
    return highest(list(map(exact, gaps)))


def _fall(table: Any) -> Interval:
    """Return the smallest fall of the error from the shortest L to the longest, over omega and m.

    The interval combines the worst ends of both errors.
    """
    falls = []
    for _, rows in table.groupby(["omega", "bits"]):
        a, b = rows.loc[rows.length.idxmin()], rows.loc[rows.length.idxmax()]
        if a.length == b.length:
            continue
        ends = (a.error_low - b.error_high, a.error_high - b.error_low)
        falls.append(Interval(a.error - b.error, *ends))
    return lowest(falls)


def _excess(numbers: Any, bounds: Any) -> Interval:
    """Return the largest excess of a number over its bound; nothing exceeds an infinite bound."""
    return highest(list(map(exact, (numbers - bounds)[bounds != math.inf])))


def _lemma(table: Any, name: str, ties: str) -> Any:
    return table[(table.memory == name) & (table.ties == ties)]


ANALYSES = (
    Analysis(
        id="theorem1",
        settings=scales(
            ErrorSettings(lengths=(4, 8, 16, 32, 64, 128, 256, 512), contexts=131072),
            bits=(5, 7),
            lengths=(8, 32, 64, 128, 256, 512),
            contexts=8192,
        ),
        ours=("bits", "lengths", "contexts", "omegas", "beta", "seed"),
        run=error_by_length,
        draw=draw_lengths,
        checks=(
            below(
                "at the longest L the error is below .001 for every omega and m",
                lambda t: highest_error(t[t.length == t.length.max()]),
                1e-3,
                origin="paper",
            ),
            above(
                "the error falls from the shortest L to the longest for every omega and m",
                _fall,
                0.0,
                origin="paper",
            ),
            below(
                "no measured error exceeds Chernoff's bound beyond chance (largest ratio of an "
                "interval's lower end to the bound)",
                lambda t: exact((t.error_low / t.bound).max()),
                1.0,
            ),
            near(
                "at m = 5, omega = 1 the margin of the model's matrices is that of the closed form",
                lambda t: lowest(list(map(exact, t.query("bits == 5 and omega == 1").margin))),
                0.252,
                0.0005,
                known_at={"beta": 1.0},
            ),
            below(
                "no margin differs from its closed form",
                lambda t: exact((t.margin - t.closed_margin).abs().max()),
                1e-6,
            ),
            below(
                "the exponent is at most the Chernoff information: no rule beats it",
                lambda t: _excess(t.exponent, t.information),
                1e-6,
            ),
            below(
                "the Chernoff information is at most the Kullback-Leibler divergence",
                lambda t: _excess(t.information, t.divergence),
                1e-6,
            ),
            below(
                "every accuracy is within 4 standard errors of its anchor (all of 7.2 that the "
                "table covers; largest distance)",
                anchor_gap,
                4.0,
                known_at={"beta": 1.0},
            ),
        ),
    ),
    Analysis(
        id="lemma2",
        settings=scales(
            LemmaSettings(lengths=(1, 2, 4, 8, 16, 32, 64, 128), contexts=65536),
            bits=(3, 5),
            lengths=(1, 4, 16, 64),
            contexts=4096,
        ),
        ours=("bits", "lengths", "contexts", "seed"),
        run=lemma_errors,
        draw=draw_lemma,
        checks=(
            below(
                "the constructed memory has error 0 if ties count for the label",
                lambda t: exact(_lemma(t, "constructed", "label").error.max()),
                1e-12,
            ),
            above(
                "the identity has an error above 0 if ties count for the label",
                lambda t: lowest_error(_lemma(t, "identity", "label")),
                0.0,
            ),
            near(
                "the error of the identity is 1 under either rule for ties: a label never occurs "
                "in its own context (anchor 7.1; smallest error)",
                lambda t: exact(t[t.memory == "identity"].error.min()),
                1.0,
                1e-12,
            ),
            above(
                "if ties are split, the constructed memory errs at L = 1: the lemma needs a rule "
                "for ties",
                lambda t: lowest_error(_lemma(t, "constructed", "split").query("length == 1")),
                0.0,
            ),
        ),
    ),
)
