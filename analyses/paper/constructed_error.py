"""Theorem 1 (7 in the appendix) and Lemma 2: the constructed model, measured.

The model has orthonormal embeddings, uniform attention and the memory of equation 5.1. Its error is
held against Chernoff's bound, an exact statement at every L where the appendix has constants that
we know from memory only, and its exponent against what one token tells at most
(`analyses.paper.error_exponent`). Theorem 1 is about omega = 1; omega = .5, the setting of the
figures, stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from analyses.paper.error_exponent import (
    chernoff_bound,
    chernoff_information,
    label_divergence,
    token_logits,
)
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, exact, highest, lowest, near
from analyses.reproduction.drawing import draw_errors, intervals
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
"""omega -> how many contexts the anchors were measured on."""
ANCHOR_ROUNDING = 5e-5
"""The anchors have four digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSettings:
    """Theorem 1: error of the constructed model against L."""

    bits: tuple[int, ...]
    lengths: tuple[int, ...]
    contexts: int
    omegas: tuple[float, ...] = (1.0, 0.5)
    """1 is the theorem's; .5 is that of the figures."""
    beta: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LemmaSettings:
    """Lemma 2: the constructed memory and the identity on the Hamming-1 support."""

    bits: tuple[int, ...]
    lengths: tuple[int, ...]
    contexts: int
    seed: int = 0


def error_by_length(settings: ErrorSettings, bench: Workbench) -> pd.DataFrame:
    """Measured error with its interval, and what it is held against, per omega, m and L.

    `bound`, `exponent`, `information` and `divergence` are those of
    `analyses.paper.error_exponent`; `margin` is that of the logits at infinite L, by the model's
    own matrices and in closed form.
    """
    rows = []
    for omega in settings.omegas:
        for bits in settings.bits:
            task = ConceptTask(bits=bits, omega=omega, beta=settings.beta)
            model = OneLayerTransformer.from_weights(memory.theorem_1(task))
            bound = chernoff_bound(task, model)
            information, apart = chernoff_information(task), label_divergence(task)
            for length in settings.lengths:
                sized = ConceptTask(bits=bits, omega=omega, beta=settings.beta, length=length)
                right = evaluation.accuracy(
                    model.last_logits,
                    sized,
                    contexts_count=settings.contexts,
                    generator=torch.Generator().manual_seed(settings.seed),
                )
                rows.append(
                    {
                        "omega": omega,
                        "bits": bits,
                        "length": length,
                        "contexts": settings.contexts,
                        "error": 1 - right.value,
                        "error_low": 1 - right.high,
                        "error_high": 1 - right.low,
                        "bound": bound.at(length),
                        "exponent": bound.exponent,
                        "information": information,
                        "divergence": apart,
                        "margin": _margin(task, model),
                        "closed_margin": memory.margin(memory.construction_logits(task)),
                    }
                )
    return pd.DataFrame(rows)


def _margin(task: ConceptTask, model: OneLayerTransformer) -> float:
    """The smallest margin over labels of the logits at infinite L, by the model's own matrices."""
    logits = task.token_distribution() @ token_logits(model)
    own = logits.diagonal()
    others = logits.clone().fill_diagonal_(-torch.inf).amax(1)
    return float((own - others).min())


def draw_lengths(table: pd.DataFrame, settings: ErrorSettings) -> Figure:
    """Error against L on logarithmic axes, with Chernoff's bound dashed, per m; a panel per omega.

    Where no context was answered wrongly, an arrow hangs from the upper end of the interval. The
    bound is a sum of exponentials in L, so its logarithm is convex: between the lengths it is drawn
    straight in L, which is a bound, too.
    """
    grid = np.geomspace(min(settings.lengths), max(settings.lengths), 200)
    with plots.panels(len(settings.omegas), height=3.6, share_y=True) as (figure, axes):
        for panel, omega in zip(axes, settings.omegas, strict=True):
            told = ["  m  margin  exponent"]
            for i, bits in enumerate(settings.bits):
                own = (table["omega"] == omega) & (table["bits"] == bits)
                rows: Any = table[own]
                colour, _ = plots.series(i)
                place = rows["length"] * 2 ** (0.1 * (i - (len(settings.bits) - 1) / 2))
                draw_errors(panel, place, rows, i=i, label=f"m = {bits}")
                bound = np.exp(np.interp(grid, rows["length"], np.log(rows["bound"])))
                inside = bound < 1
                panel.plot(grid[inside], bound[inside], color=colour, linestyle="--", linewidth=1)
                first = rows.iloc[0]
                told.append(f"{bits:3d}  {first.margin:6.3f}  {first.exponent:8.4f}")
            panel.text(
                0.03,
                0.05,
                "\n".join(told),
                transform=panel.transAxes,
                family="monospace",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "#BBBBBB", "linewidth": 0.6},
            )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_ylim(0.3 / settings.contexts, 1.2)
            panel.set_xticks(settings.lengths, [str(length) for length in settings.lengths])
            panel.set_title(f"$\\omega$ = {omega:g}", fontsize=9)
            panel.plot([], [], color="black", linestyle="--", linewidth=1, label="Chernoff's bound")
        plots.label_outer(axes, x="context length L", y="error of the constructed model")
        bars = "95% Wilson intervals; arrows: no error seen; exponents in nats per token"
        plots.legend_below(figure, axes, bars=bars)
        return figure


def lemma_errors(settings: LemmaSettings, bench: Workbench) -> pd.DataFrame:
    """Error of the constructed memory and of the identity, under both rules for ties."""
    rows = []
    for bits in settings.bits:
        for length in settings.lengths:
            task = ConceptTask(bits=bits, omega=1.0, length=length, support="hamming-1")
            built = OneLayerTransformer.from_weights(memory.theorem_1(task))
            plain = built.with_value(memory.identity(task.vocab))
            for name, model in (("constructed", built), ("identity", plain)):
                for ties in ("label", "split"):
                    right = evaluation.accuracy(
                        model.last_logits,
                        task,
                        contexts_count=settings.contexts,
                        generator=torch.Generator().manual_seed(settings.seed),
                        ties=ties,
                    )
                    rows.append(
                        {
                            "bits": bits,
                            "length": length,
                            "memory": name,
                            "ties": ties,
                            "error": 1 - right.value,
                            "error_low": 1 - right.high,
                            "error_high": 1 - right.low,
                        }
                    )
    return pd.DataFrame(rows)


def draw_lemma(table: pd.DataFrame, settings: LemmaSettings) -> Figure:
    """Error against L for both memories; ties split evenly hollow, counted for the label solid."""
    with plots.panels(len(settings.bits), height=2.2, share_y=True) as (figure, axes):
        for panel, bits in zip(axes, settings.bits, strict=True):
            for i, name in enumerate(("constructed", "identity")):
                colour, marker = plots.series(i)
                for ties, style, size in (("label", "-", 3.5), ("split", ":", 6.5)):
                    rows: Any = table.query("bits == @bits and memory == @name and ties == @ties")
                    panel.errorbar(
                        rows["length"],
                        rows["error"],
                        yerr=plots.whiskers(intervals(rows)),
                        linestyle=style,
                        linewidth=1.2,
                        color=colour,
                        marker=marker,
                        markersize=size,
                        markerfacecolor=colour if ties == "label" else "none",
                        label=f"{name}, ties {'for the label' if ties == 'label' else 'split'}",
                    )
            panel.set_xscale("log", base=2)
            panel.set_title(f"m = {bits}", fontsize=9)
        plots.label_outer(axes, x="context length L", y="error")
        plots.legend_below(figure, axes, bars="95% Wilson intervals", columns=2)
        return figure


NOTHING = Interval(math.nan, math.nan, math.nan)
"""What a claim about rows that are not there rests on: it does not pass."""


def lowest_error(rows: Any) -> Interval:
    """Of the errors in the rows of a table, the one that a claim from below rests on."""
    return lowest(intervals(rows)) if len(rows) else NOTHING


def highest_error(rows: Any) -> Interval:
    """Of the errors in the rows of a table, the one that a claim from above rests on."""
    return highest(intervals(rows)) if len(rows) else NOTHING


def _measured(table: Any, bits: int, length: int) -> Interval:
    """The accuracy at omega = 1."""
    rows = table[(table.omega == 1) & (table.bits == bits) & (table.length == length)]
    found = highest_error(rows)
    return Interval(1 - found.value, 1 - found.high, 1 - found.low)


def _anchor_gap(table: Any) -> Interval:
    """Of all rows with an anchor, the largest gap to it in standard errors of both together."""
    gaps = []
    for row in table.itertuples():
        anchor = ANCHORS.get((row.omega, row.bits), {}).get(row.length)
        if anchor is not None:
            n, m = row.contexts, ANCHOR_CONTEXTS[row.omega]
            pooled = (n * (1 - row.error) + m * anchor) / (n + m)
            noise = pooled * (1 - pooled) * (1 / n + 1 / m) + ANCHOR_ROUNDING**2
            gaps.append(abs(1 - row.error - anchor) / noise**0.5)
    return exact(max(gaps, default=math.nan))


def _fall(table: Any) -> Interval:
    """The least, over omega and m, of how much the error falls from the shortest L to the longest.

    The interval takes both ends at their worst.
    """
    falls = []
    for _, rows in table.groupby(["omega", "bits"]):
        a, b = rows.loc[rows.length.idxmin()], rows.loc[rows.length.idxmax()]
        ends = (a.error_low - b.error_high, a.error_high - b.error_low)
        falls.append(Interval(a.error - b.error, *ends))
    return lowest(falls)


def _last_error(table: Any) -> Interval:
    return highest_error(table[table.length == table.length.max()])


def _lemma(table: Any, name: str, ties: str) -> Any:
    return table[(table.memory == name) & (table.ties == ties)]


ANALYSES = (
    Analysis(
        id="theorem1",
        settings={
            "quick": ErrorSettings(bits=(5, 7), lengths=(8, 32, 64, 128, 256, 512), contexts=8192),
            "paper": ErrorSettings(
                bits=(3, 5, 6, 7, 8), lengths=(4, 8, 16, 32, 64, 128, 256, 512), contexts=131072
            ),
        },
        ours=("bits", "lengths", "contexts", "omegas", "beta", "seed"),
        run=error_by_length,
        draw=draw_lengths,
        checks=(
            below(
                "at the longest L the error is below .001 for every omega and m", _last_error, 1e-3
            ),
            above(
                "the error falls from the shortest L to the longest for every omega and m",
                _fall,
                0.0,
            ),
            below(
                "no measured error is surely above Chernoff's bound (largest ratio of lower end)",
                lambda t: exact((t.error_low / t.bound).max()),
                1.0,
            ),
            near(
                "the margin of the model's own matrices at m = 5, omega = 1 is the closed form's",
                lambda t: exact(t.query("bits == 5 and omega == 1").margin.min()),
                0.252,
                0.0005,
            ),
            below(
                "no margin differs from its closed form",
                lambda t: exact((t.margin - t.closed_margin).abs().max()),
                1e-6,
            ),
            below(
                "the exponent is at most the Chernoff information: no rule beats it",
                lambda t: exact((t.exponent - t.information).max()),
                1e-6,
            ),
            below(
                "the Chernoff information is at most the Kullback-Leibler divergence",
                lambda t: exact((t.information - t.divergence).max()),
                1e-6,
            ),
            near(
                "accuracy at omega = 1, m = 5, L = 32 (anchor 7.2)",
                lambda t: _measured(t, 5, 32),
                ANCHORS[1.0, 5][32],
                0.008,
            ),
            near(
                "accuracy at omega = 1, m = 7, L = 64 (anchor 7.2)",
                lambda t: _measured(t, 7, 64),
                ANCHORS[1.0, 7][64],
                0.008,
            ),
            below(
                "no accuracy is 4 standard errors from its anchor (all of 7.2 in "
                "the table; the largest gap)",
                _anchor_gap,
                4.0,
            ),
        ),
    ),
    Analysis(
        id="lemma2",
        settings={
            "quick": LemmaSettings(bits=(3, 5), lengths=(1, 4, 16, 64), contexts=4096),
            "paper": LemmaSettings(
                bits=(3, 5, 6, 7, 8), lengths=(1, 2, 4, 8, 16, 32, 64, 128), contexts=65536
            ),
        },
        ours=("bits", "lengths", "contexts", "seed"),
        run=lemma_errors,
        draw=draw_lemma,
        checks=(
            below(
                "the constructed memory has error 0 with ties counted for the label",
                lambda t: exact(_lemma(t, "constructed", "label").error.max()),
                1e-12,
            ),
            above(
                "the identity has an error above 0, ties counted for the label",
                lambda t: lowest_error(_lemma(t, "identity", "label")),
                0.0,
            ),
            near(
                "the error of the identity is 1, whatever the ties: a label never stands in its "
                "own context (anchor 7.1; the least error)",
                lambda t: exact(t[t.memory == "identity"].error.min()),
                1.0,
                1e-12,
            ),
            above(
                "with ties split, the constructed memory errs at L = 1: the lemma needs a tie rule",
                lambda t: lowest_error(_lemma(t, "constructed", "split").query("length == 1")),
                0.0,
            ),
        ),
    ),
)
