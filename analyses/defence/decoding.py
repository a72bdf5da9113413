"""Decoding methods: how the distributions with and without the context become one.

A rule takes log-probabilities over the vocabulary, [row, vocab], after the prompt with its context
and after the prompt alone, and returns those that are scored. With p and q the two distributions:

    against context    (1 + alpha) log p - alpha log q, with alpha in -1..0   CAD, opposite sign
    adaptive           the same with alpha = -JSD(p, q), in bits               AdaCAD, opposite sign
    gate               log q where max q >= threshold, otherwise log p         the idea of NWCAD

CAD (Shi et al. 2024, arXiv 2305.14739) and AdaCAD (Wang et al. 2025, arXiv 2409.07394) amplify the
context with a positive alpha; with alpha = -1 only the prompt alone counts. NWCAD (arXiv
2604.16686) backs off to the prompt alone if the context is not informative; our gate asks only how
certain the model is without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batches import batches
from hijacklens.models.agreement import require_agreement
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.probe import logits_at
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds

LogProbs: TypeAlias = Float[Tensor, "row vocab"]
Rule: TypeAlias = Callable[..., Tensor]
PLACEBO = "placebo of "
"""Beginning of the name of a placebo."""
AT_ONCE = 32
"""Contexts read together; each row has the logits of the vocabulary."""


def against_context(context: LogProbs, alone: LogProbs, *, alpha: float) -> LogProbs:
    """Return CAD with a negative alpha."""
    return _contrast(context, alone, torch.tensor(alpha))


def adaptive(context: LogProbs, alone: LogProbs) -> LogProbs:
    """Return AdaCAD with the opposite sign: the more both runs differ, the less context counts."""
    return _contrast(context, alone, -divergence(context, alone)[:, None])


def gate(context: LogProbs, alone: LogProbs, *, threshold: float) -> LogProbs:
    """Return the prompt alone where its likeliest token has this probability, else the context."""
    certain = alone.amax(-1, keepdim=True) >= math.log(threshold)
    return torch.where(certain, alone, context)


def divergence(context: LogProbs, alone: LogProbs) -> Float[Tensor, " row"]:
    """Return the Jensen-Shannon divergence of two distributions in bits, from 0 to 1.

    >>> certain, other = torch.tensor([[0.0, -99.0]]), torch.tensor([[-99.0, 0.0]])
    >>> divergence(certain, other).tolist(), divergence(certain, certain).tolist()
    ([1.0], [0.0])
    """
    mixed = torch.logaddexp(context, alone) - math.log(2)
    parts = torch.stack([(p.exp() * (p - mixed)).sum(-1) for p in (context, alone)])
    return (parts.mean(0) / math.log(2)).clamp(0, 1)


def _contrast(context: Tensor, alone: Tensor, alpha: Tensor) -> Tensor:
    return ((1 + alpha) * context - alpha * alone).log_softmax(-1)


def read_pairs(
    model: HookedLanguageModel,
    prompts: Sequence[tuple[TokenIds, TokenIds, tuple[int, int]]],
    rules: Mapping[str, Rule],
) -> dict[str, Float[np.ndarray, "prompt 2"]]:
    """Return the log-probabilities of two answers by each rule, in nats.

    Costs one forward pass over all prompts without probes; nothing is stored.

    Args:
        model: The model.
        prompts: The prompt alone, the prompt with its context, and two answers, as tokens.
        rules: Name -> rule. A rule whose name begins with `PLACEBO` gets the prompt alone of
            another fact.

    Raises:
        InputError: The model is in training mode, or with hook points it is not the plain model.
    """
    require_agreement(model, operation="decoding")
    order = sorted(range(len(prompts)), key=lambda i: prompts[i][0])
    found = {name: np.empty((len(prompts), 2)) for name in rules}
    for part in np.array_split(order, -(-len(order) // AT_ONCE)):
        own = [prompts[i] for i in part]
        distinct = list(dict.fromkeys(alone for alone, _, _ in own))
        member = [distinct.index(alone) for alone, _, _ in own]
        alone, context = _logprobs(model, distinct), _logprobs(model, [ids for _, ids, _ in own])
        answers = torch.tensor([pair for _, _, pair in own])
        for name, rule in rules.items():
            other = alone.roll(1, 0) if name.startswith(PLACEBO) else alone
            found[name][part] = rule(context, other[member]).gather(1, answers).numpy()
    return found


def _logprobs(model: HookedLanguageModel, rows: Sequence[TokenIds]) -> LogProbs:
    """Return the log-probabilities after each row, on the CPU in float32."""
    found: dict[int, Tensor] = {}
    for batch in batches(model, rows):
        at = torch.arange(len(batch.members), device=batch.lengths.device)
        logits = logits_at(model, Layout.of_symbols(batch.symbols, ()), at, batch.lengths - 1)
        found.update(zip(batch.members, logits.float().log_softmax(-1).cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(rows))])
