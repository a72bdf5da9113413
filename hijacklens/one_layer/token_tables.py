"""The last-position logits of the one-layer model from token types alone: the fast path.

Without positions, a score depends only on two token types, and all copies of a token type get the
same attention. So a context enters only through its last token and through how often each token
type occurs in it, and no [pos, pos] pattern is ever built:

    context -> last token, log n(t) of the counts n(t)            [batch], [batch, vocab]
    scores    s(t) = <W_E(last) W_Q, W_E(t) W_K> / sqrt(d_a)      [batch, vocab]
    mass      w(t) = n(t) exp s(t) / sum_t' n(t') exp s(t')       [batch, vocab]
    logits    = w W_E W_V W_E^T                                   [batch, vocab]

This is equation 4.1 of the paper, exactly: only the order of the sums differs from the hooked
model of `hijacklens.one_layer.model`. All matrices act on row vectors (the paper's are the
transposes). The length of the context appears in no product.

>>> log_counts(torch.tensor([[3, 1, 3, 0]]), 4).exp()
tensor([[1., 1., 0., 2.]])
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.one_layer.memory import OneLayerWeights
from hijacklens.one_layer.task import token_counts


def log_counts(
    tokens: Int[Tensor, "batch pos"], vocab: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch vocab"]:
    """Logarithm of how often each token type occurs in each context; -inf where it does not.

    It is read from a table of pos + 1 entries: to compute it costs ten times more, above all for
    the many zeros.
    """
    counts = token_counts(tokens, vocab).int()
    table = torch.arange(tokens.shape[-1] + 1, dtype=dtype, device=tokens.device).log()
    return table.index_select(0, counts.view(-1)).view(counts.shape)


def last_logits(
    log_counts: Float[Tensor, "batch vocab"], last: Int[Tensor, " batch"], weights: OneLayerWeights
) -> Float[Tensor, "batch vocab"]:
    """The logits at the last position: equation 4.1 through token types.

    Differentiable. Training uses `hijacklens.one_layer.fast_path`, which computes the same and its
    gradients by hand, for many runs at once.

    Args:
        log_counts: What `log_counts` gives for the contexts, their last token included.
        last: The last token of each context.
        weights: The matrices.
    """
    W_E = weights.W_E
    query = W_E[last] @ weights.W_Q / weights.W_Q.shape[-1] ** 0.5
    scores = query @ weights.W_K.T @ W_E.T
    mass = (scores + log_counts).softmax(-1)  # exp(s + log n) = n exp s
    return mass @ W_E @ weights.W_V @ W_E.T
