"""What many tests of the one-layer model draw from."""

from __future__ import annotations

import torch

from hijacklens.one_layer import memory
from hijacklens.one_layer.task import ConceptTask, token_counts


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def upward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Not symmetric: a token's neighbours are above it; the last token's are all others."""
    return (b > a) | (a == a.max())


def uniform_attention(task: ConceptTask, W_E: torch.Tensor, W_V: torch.Tensor):
    """Tokens -> last-position logits under uniform attention."""
    return lambda tokens: memory.uniform_logits(
        token_counts(tokens, task.vocab, dtype=W_E.dtype), W_E=W_E, W_V=W_V
    )


def theorem_1_scores(task: ConceptTask):
    """Tokens -> last-position logits of the model of Theorem 1."""
    weights = memory.theorem_1(task)
    return uniform_attention(task, weights.W_E, weights.W_V)
