"""The bridge by attention: what the last token attends to, and how far the answer moves.

In a language model: the attention of the last token to the hijacking sentences against the logit
shift, fact by fact and head by head. In the one-layer model: that to the last token's cluster, the
only tokens that tell anything, against the margin of the label. One function reads both.

The first token of a prompt is left out of the hijack: models put attention there that they have no
other use for, whatever it is.
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
from analyses.reproduction.check import above, lowest, mean
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.engine.batches import batches
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.one_layer.spans import layout as context_layout
from hijacklens.probe import HookProbe, logits_at
from hijacklens.prompts.layout import Layout, mark
from hijacklens.scoring.pairs import Pair, pairs
from hijacklens.statistics import Interval

SPANS = ("hijack", "at:0")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSides(Sides):
    """The bridge of attention."""

    contexts: int
    scheme: str = "do-not-think"
    dose: int = 1


def attention(settings: AttentionSides, bench: Workbench) -> pd.DataFrame:
    """Attention of the last token to what cues the answer, `mass`, and how far the answer moves.

    Rows of kind

    - `item`: a context or fact each, with the mass as a mean over layers and heads, that of the
      `strongest` head (chosen on the other half of the items), the share of tokens there
      (`uniform`), and what `moves` the answer, in logits: the margin of the label over the best
      other token, or the logit shift;
    - `head`: the mean mass of a head, and `rank`, Spearman's correlation over items of its mass
      with what moves;
    - `skipped`: facts that could not be read, with the reason.
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
    made = pairs(
        model,
        facts_of(settings, bench),
        scheme=settings.scheme,
        dose=settings.dose,
        seed=settings.seed,
    )
    skipped = list(zip(made.skipped["case_id"], made.skipped["reason"], strict=True))
    kept = []
    for pair in made:
        try:
            pair.answers()
            kept.append(pair)
        except InputError as reason:
            skipped.append((pair.fact.case_id, str(reason)))
    bare, _, _ = _answers(model, kept, hijacked=False)
    hijacked, mass, uniform = _answers(model, kept, hijacked=True)
    found = _rows(mass, uniform, hijacked - bare, [pair.fact.case_id for pair in kept])
    absent = pd.DataFrame(skipped, columns=["item", "reason"])
    return pd.concat([found, absent.assign(kind="skipped")], ignore_index=True)


def _answers(model: Any, pairs: list[Pair], *, hijacked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Per prompt: logit o_ - logit o*, the mass on the hijack [item, layer, head], its share."""
    prompts = [pair.hijacked if hijacked else pair.bare for pair in pairs]
    rows = [mark(p.ids, [p.positions(span) for span in SPANS]) for p in prompts]
    order: list[int] = []
    found = []
    for batch in batches(rows, device=device_of(model)):
        layout = Layout.of_symbols(batch.symbols, SPANS)
        cues = layout.key("hijack") & ~layout.key("at:0")
        logits, mass = _attended(model, layout, batch.lengths - 1, cues)
        targets = torch.tensor([pairs[i].answers() for i in batch.members])
        true, false = logits.gather(1, targets).T
        found.append((false - true, mass, (cues.sum(1) / batch.lengths).cpu()))
        order += batch.members
    back = torch.tensor(order).argsort()
    odds, mass, uniform = (torch.cat(part)[back] for part in zip(*found, strict=True))
    return odds, mass, uniform


def _attended(
    model: HookedModel, layout: Layout, last: Tensor, cues: Tensor
) -> tuple[Float[Tensor, "item vocab"], Float[Tensor, "item layer head"]]:
    """The logits at the last tokens, and what these attend to the cues, in any hooked model."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, pattern: Tensor, hook: Any) -> None:
        device = pattern.device
        rows = pattern[torch.arange(len(last), device=device), :, last.to(device)]
        found[layer] = (rows.float() * cues.to(device)[:, None]).sum(-1).cpu()

    layers = range(int(model.cfg.n_layers))
    hooks = [(f"blocks.{i}.attn.hook_pattern", partial(keep, i)) for i in layers]
    reader = HookProbe("attention to the cues", hooks, packs=True)
    items = torch.arange(len(last), device=last.device)
    logits = logits_at(model, layout, items, last, probes=[reader]).float().cpu()
    return logits, torch.stack([found[i] for i in layers], dim=1)


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
    """Per item the mass of the head that is the most attentive on the other half of the items."""
    heads = mass.flatten(1)
    half = torch.arange(len(mass)) % 2 == 0
    found = torch.empty(len(mass))
    for own in (half, ~half):
        found[own] = heads[own, heads[~own].mean(0).argmax()]
    return found


def _spearman(first: Any, second: Any) -> Interval:
    """Spearman's rank correlation with its 95% interval by Fisher's z (Bonett and Wright 2000)."""
    n = len(first)
    if n < 4 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Interval(math.nan, math.nan, math.nan)
    found: Any = stats.spearmanr(first, second)
    r = float(found.statistic)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + r * r / 2) / (n - 3))
    z = math.atanh(max(min(r, 1 - 1e-12), -1 + 1e-12))
    return Interval(r, math.tanh(z - half), math.tanh(z + half))


def draw_attention(table: pd.DataFrame, settings: AttentionSides) -> Figure:
    """Mass against what moves the answer, a panel per model; below it the mass of every head.

    Dotted: the share of tokens there, which is what uniform attention gives. Grey bands: rank
    correlations that mean nothing at so many items (95%).
    """
    items: Any = table[table["kind"] == "item"]
    heads: Any = table[table["kind"] == "head"]
    groups: list[tuple[Any, Any]] = [(ONE_LAYER, items[items["side"] == ONE_LAYER])]
    groups += list(items[items["side"] == LANGUAGE].groupby("model", sort=False))
    with plots.canvas(2, len(groups), width=plots.PAGE / 3, height=2.6) as (figure, axes):
        upper, lower = axes[: len(groups)], axes[len(groups) :]
        for i, (name, own) in enumerate(groups):
            colour, marker = plots.series(i)
            one = name == ONE_LAYER
            upper[i].plot(
                own["mass"],
                own["moves"],
                marker,
                color=colour,
                ms=2 if one else 4,
                alpha=0.5,
                rasterized=True,  # thousands of points would make a large SVG
            )
            uniform = "share of tokens there (uniform attention)"
            upper[i].axvline(own["uniform"].mean(), color="#888888", ls=":", label=uniform)
            rank = _spearman(own["mass"], own["moves"])
            of = "contexts" if one else "facts"
            drawn_from = f"{of}, {settings.seeds} seeds" if one else of
            upper[i].set_title(
                f"{name}, {len(own)} {drawn_from}\nrank correlation "
                f"{rank.value:.2f} [{rank.low:.2f}, {rank.high:.2f}]",
                fontsize=8,
            )
            where = "cluster" if one else "hijack,\nmean over heads"
            upper[i].set_xlabel(f"attention to the {where}", fontsize=8)
            moved = "margin of the label" if one else "logit shift ($o_-$ over $o_*$)"
            upper[i].set_ylabel(f"{moved}, logits", fontsize=8)
            of_heads = heads[heads["side"] == ONE_LAYER if one else heads["model"] == name]
            lower[i].plot(of_heads["mass"], of_heads["rank"], marker, color=colour, ms=3, alpha=0.6)
            per_head = len(own) // (settings.seeds if one else 1)
            nothing = float(stats.norm.ppf(0.975)) / math.sqrt(max(per_head - 3, 1))
            chance = "95% of what chance gives"
            lower[i].axhspan(-nothing, nothing, color="#BBBBBB", alpha=0.4, lw=0, label=chance)
            lower[i].axhline(0, color="black", lw=0.8)
            one_point = "model (a seed each)" if one else "head"
            lower[i].set_xlabel(f"mean attention of a {one_point}", fontsize=8)
            lower[i].axvline(own["uniform"].mean(), color="#888888", ls=":")
            lower[i].set(xlim=(-0.02, 1.02), ylim=(-1.05, 1.05))
        lower[0].set_ylabel("rank correlation over items", fontsize=8)
        for panel in axes:
            panel.tick_params(labelsize=8)
        plots.legend_below(figure, axes)
        return figure


def _items(table: Any, side: str) -> Any:
    return table[(table.kind == "item") & (table.side == side)]


def _inside(table: Any) -> Interval:
    """Attention inside the cluster beyond the share of tokens there, over contexts, per seed."""
    groups = _items(table, ONE_LAYER).groupby("model")
    return lowest([mean(own.mass - own.uniform) for _, own in groups])


def _beyond(table: Any) -> Interval:
    """Attention of the strongest head beyond the share of tokens there, over facts, per model."""
    groups = _items(table, LANGUAGE).groupby("model")
    return lowest([mean(own.strongest - own.uniform) for _, own in groups])


def _follows(table: Any) -> Interval:
    groups = _items(table, LANGUAGE).groupby("model")
    return lowest([_spearman(own.mass, own.moves) for _, own in groups])


FEW = "over the facts of the quick scale the interval is too wide"

ANALYSES = (
    Analysis(
        id="bridge-attention",
        settings={
            "quick": AttentionSides(
                bits=6,
                support="first-bit",
                d_model=32,
                length=64,
                seeds=3,
                steps=1500,
                learning_rates=(0.01,),
                contexts=256,
                limit=40,
            ),
            "paper": AttentionSides(
                bits=8,
                support="first-bit",
                d_model=256,
                length=256,
                seeds=5,
                steps=4000,
                contexts=512,
                limit=None,
            ),
        },
        ours=(*OURS, "contexts", "scheme", "dose"),
        run=attention,
        draw=draw_attention,
        checks=(
            above(
                "one-layer: attention to the cluster exceeds uniform attention by .1, every seed",
                _inside,
                0.1,
            ),
            above(
                "in every language model the head strongest on other facts exceeds uniform",
                _beyond,
                0.0,
                scales=("paper",),
                remark=FEW,
            ),
            above(
                "over facts the shift grows with attention to the hijack, in every language model",
                _follows,
                0.0,
                scales=("paper",),
                remark=FEW,
            ),
        ),
    ),
)
