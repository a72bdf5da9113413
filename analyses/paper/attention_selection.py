"""Figures 3c, C.7 and C.8: attention goes to the tokens of the last token's cluster.

Here the informative tokens of a label share its first bit (two clusters) or its first two bits
(four). Only they tell anything, the rest of a context is noise; the last token is informative
always, so it says which cluster to read. The number is the share of attention inside the cluster,
beside the share of the context's tokens that stand there, which is what uniform attention gives.
The gradient of Lemma 6 is measured too: on how many contexts does raising the scores of the
cluster's tokens lower the loss, in a model at its start and when it is trained?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, lowest, mean
from analyses.reproduction.settings import RECIPE_OURS, TrainingSettings
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.models.hooked import hooked
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.spans import layout as context_layout
from hijacklens.one_layer.task import ConceptTask

HEAT_BINS = 16
"""The heat map has so many tokens to a side at most; larger vocabularies are averaged in blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings(TrainingSettings):
    """Figures 3c, C.7 and C.8."""

    support: str
    """`first-bit` (two clusters) or `first-two-bits` (four)."""
    d_model: int
    length: int
    contexts: int = 512


def attention_in_clusters(settings: ClusterSettings, bench: Workbench) -> pd.DataFrame:
    """Per m and seed: shares inside the cluster; and the mean attention by pairs of tokens.

    Rows of kind `share` hold one model's numbers at the better learning rate, of kind `other rate`
    at the other; rows of kind `map` the mean over the models at the better one of the attention
    weight, times V, that one copy of a key token gets from a query token.
    """
    rows: list[dict[str, Any]] = []
    for bits in settings.bits:
        task = settings.task(bits, settings.length, support=settings.support)
        recipe = settings.recipe(settings.d_model)
        result = bench.trained(task, recipe)
        total = torch.zeros(task.vocab, task.vocab, dtype=torch.float64)
        trained = zip(result.summary().to_dict("records"), result.models, strict=True)
        for run, model in trained:
            inside, uniform = share_inside(model, task, settings.contexts)
            start = OneLayerTransformer(model.config)
            chosen = run["lr"] == result.best_learning_rate
            rows.append(
                {
                    "kind": "share" if chosen else "other rate",
                    "bits": bits,
                    "seed": run["seed"],
                    "lr": run["lr"],
                    "inside": inside,
                    "uniform": uniform,
                    "accuracy": run["accuracy"],
                    "bayes": run["bayes_accuracy"],
                    "gradient_trained": _helped(model, task, settings.contexts),
                    "gradient_start": _helped(start, task, settings.contexts),
                }
            )
            if chosen:
                total += _weights(model, task)
        rows += _map(total / settings.seeds, bits)
    return pd.DataFrame(rows)


def share_inside(model: OneLayerTransformer, task: ConceptTask, count: int) -> tuple[float, float]:
    """Mean attention of the last token inside its cluster, and the share of tokens there."""
    contexts = task.sample(count, torch.Generator().manual_seed(model.config.seed))
    inside = context_layout(task, contexts.tokens, spans=("cluster",)).key("cluster")
    held: list[torch.Tensor] = []

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        held.append(pattern.detach()[:, 0, -1])

    with torch.no_grad(), hooked(model, [("blocks.0.attn.hook_pattern", keep)]):
        for block in contexts.tokens.split(128):
            model(block, return_type=None)
    pattern = torch.cat(held)
    return float((pattern * inside).sum(1).mean()), float(inside.double().mean())


def _weights(model: OneLayerTransformer, task: ConceptTask) -> torch.Tensor:
    """exp(score) of each key token for each query token over its mean: attention to one copy."""
    with torch.no_grad():
        weights = model.weights()
        query, key = model.W_E @ weights.W_Q, model.W_E @ weights.W_K
        scores = (query @ key.T).double() / model.config.d_a**0.5
        return scores.softmax(-1) * task.vocab


def _map(weights: torch.Tensor, bits: int) -> list[dict[str, Any]]:
    side = min(HEAT_BINS, 2**bits)
    block = 2**bits // side
    mean_weights = weights.view(side, block, side, block).mean((1, 3))
    return [
        {"kind": "map", "bits": bits, "query": q, "key": k, "weight": float(mean_weights[q, k])}
        for q in range(side)
        for k in range(side)
    ]


def _helped(model: OneLayerTransformer, task: ConceptTask, count: int) -> float:
    """Share of contexts on which more attention inside the cluster lowers the loss (Lemma 6).

    The gradient of the loss with respect to the scores of all tokens in the cluster, summed; the
    lemma says it is negative where W_V reads the cluster's tokens as evidence.
    """
    contexts = task.sample(count, torch.Generator().manual_seed(10_000 + model.config.seed))
    found = []
    for tokens, labels in zip(contexts.tokens.split(128), contexts.labels.split(128), strict=True):
        held: dict[str, torch.Tensor] = {}

        def keep(
            scores: torch.Tensor, hook: Any, held: dict[str, torch.Tensor] = held
        ) -> torch.Tensor:
            held["scores"] = scores.detach().requires_grad_()
            return held["scores"]

        with hooked(model, [("blocks.0.attn.hook_attn_scores", keep)]):
            logits = model(tokens)
        assert logits is not None
        loss = cross_entropy(logits[:, -1], labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, held["scores"])
        inside = context_layout(task, tokens, spans=("cluster",)).key("cluster")
        found.append((gradient[:, 0, -1] * inside).sum(1) < 0)
    return float(torch.cat(found).double().mean())


def draw_clusters(table: pd.DataFrame, settings: ClusterSettings) -> Figure:
    """Mean attention from query to key tokens, a panel per m, with the share inside as title.

    One scale of colours for all panels: 1 is uniform attention. Large vocabularies are averaged in
    blocks, `HEAT_BINS` to a side.
    """
    maps: Any = table[table["kind"] == "map"]
    brightest = maps["weight"].max()
    shares = table[table["kind"] == "share"].groupby("bits")[["inside", "uniform"]].mean()
    with plots.panels(len(settings.bits), height=2.9) as (figure, axes):
        for panel, bits in zip(axes, settings.bits, strict=True):
            grid = maps[maps["bits"] == bits].pivot(index="query", columns="key", values="weight")
            vocab = 2**bits
            panel.imshow(
                grid, cmap="cividis", vmin=0, vmax=brightest, extent=(0.0, vocab, vocab, 0.0)
            )
            panel.grid(visible=False)
            inside = shares.loc[bits]
            panel.set_title(
                f"m = {bits}: {inside['inside']:.0%} inside\n(uniform {inside['uniform']:.0%})",
                fontsize=9,
            )
            panel.set_xticks(range(0, vocab + 1, vocab // 4))
            panel.set_yticks(range(0, vocab + 1, vocab // 4))
        plots.label_outer(axes, x="token attended to", y="last token")
        label = "attention to one copy, times V"
        figure.colorbar(axes[-1].images[0], ax=axes, label=label, shrink=0.8)
        return figure


def _shares(table: Any) -> Any:
    return table[table.kind == "share"]


def _by_bits(table: Any, values: Any) -> Any:
    rows = _shares(table)
    return lowest([mean(own) for _, own in values(rows).groupby(rows.bits)])


def _analysis(
    name: str, support: str, *, bits: Any, quick: Any, recalled: tuple[str, ...] = ()
) -> Analysis:
    return Analysis(
        id=name,
        settings={
            "quick": ClusterSettings(
                bits=quick,
                support=support,
                d_model=32,
                length=64,
                seeds=3,
                steps=1500,
                learning_rates=(0.01,),
            ),
            "paper": ClusterSettings(
                bits=bits, support=support, d_model=256, length=256, seeds=5, steps=4000
            ),
        },
        ours=(*RECIPE_OURS, "d_model", "length", "contexts", *recalled),
        run=attention_in_clusters,
        draw=draw_clusters,
        checks=(
            above(
                "attention inside the cluster exceeds the share of tokens there by .1, for every m",
                lambda t: _by_bits(t, lambda rows: rows.inside - rows.uniform),
                0.1,
            ),
            above(
                "in trained models more attention inside lowers the loss on most contexts, every m",
                lambda t: _by_bits(t, lambda rows: rows.gradient_trained),
                0.5,
            ),
        ),
    )


ANALYSES = (
    _analysis(
        "fig3c",
        "first-bit",
        bits=(8,),
        quick=(6,),
    ),
    _analysis(
        "figc7",
        "first-bit",
        bits=(5, 6, 7, 8),
        quick=(5, 6),
    ),
    _analysis(
        "figc8",
        "first-two-bits",
        bits=(5, 6, 7, 8),
        quick=(5, 6),
        recalled=("support",),
    ),
)
