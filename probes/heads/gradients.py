"""Attribution patching of heads: what ablating each one would do, from one backward pass.

The exact effect of ablating a head needs a run for every head. To first order all of them come
from the gradient of D = (logit o_ - logit o*) at the heads' outputs z: replacing z by `a` at every
token changes D by `sum over tokens of dD/dz . (a - z)` (Nanda 2023; Kramar et al. 2024). Of the
hijacked run minus the bare one, with the sign turned, that is how much of the logit shift a head
*carries*: what would go away without it, in logits.

A first-order guess is worst where much is taken away. A head that dominates the residual stream
is underrated when it is compared with zero, as the norms behind it take its scale out; heads of
the first layers, which everything passes through, can even get the wrong sign.

TransformerLens' own `tools.analysis.attribution_patching` compares two runs of one length and
takes a TransformerBridge alone; here the bare and the hijacked prompt differ in length, and the
reference is an ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.engine.batches import Batch, batches
from hijacklens.models.hooked import (
    HookedLanguageModel,
    HookFunction,
    NamedHook,
    device_of,
    hooked,
    require_eval,
)
from hijacklens.prompts.tokens import TokenIds
from hijacklens.scoring.items import Item
from probes.ablation import MeanOutputs

GRADIENT_TOKENS = 1_024
"""Default size of a batch, in tokens: a backward pass keeps the activations of every layer."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A sequence to run, and what is read behind it."""

    ids: TokenIds
    reads: tuple[tuple[int, int], ...]
    """Token and its sign in D; both targets stand behind one sequence, save where tokenisers
    join a target with the end of the prompt."""
    fact: int
    weight: int
    """1 for a hijacked prompt, -1 for a bare one."""


def gradient_attribution(
    model: HookedLanguageModel,
    items: Sequence[Item],
    case_ids: Sequence[int],
    *,
    means: MeanOutputs | None = None,
    batch_tokens: int | None = None,
    advance: Callable[[float], object] = lambda share: None,
) -> Float[np.ndarray, "fact layer head"]:
    """How much of the shift of each fact every head carries, to first order, in logits.

    Args:
        model: A hooked language model; query heads are counted, also where they share keys.
        items: Items of the facts without probes, each at dose 0 and at one other.
        case_ids: The facts, in the order of the result; items of others are left out.
        means: What a head's output would be replaced by; None for zero.
        batch_tokens: Size of a batch in tokens, padding included, if smaller than the usual one.
        advance: Called after each batch with the share of the work that it was.

    Returns:
        Positive where the shift would be smaller without the head. A target of several tokens
        counts by its first one.

    Note:
        Costs a forward and a backward pass over both prompts of every fact. Parameters get no
        gradient, whether or not they are frozen.
    """
    require_eval(model, operation="attribution")
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    found = np.zeros((len(case_ids), n_layers, n_heads))
    rows = _rows(items, {case: i for i, case in enumerate(case_ids)})
    limit = min(GRADIENT_TOKENS, batch_tokens or GRADIENT_TOKENS)
    for batch in batches([row.ids for row in rows], device=device_of(model), limit=limit):
        members = [rows[i] for i in batch.members]
        effects = _effects(model, batch, members, means)
        for row, effect in zip(members, effects, strict=True):
            found[row.fact] += row.weight * effect
        advance(len(members) / len(rows))
    return found


def _rows(items: Sequence[Item], places: Mapping[int, int]) -> list[_Row]:
    rows: list[_Row] = []
    for item in items:
        if item.fact.case_id not in places:
            continue
        reads: dict[TokenIds, list[tuple[int, int]]] = {}
        for steps, sign in ((item.false, 1), (item.true, -1)):
            ids, token = steps[0]
            reads.setdefault(ids, []).append((token, sign))
        weight = 1 if item.prompt.dose else -1
        place = places[item.fact.case_id]
        rows.extend(_Row(ids, tuple(listed), place, weight) for ids, listed in reads.items())
    return rows


def _effects(
    model: HookedLanguageModel, batch: Batch, rows: Sequence[_Row], means: MeanOutputs | None
) -> Float[np.ndarray, "batch layer head"]:
    """`dD/dz . (z - a)` of every row and head, summed over tokens.

    Padding adds nothing: D does not depend on what stands behind the last token.
    """
    n_layers = int(model.cfg.n_layers)
    outputs: dict[int, Tensor] = {}
    nudges: dict[int, Tensor] = {}

    def watch(layer: int) -> HookFunction:
        def hook_function(z: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_head]
            # A nudge of zero has the gradient of z, also in a model whose weights are frozen.
            nudges[layer] = torch.zeros_like(z, requires_grad=True)
            outputs[layer] = z.detach()
            return z + nudges[layer]

        return hook_function

    def keep_last(residual: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        last = (batch.lengths - 1).to(residual.device)
        return residual[torch.arange(len(last), device=last.device), last][None]

    hooks: list[NamedHook] = [
        (f"blocks.{layer}.attn.hook_z", watch(layer)) for layer in range(n_layers)
    ]
    hooks.append(("unembed.hook_in", keep_last))
    forward = {"use_cache": False} if isinstance(model, TransformerBridge) else {}
    with torch.inference_mode(False), torch.enable_grad(), hooked(model, hooks):
        logprobs = model(batch.symbols, **forward)[0].float().log_softmax(-1)  # [batch, vocab]
        reads = [(i, token, sign) for i, row in enumerate(rows) for token, sign in row.reads]
        at_row, token, sign = torch.tensor(reads, device=logprobs.device).T
        difference = (logprobs[at_row, token] * sign).sum()
        gradients = torch.autograd.grad(difference, [nudges[i] for i in range(n_layers)])
    effects = []
    for layer, gradient in enumerate(gradients):
        z = outputs[layer].float()
        mean = 0.0 if means is None else means.values[layer].to(z.device)
        effects.append((gradient.float() * (z - mean)).sum((1, 3)).cpu())  # [batch, head]
    return torch.stack(effects, dim=1).double().numpy()
