"""The last-position logits of the one-layer model from token types alone: the fast path.

Without positions, a score depends only on two token types, and all copies of a token type get the
same attention. So a context enters only through its last token and through how often each token
type occurs in it, and no [pos, pos] pattern is ever built:

    context -> last token, log n(t) of the counts n(t)            [batch], [batch, vocab]
    scores    s(t) = <W_E(last) W_Q, W_E(t) W_K> / sqrt(d_a)      [batch, vocab]
    mass      w(t) = n(t) exp s(t) / sum_t' n(t') exp s(t')       [batch, vocab]
    logits    = w W_E W_V W_E^T                                   [batch, vocab]

This is equation 4.1 of the paper, exactly: only the order of the sums differs from the hooked
model of `hijacklens.concepts.model`. All matrices act on row vectors (the paper's are the
transposes). Every function takes any number of leading axes, so that many runs of a sweep are
one batched product. The length of the context appears in no product.

>>> log_counts(torch.tensor([[3, 1, 3, 0]]), 4).exp()
tensor([[1., 1., 0., 2.]])
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_counts(
    tokens: Int[Tensor, "*axes pos"], vocab: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*axes vocab"]:
    """Logarithm of how often each token type occurs in each context; -inf where it does not.

    One pass over the tokens and one over the counts. Counted with `scatter_add`: `bincount` needs
    offsets of its own and, on a GPU, waits for the device. The logarithm is read from a table of
    pos + 1 entries: computing it costs ten times more, for the many zeros above all.
    """
    counts = torch.zeros(*tokens.shape[:-1], vocab, dtype=torch.int32, device=tokens.device)
    one = torch.ones((), dtype=torch.int32, device=tokens.device)
    counts.scatter_add_(-1, tokens.long(), one.expand(tokens.shape))
    table = torch.arange(tokens.shape[-1] + 1, dtype=dtype, device=tokens.device).log()
    return table.index_select(0, counts.view(-1)).view(counts.shape)


def attention_mass(
    log_counts: Float[Tensor, "*axes batch vocab"],
    last: Int[Tensor, "*axes batch"],
    W_E: Float[Tensor, "*axes vocab d_model"],
    W_Q: Float[Tensor, "*axes d_model d_attn"],
    W_K: Float[Tensor, "*axes d_model d_attn"],
) -> Float[Tensor, "*axes batch vocab"]:
    """The attention that the last position gives to each token type, all its copies together.

    Rows sum to 1; a token type that does not occur gets 0.
    """
    index = last.long()[..., None].expand(*last.shape, W_E.shape[-1])
    query = W_E.gather(-2, index) @ W_Q / W_Q.shape[-1] ** 0.5
    scores = query @ W_K.mT @ W_E.mT
    return (scores + log_counts).softmax(-1)  # exp(s + log n) = n exp s


def last_logits(
    log_counts: Float[Tensor, "*axes batch vocab"],
    last: Int[Tensor, "*axes batch"],
    *,
    W_E: Float[Tensor, "*axes vocab d_model"],
    W_Q: Float[Tensor, "*axes d_model d_attn"],
    W_K: Float[Tensor, "*axes d_model d_attn"],
    W_V: Float[Tensor, "*axes d_model d_model"],
) -> Float[Tensor, "*axes batch vocab"]:
    """The logits at the last position: equation 4.1 through token types.

    Differentiable. Training uses `hijacklens.concepts.gradients`, which computes the same and its
    gradients by hand.

    Args:
        log_counts: What `log_counts` gives for the contexts, their last token included.
        last: The last token of each context.
        W_E: Embeddings, a row per token; tied, so they unembed too.
        W_Q: Query matrix of the one head.
        W_K: Key matrix.
        W_V: Value matrix.
    """
    mass = attention_mass(log_counts, last, W_E, W_Q, W_K)
    return mass @ W_E @ W_V @ W_E.mT
