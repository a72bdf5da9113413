"""Logits, loss and gradients of the one-layer model through token counts, many runs at once.

At the last position a context matters only through its last token and how often each token type
occurs (n), so equation 4.1 costs O(vocab) per context whatever its length. The backward pass is
written out, which halves the time of a step compared with autograd (no graph, no copies,
accumulation inside the matrix products). With x = W_E(last), all products on row vectors:

    q = x W_Q / sqrt(d_a)   u = q W_K^T   s = u W_E^T + log n   w = softmax s      the scores
    z = w W_E               o = z W_V     logits = o W_E^T                         the values

Each side can also be computed through a table over the vocabulary, which is done when it costs
fewer multiplications: first the scores of all V^2 pairs of token types, then the rows of the last
tokens (when vocab < batch); and logits = w T with T = W_E W_V W_E^T (small vocab, large batch or
d). The results are the same up to rounding.

Lemma 6 of the paper is the gradient with respect to a score, `d_scores` below.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.one_layer.architecture import NAMES, OneLayerWeights
from hijacklens.one_layer.task import token_counts


def log_counts(
    tokens: Int[Tensor, "batch pos"], vocab: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch vocab"]:
    """Return the logarithm of how often each token type occurs in each context; -inf for never.

    A table of pos + 1 logarithms is ten times faster than taking the logarithm of every count.
    """
    counts = token_counts(tokens, vocab).int()
    table = torch.arange(tokens.shape[-1] + 1, dtype=dtype, device=tokens.device).log()
    return table.index_select(0, counts.view(-1)).view(counts.shape)


def last_logits(
    log_counts: Float[Tensor, "batch vocab"], last: Int[Tensor, " batch"], weights: OneLayerWeights
) -> Float[Tensor, "batch vocab"]:
    """Return the logits at the last position: equation 4.1 through token types.

    Differentiable; `loss_and_gradients` computes the same with its gradients, for many runs. The
    `log_counts` include the last token.
    """
    W_E = weights.W_E
    query = W_E[last] @ weights.W_Q / weights.W_Q.shape[-1] ** 0.5
    scores = query @ weights.W_K.T @ W_E.T
    mass = (scores + log_counts).softmax(-1)  # exp(s + log n) = n exp s
    return mass @ W_E @ weights.W_V @ W_E.T


@dataclass(frozen=True, slots=True)
class ContextBatch:
    """The contexts of one step: one batch, or one for each run along a leading axis."""

    log_counts: Float[Tensor, "*run batch vocab"]
    last: Int[Tensor, "*run batch"]
    labels: Int[Tensor, "*run batch"]

    @classmethod
    def stack(cls, batches: Sequence[ContextBatch]) -> ContextBatch:
        """Stack the batches of several runs along a new first axis."""
        names = ("log_counts", "last", "labels")
        return cls(*(torch.stack([getattr(batch, name) for batch in batches]) for name in names))


@torch.no_grad()
def loss_and_gradients(
    batch: ContextBatch,
    weights: OneLayerWeights,
    gradients: OneLayerWeights,
    *,
    names: Collection[str] = NAMES,
) -> Float[Tensor, " run"]:
    """Return the mean cross-entropy of each run at the last position, in nats, with its gradients.

    Args:
        batch: The contexts of the step.
        weights: The stacked matrices of the runs.
        gradients: Overwritten with the gradients; contiguous, of the shapes of `weights`.
        names: Which gradients to compute. The others stay as they are, and work that only they
            need is skipped.
    """
    W_E, W_Q, W_K, W_V = weights.W_E, weights.W_Q, weights.W_K, weights.W_V
    runs, size, vocab = batch.log_counts.shape
    score_table, value_table = table_orders(size, vocab, W_E.shape[-1])
    scale = W_Q.shape[-1] ** -0.5
    first = torch.arange(0, runs * vocab, vocab, device=W_E.device)
    row = (batch.last + first[:, None]).view(-1)  # of the last tokens, in all runs' rows

    x = W_E if score_table else _take(W_E, row)
    q = torch.bmm(x, W_Q).mul_(scale)
    u = torch.bmm(q, W_K.mT)
    if score_table:
        scores = _take(torch.bmm(u, W_E.mT), row).add_(batch.log_counts)
    else:
        scores = torch.baddbmm(batch.log_counts, u, W_E.mT)
    mass = scores.softmax(-1)

    z = W_E if value_table else torch.bmm(mass, W_E)
    o = torch.bmm(z, W_V)
    table = torch.bmm(o, W_E.mT)  # the logits, or one row of them per token type
    logits = torch.bmm(mass, table) if value_table else table

    d_logits = logits.log_softmax(-1)
    label = batch.labels[..., None]
    loss = d_logits.gather(-1, label).mean((1, 2)).neg_()
    d_logits.exp_().scatter_add_(-1, label, d_logits.new_full((), -1.0).expand(label.shape))
    d_logits.div_(size)

    d_table = torch.bmm(mass.mT, d_logits) if value_table else d_logits
    d_o = torch.bmm(d_table, W_E)
    if "W_V" in names:
        torch.bmm(z.mT, d_o, out=gradients.W_V)
    embedding, attention = "W_E" in names, "W_Q" in names or "W_K" in names
    if not (embedding or attention):
        return loss
    d_z = torch.bmm(d_o, W_V.mT)
    d_mass = torch.bmm(d_logits, table.mT) if value_table else torch.bmm(d_z, W_E.mT)
    mean = torch.einsum("rbv,rbv->rb", mass, d_mass)
    d_scores = d_mass.sub_(mean[..., None]).mul_(mass)
    if score_table:
        of_tokens = d_scores.new_zeros(runs * vocab, vocab)
        d_scores = of_tokens.index_add_(0, row, d_scores.flatten(0, 1)).view(runs, vocab, vocab)
    d_u = torch.bmm(d_scores, W_E)
    d_q = torch.bmm(d_u, W_K).mul_(scale)
    if "W_K" in names:
        torch.bmm(d_u.mT, q, out=gradients.W_K)
    if "W_Q" in names:
        torch.bmm(x.mT, d_q, out=gradients.W_Q)
    if embedding:
        d_W_E = torch.bmm(d_table.mT, o, out=gradients.W_E)  # as the unembedding,
        d_W_E = d_W_E.add_(d_z) if value_table else d_W_E.baddbmm_(mass.mT, d_z)  # as values,
        d_W_E.baddbmm_(d_scores.mT, u)  # as keys,
        if score_table:  # and as queries
            d_W_E.baddbmm_(d_q, W_Q.mT)
        else:
            d_x = torch.bmm(d_q, W_Q.mT)
            d_W_E.view(-1, d_x.shape[-1]).index_add_(0, row, d_x.flatten(0, 1))
    return loss


def table_orders(batch: int, vocab: int, d_model: int) -> tuple[bool, bool]:
    """Return whether scores, and values, cost fewer multiplications through a vocab^2 table.

    Scores through a table take vocab rows instead of batch rows. Values take (W_E W_V) W_E^T and
    w T instead of z W_V W_E^T and w W_E.
    """
    rows = batch * d_model * (2 * vocab + d_model)
    table = vocab * d_model * (d_model + vocab) + batch * vocab**2
    return vocab < batch, table < rows


def _take(
    stacked: Float[Tensor, "run vocab width"], row: Int[Tensor, " rows"]
) -> Float[Tensor, "run batch width"]:
    """Return rows of the stacked matrices, the same number for each run."""
    runs, _, width = stacked.shape
    return stacked.reshape(-1, width).index_select(0, row).view(runs, -1, width)
