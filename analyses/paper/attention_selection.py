"""Figures 3c, C.7 and C.8: attention goes to the tokens of the last token's cluster.

The informative tokens of a label share its first bit (two clusters) or its first two bits (four);
the rest of a context is noise. The last token is always informative, so it says which cluster to
read. We measure the fraction of attention inside the cluster and compare it with the fraction of
the context's tokens in the cluster, which is what uniform attention gives. We also measure the
gradient of Lemma 6: on how many contexts does raising the scores of the cluster's tokens lower the
loss, in a model before and after training?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from analyses.paper.lemmas import last_token_gradient
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, every, lowest
from analyses.reproduction.settings import RECIPE_OURS, TrainingSettings, scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.models.hooked import hooked
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.spans import layout as context_layout
from hijacklens.one_layer.task import ConceptTask, Contexts

HEAT_BINS = 16
"""Maximum number of cells on a side of the heat map; larger vocabularies are averaged in blocks."""
CHUNK = 128
"""Contexts per forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings(TrainingSettings):
    """Settings of figures 3c, C.7 and C.8."""

    support: str
    """`first-bit` (two clusters) or `first-two-bits` (four)."""
    d_model: int = 256
    length: int = 256
    contexts: int = 512


def attention_in_clusters(settings: ClusterSettings, bench: Workbench) -> pd.DataFrame:
    """Return the attention inside the cluster per m and seed, and mean attention by token pairs.

    Rows of kind

    - `share`: one model at the better learning rate, with the fraction of attention inside the
      cluster (`inside`) and the fraction of tokens there (`uniform`);
    - `other rate`: the same at the other learning rate;
    - `map`: attention of a query token to one copy of a key token, times V, averaged over the
      models at the better learning rate.
    """
    rows: list[dict[str, Any]] = []
    for bits in settings.bits:
        task = settings.task(bits, settings.length, support=settings.support)
        result = bench.trained(task, settings.recipe(settings.d_model))
        total = torch.zeros(task.vocab, task.vocab, dtype=torch.float64)
        trained = zip(result.summary().to_dict("records"), result.models, strict=True)
        for run, model in trained:
            inside, uniform = attention_inside(model, task, settings.contexts)
            start = OneLayerTransformer(model.config)
            best = run["lr"] == result.best_learning_rate
            rows.append(
                {
                    "kind": "share" if best else "other rate",
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
            if best:
                total += _weights(model, task)
        rows += _map(total / settings.seeds, bits)
    return pd.DataFrame(rows)


def attention_inside(
    model: OneLayerTransformer, task: ConceptTask, count: int
) -> tuple[float, float]:
    """Return the last token's mean attention inside its cluster and the fraction of tokens there.

    They are averaged over `count` contexts of a task whose support has clusters.
    """
    contexts = task.sample(count, torch.Generator().manual_seed(model.config.seed))
    inside = context_layout(task, contexts.tokens, spans=("cluster",)).key("cluster")
    patterns: list[torch.Tensor] = []

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        patterns.append(pattern.detach()[:, 0, -1])

    with torch.no_grad(), hooked(model, [("blocks.0.attn.hook_pattern", keep)]):
        for tokens in contexts.tokens.split(CHUNK):
            model(tokens, return_type=None)
    attention = torch.cat(patterns)
    return float((attention * inside).sum(1).mean()), float(inside.double().mean())


def _weights(model: OneLayerTransformer, task: ConceptTask) -> torch.Tensor:
    """Return the softmax over all key tokens for each query token, times V."""
    with torch.no_grad():
        weights = model.weights()
        query, key = model.W_E @ weights.W_Q, model.W_E @ weights.W_K
        scores = (query @ key.T).double() / model.config.d_a**0.5
        return scores.softmax(-1) * task.vocab


def _map(weights: torch.Tensor, bits: int) -> list[dict[str, Any]]:
    side = min(HEAT_BINS, 2**bits)
    block = 2**bits // side
    means = weights.view(side, block, side, block).mean((1, 3))
    return [
        {"kind": "map", "bits": bits, "query": q, "key": k, "weight": float(means[q, k])}
        for q in range(side)
        for k in range(side)
    ]


def _helped(model: OneLayerTransformer, task: ConceptTask, count: int) -> float:
    """Return the fraction of contexts on which more attention inside the cluster lowers the loss.

    This is the sign of the loss gradient summed over the scores of the cluster's tokens. Lemma 6
    says that it is negative if W_V reads these tokens as evidence.
    """
    contexts = task.sample(count, torch.Generator().manual_seed(10_000 + model.config.seed))
    lower = []
    for chunk in zip(contexts.tokens.split(CHUNK), contexts.labels.split(CHUNK), strict=True):
        part = Contexts(*chunk)
        inside = context_layout(task, part.tokens, spans=("cluster",)).key("cluster")
        _, _, gradient = last_token_gradient(model, part)
        lower.append((gradient * inside).sum(1) < 0)
    return float(torch.cat(lower).double().mean())


def draw_clusters(table: pd.DataFrame, settings: ClusterSettings) -> Figure:
    """Draw mean attention from query to key tokens in a panel per m; titles give the fractions.

    All panels share one colour scale, on which 1 is uniform attention. Large vocabularies are
    averaged in blocks, `HEAT_BINS` to a side.
    """
    maps: Any = table[table["kind"] == "map"]
    brightest = maps["weight"].max()
    fractions = _best(table).groupby("bits")[["inside", "uniform"]].mean()
    with plots.panels(len(settings.bits), height=2.9) as (figure, axes):
        for panel, (bits, cells) in zip(axes, maps.groupby("bits", sort=False), strict=True):
            vocab = 2**bits
            panel.imshow(
                cells.pivot(index="query", columns="key", values="weight"),
                cmap="cividis",
                vmin=0,
                vmax=brightest,
                extent=(0.0, vocab, vocab, 0.0),
            )
            panel.grid(visible=False)
            inside, uniform = fractions.loc[bits]
            panel.set_title(f"m = {bits}: {inside:.0%} inside\n(uniform {uniform:.0%})", fontsize=9)
            panel.set_xticks(range(0, vocab + 1, vocab // 4))
            panel.set_yticks(range(0, vocab + 1, vocab // 4))
        plots.label_outer(axes, x="token attended to", y="last token")
        label = "attention to one copy, times V"
        figure.colorbar(axes[-1].images[0], ax=axes, label=label, shrink=0.8)
        return figure


def _best(table: Any) -> Any:
    """Return the rows of models at the better learning rate, by m."""
    return table[table.kind == "share"].set_index("bits")


def _analysis(
    name: str, support: str, *, bits: Any, quick: Any, recalled: tuple[str, ...] = ()
) -> Analysis:
    return Analysis(
        id=name,
        settings=scales(
            ClusterSettings(bits=bits, support=support),
            bits=quick,
            d_model=32,
            length=64,
            seeds=3,
            steps=1500,
        ),
        ours=(*RECIPE_OURS, "d_model", "length", "contexts", *recalled),
        run=attention_in_clusters,
        draw=draw_clusters,
        checks=(
            above(
                "attention inside the cluster exceeds the fraction of tokens there by .1 for "
                "every m",
                lambda t: lowest(every(_best(t).inside - _best(t).uniform, "bits")),
                0.1,
            ),
            above(
                "in trained models more attention inside lowers the loss on most contexts for "
                "every m",
                lambda t: lowest(every(_best(t).gradient_trained, "bits")),
                0.5,
            ),
        ),
    )


ANALYSES = (
    _analysis("fig3c", "first-bit", bits=(8,), quick=(6,)),
    _analysis("figc7", "first-bit", bits=(5, 6, 7, 8), quick=(5, 6)),
    _analysis("figc8", "first-two-bits", bits=(5, 6, 7, 8), quick=(5, 6), recalled=("support",)),
)
