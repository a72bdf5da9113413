"""Lemmas 5 and 6: the rank of embeddings of equation 5.2, and the gradient of attention scores.

Each analysis compares the exact quantity of its statement with a numerical one: the rank of the
Gram matrix (Lemma 5) and automatic differentiation (Lemma 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, exact, lowest, near
from analyses.reproduction.drawing import log2_axis
from analyses.reproduction.settings import scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.models.hooked import hooked
from hijacklens.one_layer.architecture import OneLayerConfig
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask, Contexts, token_counts

RANK_TOLERANCE = 1e-9
"""Eigenvalues of a Gram matrix below this, relative to the largest, count as 0. In float64 the zero
eigenvalues come out at 1e-16 to 1e-13; the smallest nonzero one under these settings is 5e-3."""
TOLERANCE = 1e-10
"""Tolerance of the closed form in float64, relative to the largest gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """Lemma 5: embeddings of equation 5.2 with b = b0."""

    bits: tuple[int, ...]
    slopes: tuple[float, ...]
    """a of equation 5.2."""
    offset: float = 0.5
    """b0 - b of the control, which violates the lemma's condition."""


def gram_matrix(bits: int, *, a: float, b: float, b0: float) -> Float[Tensor, "vocab vocab"]:
    """Return equation 5.2 from Hamming distances, in float64: b0 on the diagonal, b - a D_H off it.

    It is the Gram matrix of embeddings if it is positive semidefinite, and then has their rank.

    >>> gram_matrix(1, a=1.0, b=2.0, b0=5.0).tolist()
    [[5.0, 1.0], [1.0, 5.0]]
    """
    gram = b - a * ConceptTask(bits=bits).hamming().double()
    return gram.fill_diagonal_(b0)


def rank_of_geometry(settings: RankSettings, bench: Workbench) -> pd.DataFrame:
    """Return the numerical rank under equation 5.2, with b = b0 and with b below b0.

    b is 1 above a m / 2, the smallest b that has embeddings with b = b0. `least` is the smallest
    eigenvalue relative to the largest; it shows that the matrices are positive semidefinite.
    """
    rows = []
    conditions = {"b = b0": 0.0, "b < b0": settings.offset}
    for bits, slope, condition in product(settings.bits, settings.slopes, conditions):
        b = slope * bits / 2 + 1.0
        gram = gram_matrix(bits, a=slope, b=b, b0=b + conditions[condition])
        values = torch.linalg.eigvalsh(gram)  # ascending
        rank = int((values.abs() > RANK_TOLERANCE * values[-1]).sum())
        rows.append(
            {
                "bits": bits,
                "a": slope,
                "condition": condition,
                "rank": rank,
                "bound": bits + 2,
                "excess": rank - (bits + 2),
                "least": float(values[0] / values[-1]),
            }
        )
    return pd.DataFrame(rows)


def draw_rank(table: pd.DataFrame, settings: RankSettings) -> Figure:
    """Draw the largest rank over the slopes against m, with the bound of the lemma."""
    with plots.canvas() as (figure, (axes,)):
        names = {"b = b0": "$b = b_0$, the lemma's case", "b < b0": "$b < b_0$"}
        for i, (condition, name) in enumerate(names.items()):
            colour, marker = plots.series(i)
            rows = table[table["condition"] == condition]
            ranks: Any = rows.groupby("bits")["rank"].max()
            axes.plot(ranks.index, ranks, color=colour, marker=marker, label=name)
        bits = np.array(settings.bits)
        axes.plot(bits, bits + 2, color="black", linestyle="--", label="m + 2 (Lemma 5)")
        axes.plot(bits, 2**bits, color="#666666", linestyle=":", label="V = $2^m$, full rank")
        axes.set_yscale("log", base=2)
        axes.set_xticks(bits)
        axes.set_xlabel("bits m")
        axes.set_ylabel("rank of $W_E$, largest over a")
        plots.legend_below(figure, [axes], columns=2)
        return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSettings:
    """Lemma 6: random models on contexts of the first-bit support."""

    bits: tuple[int, ...]
    lengths: tuple[int, ...]
    contexts: int
    seeds: int


def gradient_of_scores(settings: GradientSettings, bench: Workbench) -> pd.DataFrame:
    """Compare the closed form of Lemma 6 with autograd, as the largest relative gap over contexts.

    The lemma gives the gradient of the loss with respect to the unnormalised score u of a token t,
    which all alpha copies of t in the context share:

        (grad of the loss)^T W_E^T W_V (alpha p W_E(t) - alpha p sum_l p_l W_E(t_l))

    with p the softmax weight of one copy. The text that we have prints the second term without
    alpha. `printed_gap` belongs to this reading, which is the same if no token repeats. `repeats`
    is the largest alpha.
    """
    rows = []
    seeds = range(settings.seeds)
    for bits, length, seed in product(settings.bits, settings.lengths, seeds):
        task = ConceptTask(bits=bits, length=length, support="first-bit")
        config = OneLayerConfig(
            vocab=task.vocab, d_model=task.vocab, length=length, dtype="float64", seed=seed
        )
        contexts = task.sample(settings.contexts, torch.Generator().manual_seed(seed))
        gap, printed_gap = _gradient_gaps(OneLayerTransformer(config), contexts)
        rows.append(
            {
                "bits": bits,
                "length": length,
                "seed": seed,
                "gap": gap,
                "printed_gap": printed_gap,
                "repeats": float(token_counts(contexts.tokens, task.vocab).max()),
            }
        )
    return pd.DataFrame(rows)


def last_token_gradient(
    model: OneLayerTransformer, contexts: Contexts
) -> tuple[
    Float[Tensor, "context vocab"], Float[Tensor, "context pos"], Float[Tensor, "context pos"]
]:
    """Return the last token's logits, its attention, and the loss gradient at its scores.

    The loss is the cross-entropy of the label, summed over contexts.
    """
    caught: dict[str, Tensor] = {}

    def catch_scores(scores: Tensor, hook: Any) -> Tensor:  # [batch, head, query, key]
        caught["scores"] = scores.detach().requires_grad_()
        return caught["scores"]

    def catch_pattern(pattern: Tensor, hook: Any) -> None:
        caught["pattern"] = pattern.detach()[:, 0, -1]

    at = "blocks.0.attn.hook_"
    with hooked(model, [(f"{at}attn_scores", catch_scores), (f"{at}pattern", catch_pattern)]):
        logits = model(contexts.tokens)
    assert logits is not None
    loss = cross_entropy(logits[:, -1], contexts.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, caught["scores"])
    return logits[:, -1].detach(), caught["pattern"], gradient[:, 0, -1]


def _gradient_gaps(model: OneLayerTransformer, contexts: Contexts) -> tuple[float, float]:
    """Return the largest difference of both readings from autograd, over the largest gradient."""
    tokens, vocab = contexts.tokens, model.config.vocab
    logits, pattern, by_position = last_token_gradient(model, contexts)
    # The copies of a token share its score, so their gradients add up.
    measured = torch.zeros(len(tokens), vocab, dtype=logits.dtype)
    measured.scatter_add_(1, tokens, by_position)
    weights = model.weights()
    W_E, W_V = weights.W_E.detach(), weights.W_V.detach()
    slope = logits.softmax(-1)
    slope[torch.arange(len(tokens)), contexts.labels] -= 1  # gradient of the loss in the logits
    gains = slope @ W_E @ W_V.T @ W_E.T  # of one unit of attention on each token
    average = (pattern * gains.gather(1, tokens)).sum(1, keepdim=True)
    count = token_counts(tokens, vocab).to(logits.dtype)
    weight = torch.zeros_like(measured).scatter_reduce(1, tokens, pattern, "amax")  # of one copy
    closed = count * weight * (gains - average)
    printed = count * weight * gains - weight * average
    # In a context of one token all attention is on it, and the gradient is 0.
    scale = float(measured.abs().max()) or 1.0
    gap, printed_gap = (float((form - measured).abs().max()) for form in (closed, printed))
    return gap / scale, printed_gap / scale


def draw_gradient(table: pd.DataFrame, settings: GradientSettings) -> Figure:
    """Draw the relative gap of both readings against L; the bands cover all m and seeds."""
    with plots.canvas(height=4.0) as (figure, (axes,)):
        names = {"gap": "$\\alpha$ in both terms", "printed_gap": "second term without $\\alpha$"}
        for i, (column, label) in enumerate(names.items()):
            colour, marker = plots.series(i)
            gaps: Any = table.groupby("length")[column]
            ends = gaps.agg(["min", "median", "max"])
            axes.plot(ends.index, ends["median"], color=colour, marker=marker, label=label)
            band = {"color": colour, "alpha": 0.2, "linewidth": 0}
            axes.fill_between(ends.index, ends["min"], ends["max"], **band)
        axes.axhline(TOLERANCE, color="black", linestyle=":", linewidth=1.2, label="tolerance")
        log2_axis(axes, settings.lengths)
        axes.set_yscale("log")
        axes.set_xlabel("context length L")
        axes.set_ylabel(
            "largest gap to autograd over contexts,\nrelative to the largest gradient\n"
            "(median and band over m and seeds)"
        )
        plots.legend_below(figure, [axes])
        return figure


ANALYSES = (
    Analysis(
        id="lemma5",
        settings=scales(
            RankSettings(bits=(3, 4, 5, 6, 7, 8), slopes=(0.01, 0.1, 1.0)),
            bits=(3, 5, 7),
            slopes=(0.1, 1.0),
        ),
        ours=("bits", "slopes", "offset"),
        run=rank_of_geometry,
        draw=draw_rank,
        checks=(
            below(
                "with b = b0 no rank is above m + 2 (largest rank minus m + 2)",
                lambda t: exact(t.loc[t.condition == "b = b0", "excess"].max()),
                0.5,
            ),
            near(
                "with b = b0 every rank is m + 1 (anchor 7.3; largest difference)",
                lambda t: exact((t.excess + 1)[t.condition == "b = b0"].abs().max()),
                0.0,
                0.5,
            ),
            above(
                "all Gram matrices are positive semidefinite, so there are such embeddings "
                "(smallest eigenvalue over the largest)",
                lambda t: exact(t.least.min()),
                -RANK_TOLERANCE,
            ),
            above(
                "with b < b0 the rank is above m + 2, so the condition matters (smallest rank "
                "minus m + 2)",
                lambda t: exact(t.loc[t.condition == "b < b0", "excess"].min()),
                0.5,
            ),
        ),
    ),
    Analysis(
        id="lemma6",
        settings=scales(
            GradientSettings(bits=(3, 5, 6, 7, 8), lengths=(2, 16, 64, 256), contexts=256, seeds=5),
            bits=(3, 5),
            lengths=(2, 16, 64),
            contexts=64,
            seeds=2,
        ),
        ours=("bits", "lengths", "contexts", "seeds"),
        run=gradient_of_scores,
        draw=draw_gradient,
        checks=(
            below(
                "the closed form agrees with autograd in float64 (largest relative gap)",
                lambda t: exact(t.gap.max()),
                TOLERANCE,
            ),
            above(
                "without alpha in its second term it does not agree if tokens repeat (smallest "
                "relative gap)",
                lambda t: lowest(list(map(exact, t.loc[t.repeats > 1, "printed_gap"]))),
                1e-6,
            ),
        ),
    ),
)
