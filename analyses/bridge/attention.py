"""The bridge by attention: what the last token attends to, and how far the answer moves.

In a language model we compare the last token's attention to the hijacking sentences with the logit
shift, fact by fact and head by head. In the one-layer model we compare its attention to the last
token's cluster, the only informative tokens, with the margin of the label. One function reads both.

The first token of a prompt does not count as part of the hijack: heads attend to it if they have
nothing else to read, whatever the token is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from analyses.bridge.sides import LANGUAGE, ONE_LAYER, OURS, Sides, facts_of, one_layer
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import FEW, above, every, lowest
from analyses.reproduction.settings import scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.engine.batches import batches
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel
from hijacklens.one_layer.spans import layout as context_layout
from hijacklens.probe import HookProbe, logits_at
from hijacklens.prompts.layout import Layout, mark
from hijacklens.scoring.pairs import Pair, pairs
from hijacklens.statistics import Interval, clustered

SPANS = ("hijack", "at:0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSides(Sides):
    """The bridge of attention."""

    contexts: int
    scheme: str = "do-not-think"
    dose: int = 1


def attention(settings: AttentionSides, bench: Workbench) -> pd.DataFrame:
    """Return the last token's attention to the cues of the answer, and how far the answer moves.

    Rows of kind

    - `item`: a context or fact, with the attention to the cues as a mean over layers and heads
      (`mass`), the attention of the `strongest` head (chosen on the other half of the items),
      the fraction of tokens that are cues (`uniform`), and the movement of the answer in logits
      (`moves`): the margin of the label over the best other token, or the logit shift; and the
      `relation_id` of a fact;
    - `head`: the mean mass of a head, and `rank`, Spearman's correlation over items between its
      mass and the movement of the answer;
    - `skipped`: a fact that could not be read, with the reason.
    """
    parts = []
    result = one_layer(settings, bench)
    for seed, model in enumerate(result.best()):
        contexts = result.task.sample(settings.contexts, torch.Generator().manual_seed(seed))
        layout = context_layout(result.task, contexts.tokens, spans=("cluster",))
        cues = layout.key("cluster")
        last = torch.full_like(contexts.labels, result.task.length - 1)
        logits, mass = _attended(model, layout, last, cues)
        label = logits.gather(1, contexts.labels[:, None])[:, 0]
        others = logits.scatter(1, contexts.labels[:, None], -math.inf).amax(1)
        part = _rows(mass, cues.double().mean(1), label - others, range(len(mass)))
        parts.append(part.assign(side=ONE_LAYER, model=f"seed {seed}"))
    for name in bench.models:
        part = _language_rows(bench.language_model(name), settings, bench)
        parts.append(part.assign(side=LANGUAGE, model=name))
    return pd.concat(parts, ignore_index=True)


def _language_rows(model: Any, settings: AttentionSides, bench: Workbench) -> pd.DataFrame:
    facts, options = facts_of(settings, bench), {"dose": settings.dose, "seed": settings.seed}
    paired = pairs(model, facts, scheme=settings.scheme, **options)
    skipped = list(zip(paired.skipped["case_id"], paired.skipped["reason"], strict=True))
    readable = []
    for pair in paired:
        try:
            pair.answers()
            readable.append(pair)
        except InputError as reason:
            skipped.append((pair.fact.case_id, str(reason)))
    bare, _, _ = _answers(model, readable, hijacked=False)
    hijacked, mass, uniform = _answers(model, readable, hijacked=True)
    items = [pair.fact.case_id for pair in readable]
    relations = {pair.fact.case_id: pair.fact.relation_id for pair in readable}
    rows = _rows(mass, uniform, hijacked - bare, items)
    absent = pd.DataFrame(skipped, columns=["item", "reason"]).assign(kind="skipped")
    found = rows.assign(relation_id=rows["item"].map(relations))
    return pd.concat([found, absent], ignore_index=True)


def _answers(model: Any, pairs: list[Pair], *, hijacked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return logit o_ - logit o*, mass on the hijack [item, layer, head], and uniform mass."""
    prompts = [pair.hijacked if hijacked else pair.bare for pair in pairs]
    rows = [mark(p.ids, [p.positions(span) for span in SPANS]) for p in prompts]
    order: list[int] = []
    parts = []
    for batch in batches(model, rows):
        layout = Layout.of_symbols(batch.symbols, SPANS)
        cues = layout.key("hijack") & ~layout.key("at:0")
        logits, mass = _attended(model, layout, batch.lengths - 1, cues)
        targets = torch.tensor([pairs[i].answers() for i in batch.members])
        true, false = logits.gather(1, targets).T
        parts.append((false - true, mass, (cues.sum(1) / batch.lengths).cpu()))
        order += batch.members
    back = torch.tensor(order).argsort()
    odds, mass, uniform = (torch.cat(part)[back] for part in zip(*parts, strict=True))
    return odds, mass, uniform


def _attended(
    model: HookedModel, layout: Layout, last: Tensor, cues: Tensor
) -> tuple[Float[Tensor, "item vocab"], Float[Tensor, "item layer head"]]:
    """Return the logits at the last tokens and their attention to the cues, in any hooked model."""
    masses: dict[int, Tensor] = {}

    def keep(layer: int, pattern: Tensor, hook: Any) -> None:
        device = pattern.device
        rows = pattern[torch.arange(len(last), device=device), :, last.to(device)]
        masses[layer] = (rows.float() * cues.to(device)[:, None]).sum(-1).cpu()

    layers = range(int(model.cfg.n_layers))
    hooks = [(f"blocks.{i}.attn.hook_pattern", partial(keep, i)) for i in layers]
    reader = HookProbe("attention to the cues", hooks, packs=True)
    items = torch.arange(len(last), device=last.device)
    logits = logits_at(model, layout, items, last, probes=[reader]).float().cpu()
    return logits, torch.stack([masses[i] for i in layers], dim=1)


def _rows(mass: Tensor, uniform: Tensor, moves: Tensor, items: Any) -> pd.DataFrame:
    by_item = pd.DataFrame(
        {
            "kind": "item",
            "item": list(items),
            "mass": mass.mean((1, 2)).numpy(),
            "strongest": _strongest(mass).numpy(),
            "uniform": uniform.numpy(),
            "moves": moves.double().numpy(),
        }
    )
    by_head = pd.DataFrame(
        {
            "kind": "head",
            "layer": layer,
            "head": head,
            "mass": float(mass[:, layer, head].mean()),
            "rank": _spearman(mass[:, layer, head].numpy(), moves.numpy()).value,
        }
        for layer in range(mass.shape[1])
        for head in range(mass.shape[2])
    )
    return pd.concat([by_item, by_head], ignore_index=True)


def _strongest(mass: Tensor) -> Tensor:
    """Return per item the mass of the head that attends most on the other half of the items."""
    heads = mass.flatten(1)
    even = torch.arange(len(mass)) % 2 == 0
    strongest = torch.empty(len(mass))
    for half in (even, ~even):
        strongest[half] = heads[half, heads[~half].mean(0).argmax()]
    return strongest


def _spearman(first: Any, second: Any, *relations: Any) -> Interval:
    """Return Spearman's rank correlation with its 95% interval over items, or over relations.

    The interval is that of the linearised correlation of the ranks.
    """
    if len(first) < 4 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Interval(math.nan, math.nan, math.nan)
    x, y = (np.asarray(stats.zscore(stats.rankdata(values))) for values in (first, second))
    r = float((x * y).mean())
    found = clustered(x * y - r * (x**2 + y**2) / 2, *relations)
    return Interval(r, r + found.low, r + found.high)


def draw_attention(table: pd.DataFrame, settings: AttentionSides) -> Figure:
    """Draw mass against movement of the answer in a panel per model, and every head below it.

    Dotted: the fraction of tokens that are cues, which is what uniform attention gives. Grey bands:
    a correlation of 0 with the 95% interval above it, which for facts is clustered by relation;
    for one of several models, that of its part of the contexts.
    """
    items, heads = (table[table["kind"] == kind] for kind in ("item", "head"))
    # The one-layer models share a panel.
    names = table["model"].where(table["side"] == LANGUAGE, ONE_LAYER)
    groups = list(items.groupby(names, sort=False))
    with plots.canvas(2, len(groups), width=plots.PAGE / 3, height=2.6) as (figure, axes):
        upper, lower = axes[: len(groups)], axes[len(groups) :]
        for i, (name, rows) in enumerate(groups):
            one = name == ONE_LAYER
            colour, marker = plots.series(i)
            uniform = rows["uniform"].mean()
            # Thousands of points would make a large SVG.
            style = {"color": colour, "ms": 2 if one else 4, "alpha": 0.5, "rasterized": True}
            upper[i].plot(rows["mass"], rows["moves"], marker, **style)
            rank = _spearman(rows["mass"], rows["moves"], *_relations(rows))
            sample = f"contexts, {settings.seeds} seeds" if one else "facts"
            upper[i].set_title(
                f"{plots.escape(str(name))}, {len(rows)} {sample}\nrank correlation "
                f"{rank.value:.2f} [{rank.low:.2f}, {rank.high:.2f}]",
                fontsize=8,
            )
            cues = "cluster" if one else "hijack,\nmean over heads"
            upper[i].set_xlabel(f"attention to the {cues}", fontsize=8)
            moved = "margin of the label" if one else "logit shift ($o_-$ over $o_*$)"
            upper[i].set_ylabel(f"{moved}, logits", fontsize=8)
            label = "fraction of tokens there (uniform attention)"
            upper[i].axvline(uniform, color="#888888", ls=":", label=label)
            points = heads[names[heads.index] == name]
            lower[i].plot(points["mass"], points["rank"], marker, color=colour, ms=3, alpha=0.6)
            half = (rank.high - rank.low) / 2 * math.sqrt(settings.seeds if one else 1)
            label = "0 with the interval of the panel above"
            lower[i].axhspan(-half, half, color="#BBBBBB", alpha=0.4, lw=0, label=label)
            lower[i].axhline(0, color="black", lw=0.8)
            point = "model (one per seed)" if one else "head"
            lower[i].set_xlabel(f"mean attention of a {point}", fontsize=8)
            lower[i].axvline(uniform, color="#888888", ls=":")
            lower[i].set(xlim=(-0.02, 1.02), ylim=(-1.05, 1.05))
        lower[0].set_ylabel("rank correlation over items", fontsize=8)
        for panel in axes:
            panel.tick_params(labelsize=8)
        plots.legend_below(figure, axes)
        return figure


def _items(table: Any, side: str) -> Any:
    return table[(table.kind == "item") & (table.side == side)]


def _relations(items: Any) -> list[Any]:
    """Return the relations of facts, over which intervals are clustered; contexts have none."""
    return [items["relation_id"].to_numpy(str)] if items["relation_id"].notna().all() else []


def _beyond(table: Any, side: str, column: str) -> Interval:
    """Return the smallest over models of a column's mean excess over uniform attention."""
    rows = _items(table, side)
    clusters = rows.relation_id if side == LANGUAGE else None
    return lowest(every(rows[column] - rows.uniform, rows.model, clusters))


def _follows(table: Any) -> Interval:
    groups = _items(table, LANGUAGE).groupby("model")
    return lowest([_spearman(each.mass, each.moves, *_relations(each)) for _, each in groups])


ANALYSES = (
    Analysis(
        id="bridge-attention",
        settings=scales(
            AttentionSides(bits=8, support="first-bit", d_model=256, contexts=512),
            bits=6,
            d_model=32,
            length=64,
            seeds=3,
            steps=1500,
            contexts=256,
            limit=40,
        ),
        ours=(*OURS, "contexts", "scheme", "dose"),
        run=attention,
        draw=draw_attention,
        checks=(
            above(
                "one-layer: attention to the cluster exceeds uniform attention by .1, every seed",
                lambda t: _beyond(t, ONE_LAYER, "mass"),
                0.1,
            ),
            above(
                "in every language model the head that attends most to the hijack on other facts "
                "exceeds uniform attention (relations like these)",
                lambda t: _beyond(t, LANGUAGE, "strongest"),
                0.0,
                **FEW,
            ),
            above(
                "over facts the shift grows with attention to the hijack, in every language model "
                "(relations like these)",
                _follows,
                0.0,
                **FEW,
            ),
        ),
    ),
)
