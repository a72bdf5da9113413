"""Lemmas 5 and 6: the rank of embeddings of equation 5.2, and the gradient of attention scores.

Each compares the exact quantity of its statement with what matrices and automatic differentiation
give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, exact, near
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.models.hooked import hooked
from hijacklens.one_layer.architecture import OneLayerConfig
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask, Contexts, token_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """Lemma 5: embeddings of equation 5.2 with b = b0."""

    bits: tuple[int, ...]
    slopes: tuple[float, ...]
    """a of equation 5.2."""
    offset: float
    """b0 - b of the control, in which the lemma's condition does not hold."""


RANK_TOLERANCE = 1e-9
"""Eigenvalues of a Gram matrix below this, relative to the largest, count as 0. In float64 those
that are 0 come out at 1e-16 to 1e-13; the smallest other one of the settings is 5e-3."""


def gram_matrix(bits: int, *, a: float, b: float, b0: float) -> Float[Tensor, "vocab vocab"]:
    """Equation 5.2 written out from Hamming distances, in float64: b0 on the diagonal, b - a D_H.

    It is the Gram matrix of embeddings if it is positive semidefinite, and then has their rank.

    >>> gram_matrix(1, a=1.0, b=2.0, b0=5.0).tolist()
    [[5.0, 1.0], [1.0, 5.0]]
    """
    gram = b - a * ConceptTask(bits=bits).hamming().double()
    return gram.fill_diagonal_(b0)


def rank_of_geometry(settings: RankSettings, bench: Workbench) -> pd.DataFrame:
    """Numerical rank under equation 5.2, with b = b0 and with b below b0.

    b is 1 above a m / 2, from which on there are embeddings with b = b0; `least` is the smallest
    eigenvalue relative to the largest, which shows it.
    """
    rows = []
    for bits in settings.bits:
        for slope in settings.slopes:
            b = slope * bits / 2 + 1.0
            for condition, offset in (("b = b0", 0.0), ("b < b0", settings.offset)):
                gram = gram_matrix(bits, a=slope, b=b, b0=b + offset)
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
    """Rank against m, the largest over the slopes, with the bound of the lemma."""
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
        axes.legend()
        return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSettings:
    """Lemma 6: random models on contexts of the first-bit support."""

    bits: tuple[int, ...]
    lengths: tuple[int, ...]
    contexts: int
    seeds: int


def gradient_of_scores(settings: GradientSettings, bench: Workbench) -> pd.DataFrame:
    """The closed form of Lemma 6 against autograd, per context: relative gaps and repeats.

    The lemma gives the gradient of the loss with respect to the unnormalised score u of a token t,
    which all alpha copies of t in the context share:

        (grad of the loss)^T W_E^T W_V (alpha p W_E(t) - alpha p sum_l p_l W_E(t_l))

    with p the softmax weight of one copy. As we have it, the second term is printed without its
    alpha; `printed_gap` is that of this reading, which is the same where no token repeats.
    """
    rows = []
    for bits in settings.bits:
        for length in settings.lengths:
            task = ConceptTask(bits=bits, length=length, support="first-bit")
            for seed in range(settings.seeds):
                config = OneLayerConfig(
                    vocab=task.vocab, d_model=task.vocab, length=length, dtype="float64", seed=seed
                )
                model = OneLayerTransformer(config)
                draw = torch.Generator().manual_seed(seed)
                contexts = task.sample(settings.contexts, draw)
                gaps, printed = _gradient_gaps(model, contexts)
                rows.append(
                    {
                        "bits": bits,
                        "length": length,
                        "seed": seed,
                        "gap": gaps,
                        "printed_gap": printed,
                        "repeats": float(token_counts(contexts.tokens, task.vocab).max()),
                    }
                )
    return pd.DataFrame(rows)


def _gradient_gaps(model: OneLayerTransformer, contexts: Contexts) -> tuple[float, float]:
    """Largest difference from autograd, relative to the largest gradient, of both readings."""
    tokens, vocab = contexts.tokens, model.config.vocab
    held: dict[str, Tensor] = {}

    def keep_scores(scores: Tensor, hook: Any) -> Tensor:  # [batch, head, query, key]
        held["scores"] = scores.detach().requires_grad_()
        return held["scores"]

    def keep_pattern(pattern: Tensor, hook: Any) -> None:
        held["pattern"] = pattern.detach()[:, 0, -1]

    at = "blocks.0.attn.hook_"
    with hooked(model, [(f"{at}attn_scores", keep_scores), (f"{at}pattern", keep_pattern)]):
        logits = model(tokens)[:, -1]
    loss = cross_entropy(logits, contexts.labels, reduction="sum")
    (at_places,) = torch.autograd.grad(loss, held["scores"])
    # A token's score is shared by its copies: their gradients add up.
    measured = torch.zeros(len(tokens), vocab, dtype=logits.dtype)
    measured.scatter_add_(1, tokens, at_places[:, 0, -1])
    weights = model.weights()
    slope = logits.softmax(-1).detach()
    slope[torch.arange(len(tokens)), contexts.labels] -= 1  # of the loss, in the logits
    looked_up = (slope @ weights.W_E @ weights.W_V.T).detach()  # [batch, d_model]
    gains = looked_up @ weights.W_E.detach().T  # of one unit of attention on each token
    seen = (held["pattern"] * gains.gather(1, tokens)).sum(1, keepdim=True)
    count = token_counts(tokens, vocab).to(logits.dtype)
    share = torch.zeros_like(measured).scatter_reduce(1, tokens, held["pattern"], "amax")
    closed = count * share * (gains - seen)
    printed = count * share * gains - share * seen
    # In a context of one token all attention is on it, and the gradient is 0.
    scale = float(measured.abs().max()) or 1.0
    gap, printed_gap = (float((form - measured).abs().max()) for form in (closed, printed))
    return gap / scale, printed_gap / scale


def draw_gradient(table: pd.DataFrame, settings: GradientSettings) -> Figure:
    """Relative gap of both readings against L; the bands reach over all m and seeds."""
    with plots.canvas(height=4.0) as (figure, (axes,)):
        names = {
            "gap": "$\\alpha$ in both terms",
            "printed_gap": "second term without $\\alpha$",
        }
        for i, (column, label) in enumerate(names.items()):
            colour, marker = plots.series(i)
            of: Any = table.groupby("length")[column]
            ends = of.agg(["min", "median", "max"])
            axes.plot(ends.index, ends["median"], color=colour, marker=marker, label=label)
            axes.fill_between(
                ends.index, ends["min"], ends["max"], color=colour, alpha=0.2, linewidth=0
            )
        axes.axhline(TOLERANCE, color="black", linestyle=":", linewidth=1.2, label="tolerance")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(settings.lengths, [str(length) for length in settings.lengths])
        axes.set_xlabel("context length L")
        axes.set_ylabel(
            "largest gap to autograd over contexts,\nrelative to the largest gradient\n"
            "(median and band over m and seeds)"
        )
        plots.legend_below(figure, [axes])
        return figure


TOLERANCE = 1e-10
"""Of the closed form, relative to the largest gradient, in float64."""


ANALYSES = (
    Analysis(
        id="lemma5",
        settings={
            "quick": RankSettings(bits=(3, 5, 7), slopes=(0.1, 1.0), offset=0.5),
            "paper": RankSettings(bits=(3, 4, 5, 6, 7, 8), slopes=(0.01, 0.1, 1.0), offset=0.5),
        },
        ours=("bits", "slopes", "offset"),
        run=rank_of_geometry,
        draw=draw_rank,
        checks=(
            below(
                "with b = b0 no rank is above m + 2 (largest rank less m + 2)",
                lambda t: exact(t.loc[t.condition == "b = b0", "excess"].max()),
                0.5,
            ),
            near(
                "with b = b0 every rank is m + 1 (7.3; the largest difference)",
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
                "with b < b0 the rank is above m + 2, so the condition matters (smallest rank less "
                "m + 2)",
                lambda t: exact(t.loc[t.condition == "b < b0", "excess"].min()),
                0.5,
            ),
        ),
    ),
    Analysis(
        id="lemma6",
        settings={
            "quick": GradientSettings(bits=(3, 5), lengths=(2, 16, 64), contexts=64, seeds=2),
            "paper": GradientSettings(
                bits=(3, 5, 6, 7, 8), lengths=(2, 16, 64, 256), contexts=256, seeds=5
            ),
        },
        ours=("bits", "lengths", "contexts", "seeds"),
        run=gradient_of_scores,
        draw=draw_gradient,
        checks=(
            below(
                "the closed form agrees with autograd in float64",
                lambda t: exact(t.gap.max()),
                TOLERANCE,
            ),
            above(
                "without alpha in its second term it does not, where tokens repeat",
                lambda t: exact(t.loc[t.repeats > 1, "printed_gap"].min()),
                1e-6,
            ),
        ),
    ),
)
