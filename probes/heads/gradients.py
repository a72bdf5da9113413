"""Attribution patching of heads: an estimate of what ablating each head does, by one backward pass.

The exact effect of ablating a head needs a run for every head. To first order all effects follow
from the gradient of D = (logit o_ - logit o*) at the heads' outputs z: replacing z by `a` at every
token changes D by `sum over tokens of dD/dz . (a - z)` (Nanda 2023; Kramar et al. 2024). The
difference of the hijacked and the bare run, with opposite sign, is how much of the logit shift a
head *carries*: what would vanish without it, in logits.

The estimate is worst for large changes. A head that dominates the residual stream is underrated
when it is compared with zero, since the norms after it remove its scale; heads of the first layers,
which everything passes through, can even get the wrong sign.

`tools.analysis.attribution_patching` of TransformerLens compares two runs of one length and takes
only a TransformerBridge. Here the two prompts differ in length, and the reference is an ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.engine.batches import TokenBatch, batches
from hijacklens.errors import InputError
from hijacklens.models.agreement import require_agreement
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedLanguageModel, HookFunction, NamedHook, hooked
from hijacklens.prompts.tokens import TokenIds
from hijacklens.scoring.pairs import Pair, Pairs
from hijacklens.sites import choose
from probes.ablation import MeanOutputs

GRADIENT_TOKENS = 1_024
"""Default size of a batch, in tokens: a backward pass keeps the activations of every layer."""


class _Row(NamedTuple):
    """A sequence to run, and the tokens that are read after it."""

    ids: TokenIds
    reads: list[tuple[int, int]]
    """Token and its sign in D. Both targets follow one sequence, unless the tokenizer joins a
    target with the end of the prompt."""
    fact: int
    weight: int
    """1 for a hijacked prompt, -1 for a bare one."""


@exclusively
def gradient_attribution(
    model: HookedLanguageModel,
    pairs: Pairs,
    *,
    means: MeanOutputs | None = None,
    batch_tokens: int | None = None,
    advance: Callable[[float], object] = lambda fraction: None,
) -> Float[np.ndarray, "fact layer head"]:
    """Return how much of the shift of each fact every query head carries, in logits.

    The numbers are positive where the shift would be smaller without the head. Only the first token
    of a target counts. Costs a forward and a backward pass over both prompts of every fact;
    parameters get no gradient, whether or not they are frozen.

    Args:
        model: A hooked language model.
        pairs: The prompt pairs, in the order of the result.
        means: The replacement of a head's output; None for zero.
        batch_tokens: Size of a batch in tokens, padding included, if below `GRADIENT_TOKENS`.
        advance: Called after each batch with its fraction of the work.
    """
    require_agreement(model, operation="attribution")
    carried = np.zeros((len(pairs), int(model.cfg.n_layers), int(model.cfg.n_heads)))
    rows = [row for i, pair in enumerate(pairs) for row in _rows(i, pair)]
    limit = min(GRADIENT_TOKENS, batch_tokens or GRADIENT_TOKENS)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InputError(
            "attribution needs gradients, and this model was loaded inside torch.inference_mode(). "
            "Load it outside; the search itself may run inside."
        )
    with torch.inference_mode(False):  # batches, too, must be tensors that autograd can save
        for batch in batches(model, [row.ids for row in rows], limit=limit):
            members = [rows[i] for i in batch.members]
            effects = _effects(model, batch, members, means)
            for row, effect in zip(members, effects, strict=True):
                carried[row.fact] += row.weight * effect
            advance(len(members) / len(rows))
    return carried


def _rows(fact: int, pair: Pair) -> Iterable[_Row]:
    for weight, item in zip((-1, 1), pair.items, strict=True):
        reads: dict[TokenIds, list[tuple[int, int]]] = {}
        for steps, sign in ((item.false, 1), (item.true, -1)):
            ids, token = steps[0]
            reads.setdefault(ids, []).append((token, sign))
        yield from (_Row(ids, listed, fact, weight) for ids, listed in reads.items())


def _effects(
    model: HookedLanguageModel, batch: TokenBatch, rows: Sequence[_Row], means: MeanOutputs | None
) -> Float[np.ndarray, "batch layer head"]:
    """Return `dD/dz . (z - a)` of every row and head, summed over tokens.

    Padding adds nothing, since D does not depend on what follows the last token. Heads that do not
    exist (hybrids) have no effect.
    """
    layers = list(choose(model).by_layer)
    outputs: dict[int, Tensor] = {}
    nudges: dict[int, Tensor] = {}

    def watch(layer: int) -> HookFunction:
        def hook_function(z: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_head]
            # A nudge of zero has the gradient of z, even if the weights of the model are frozen.
            nudges[layer] = torch.zeros_like(z, requires_grad=True)
            outputs[layer] = z.detach()
            return z + nudges[layer]

        return hook_function

    def keep_last(residual: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        last = (batch.lengths - 1).to(residual.device)
        return residual[torch.arange(len(last), device=last.device), last][None]

    hooks: list[NamedHook] = [("unembed.hook_in", keep_last)]
    hooks += [(f"blocks.{layer}.attn.hook_z", watch(layer)) for layer in layers]
    forward = {"use_cache": False} if isinstance(model, TransformerBridge) else {}
    with torch.enable_grad(), hooked(model, hooks):
        logprobs = model(batch.symbols, **forward)[0].float().log_softmax(-1)  # [batch, vocab]
        reads = [(i, token, sign) for i, row in enumerate(rows) for token, sign in row.reads]
        at_row, token, sign = torch.tensor(reads, device=logprobs.device).T
        difference = (logprobs[at_row, token] * sign).sum()
        gradients = torch.autograd.grad(difference, [nudges[i] for i in layers])
    effects = np.zeros((len(rows), int(model.cfg.n_layers), int(model.cfg.n_heads)))
    for layer, gradient in zip(layers, gradients, strict=True):
        z = outputs[layer].float()
        mean = 0.0 if means is None else means.values[layer].to(z.device)
        effects[:, layer] = (gradient.float() * (z - mean)).sum((1, 3)).cpu()  # [batch, head]
    return effects
