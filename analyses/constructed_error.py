"""Theorem 1 (7 in the appendix) and Lemma 2: the constructed model, measured.

The model has orthonormal embeddings, uniform attention and the memory of equation 5.1. Its logits
are means over the tokens of a context, so the difference of two of them is a mean of independent
numbers X, and the error at length L obeys Chernoff's bound

    P(error)  <=  sum over y' of exp(-L I(y')),     I(y') = -min_s log E exp(-s X)

which is an exact finite statement where the appendix has constants that we know from memory only.
Beside it stands what one token tells at most: the Chernoff information of the nearest two labels,
the best exponent of any rule. (The Kullback-Leibler divergence, by which figure C.14 argues, is
infinite for omega = 1: a label never stands in its own contexts, but in those of all others.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor

from analyses.check import above, below, exact, near
from analyses.registry import Analysis
from analyses.workbench import Workbench
from hijacklens import plots
from hijacklens.concepts import bayes, memory, population
from hijacklens.concepts.model import OneLayerTransformer
from hijacklens.concepts.task import ConceptTask
from hijacklens.statistics import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSettings:
    """Theorem 1: error of the constructed model against L."""

    bits: tuple[int, ...]
    lengths: tuple[int, ...]
    contexts: int
    omega: float = 1.0
    beta: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LemmaSettings:
    """Lemma 2: the constructed memory and the identity on the Hamming-1 support."""

    bits: tuple[int, ...]
    lengths: tuple[int, ...]
    contexts: int
    seed: int = 0


def error_by_length(settings: LengthSettings, bench: Workbench) -> pd.DataFrame:
    """Measured error with its interval, Chernoff's bound, margin and divergence, per m and L."""
    rows = []
    for bits in settings.bits:
        task = ConceptTask(bits=bits, omega=settings.omega, beta=settings.beta)
        model = OneLayerTransformer.from_weights(memory.theorem_1(task))
        exponents = _exponents(task, model)
        for length in settings.lengths:
            sized = ConceptTask(bits=bits, omega=settings.omega, beta=settings.beta, length=length)
            right = bayes.accuracy(
                model.last_logits,
                sized,
                contexts_count=settings.contexts,
                generator=torch.Generator().manual_seed(settings.seed),
            )
            rows.append(
                {
                    "bits": bits,
                    "length": length,
                    "error": 1 - right.value,
                    "error_low": 1 - right.high,
                    "error_high": 1 - right.low,
                    "bound": float(torch.exp(-length * exponents).sum()),
                    "exponent": float(exponents.min()),
                    "information": _chernoff_information(task),
                    "margin": _margin(task, model),
                    "closed_margin": population.margin(population.construction_logits(task)),
                }
            )
    return pd.DataFrame(rows)


def _token_logits(model: OneLayerTransformer) -> Tensor:
    """What one token adds to each logit under uniform attention: [token, label], float64."""
    weights = model.weights()
    W_E, W_V = weights.W_E.detach().double(), weights.W_V.detach().double()
    return W_E @ W_V @ W_E.T


def _margin(task: ConceptTask, model: OneLayerTransformer) -> float:
    """The smallest margin over labels of the logits at infinite L, by the model's own matrices."""
    logits = task.token_distribution() @ _token_logits(model)
    own = logits.diagonal()
    others = logits.clone().fill_diagonal_(-torch.inf).amax(1)
    return float((own - others).min())


def _exponents(task: ConceptTask, model: OneLayerTransformer) -> Tensor:
    """I(y') for label 0 against every other; by symmetry the same for all labels."""
    chance = task.token_distribution()[0]
    logits = _token_logits(model)
    found = []
    for other in range(1, task.vocab):
        gain = logits[:, 0] - logits[:, other]

        def moment(s: float, gain: Tensor = gain) -> float:
            return float((chance.log() - s * gain).logsumexp(0))

        best: Any = minimize_scalar(moment, bounds=(0.0, 60.0), method="bounded")
        found.append(max(0.0, -best.fun))
    return torch.tensor(found, dtype=torch.float64)


def _chernoff_information(task: ConceptTask) -> float:
    """Max over s of -log sum_t p(t | y)^s p(t | y')^(1-s) in nats, for the nearest labels."""
    chance = task.token_distribution()
    found = []
    for other in range(1, task.vocab):
        shared = (chance[0] > 0) & (chance[other] > 0)
        own, rival = chance[0, shared].log(), chance[other, shared].log()

        def overlap(s: float, own: Tensor = own, rival: Tensor = rival) -> float:
            return float((s * own + (1 - s) * rival).logsumexp(0))

        best: Any = minimize_scalar(overlap, bounds=(0.0, 1.0), method="bounded")
        found.append(-best.fun)
    return min(found)


def draw_lengths(table: pd.DataFrame, settings: LengthSettings) -> Figure:
    """Error against L on logarithmic axes, with Chernoff's bound dashed, per m.

    Where no context was answered wrongly, an arrow hangs from the upper end of the interval. The
    bound is a sum of exponentials in L, so its logarithm is convex: between the lengths it is drawn
    straight in L, which is a bound, too.
    """
    grid = np.geomspace(min(settings.lengths), max(settings.lengths), 200)
    with plots.canvas(width=5.2, height=4.0) as (figure, (axes,)):
        for i, bits in enumerate(settings.bits):
            rows: Any = table[table["bits"] == bits]
            colour, marker = plots.series(i)
            place = rows["length"] * 2 ** (0.1 * (i - (len(settings.bits) - 1) / 2))
            seen = rows["error"] > 0
            axes.errorbar(
                place[seen],
                rows["error"][seen],
                yerr=plots.whiskers(intervals(rows[seen])),
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=f"m = {bits}",
            )
            upper = rows["error_high"][~seen]
            axes.errorbar(
                place[~seen],
                upper,
                yerr=upper / 2,
                uplims=True,
                color=colour,
                linestyle="none",
                linewidth=1.2,
            )
            bound = np.exp(np.interp(grid, rows["length"], np.log(rows["bound"])))
            inside = bound < 1
            axes.plot(grid[inside], bound[inside], color=colour, linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(0.3 / settings.contexts, 1)
        axes.set_xticks(settings.lengths, [str(length) for length in settings.lengths])
        axes.set_xlabel("context length L")
        axes.set_ylabel("error of the constructed model")
        axes.plot([], [], color="black", linestyle="--", linewidth=1, label="Chernoff's bound")
        bars = "95% Wilson intervals; arrows: no error seen"
        plots.legend_below(figure, [axes], bars=bars)
        return figure


def intervals(rows: Any) -> list[Interval]:
    """The error of each row of a table, with its interval."""
    return [Interval(row.error, row.error_low, row.error_high) for row in rows.itertuples()]


def both_halves(settings: LemmaSettings, bench: Workbench) -> pd.DataFrame:
    """Error of the constructed memory and of the identity, under both rules for ties."""
    rows = []
    for bits in settings.bits:
        for length in settings.lengths:
            task = ConceptTask(bits=bits, omega=1.0, length=length, support="hamming-1")
            built = OneLayerTransformer.from_weights(memory.theorem_1(task))
            plain = built.with_value(memory.identity(task.vocab))
            for name, model in (("constructed", built), ("identity", plain)):
                for ties in ("label", "split"):
                    right = bayes.accuracy(
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


def draw_halves(table: pd.DataFrame, settings: LemmaSettings) -> Figure:
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
        figure.supxlabel("context length L", fontsize=10)
        figure.supylabel("error", fontsize=10)
        plots.legend_below(figure, axes, bars="95% Wilson intervals", columns=2)
        return figure


def _at(table: Any, bits: Any, length: Any) -> Any:
    return table[(table.bits == bits) & (table.length == length)].iloc[0]


def _measured(table: Any, bits: int, length: int) -> Interval:
    row = _at(table, bits, length)
    return Interval(1 - row.error, 1 - row.error_high, 1 - row.error_low)


def _fall(table: Any) -> Interval:
    """The least, over m, of how much the error falls from the shortest L to the longest."""
    first, last = table.length.min(), table.length.max()
    pairs = [(_at(table, bits, first), _at(table, bits, last)) for bits in table.bits.unique()]
    falls = [
        Interval(a.error - b.error, a.error_low - b.error_high, a.error_high - b.error_low)
        for a, b in pairs
    ]
    return min(falls, key=lambda fall: fall.low)


def _last_error(table: Any) -> Interval:
    rows = table[table.length == table.length.max()]
    row = rows.loc[rows.error.idxmax()]
    return Interval(row.error, row.error_low, row.error_high)


def _lemma(table: Any, name: str, ties: str) -> Any:
    return table[(table.memory == name) & (table.ties == ties)]


def _smallest(rows: Any) -> Interval:
    row = rows.loc[rows.error.idxmin()]
    return Interval(row.error, row.error_low, row.error_high)


ANALYSES = (
    Analysis(
        id="theorem1",
        settings={
            "quick": LengthSettings(bits=(5, 7), lengths=(8, 16, 32, 64, 128, 256), contexts=8192),
            "paper": LengthSettings(
                bits=(3, 5, 6, 7, 8), lengths=(4, 8, 16, 32, 64, 128, 256, 512), contexts=131072
            ),
        },
        ours=("bits", "lengths", "contexts", "beta"),
        run=error_by_length,
        draw=draw_lengths,
        checks=(
            below("at the longest L the error is below .001 for every m", _last_error, 1e-3),
            above("the error falls from the shortest L to the longest for every m", _fall, 0.0),
            below(
                "no measured error is surely above Chernoff's bound",
                lambda t: exact((t.error_low - t.bound).max()),
                0.0,
            ),
            near(
                "the margin of the model's own matrices at m = 5 is the closed form's",
                lambda t: exact(t.loc[t.bits == 5, "margin"].iloc[0]),
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
            near(
                "accuracy at m = 5, L = 32 (anchor 7.2)",
                lambda t: _measured(t, 5, 32),
                0.9639,
                0.008,
            ),
            near(
                "accuracy at m = 7, L = 64 (anchor 7.2)",
                lambda t: _measured(t, 7, 64),
                0.9863,
                0.008,
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
        ours=("bits", "lengths", "contexts"),
        run=both_halves,
        draw=draw_halves,
        checks=(
            below(
                "the constructed memory has error 0 with ties counted for the label",
                lambda t: exact(_lemma(t, "constructed", "label").error.max()),
                1e-12,
            ),
            above(
                "the identity has an error above 0, ties counted for the label",
                lambda t: _smallest(_lemma(t, "identity", "label")),
                0.0,
            ),
            above(
                "with ties split, the constructed memory errs at L = 1: the lemma needs a tie rule",
                lambda t: _smallest(_lemma(t, "constructed", "split").query("length == 1")),
                0.0,
            ),
        ),
    ),
)
