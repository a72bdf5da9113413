"""Value matrices that are associative memories by construction, and the logits they give.

Section 5 of the paper. All matrices here act on row vectors, as in TransformerLens: embeddings
are the rows of W_E [vocab, d_model] and a value is `x @ W_V`. The paper writes tokens as columns,
so its W_V is the transpose of ours. Its equation 5.1,

    W_V(paper) = sum_t W_E(t) ( sum_{t' in N1(t)} W_E(t')^T ) = W_E^T A W_E,
    A[t, t'] = 1 if t' is in N(t) at Hamming distance 1,

is W_E^T A^T W_E here: a context token t' votes for every t that has it as a neighbour. For the
named supports A is symmetric and the two are equal; for a rule of your own they need not be.

A scale of W_V does not change the argmax of the logits, but it does change the cross-entropy.

>>> import torch
>>> from hijacklens.one_layer.task import ConceptTask
>>> task = ConceptTask(bits=3, omega=1.0)
>>> weights = theorem_1(task)
>>> logits = uniform_logits(task.token_distribution(), W_E=weights.W_E, W_V=weights.W_V)
>>> bool((logits.argmax(1) == torch.arange(8)).all())
True
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.one_layer.architecture import OneLayerWeights
from hijacklens.one_layer.embeddings import orthonormal
from hijacklens.one_layer.task import ConceptTask


def constructed(
    embedding: Float[Tensor, "vocab d_model"], task: ConceptTask
) -> Float[Tensor, "d_model d_model"]:
    """The memory of equation 5.1, W_E^T A^T W_E on row vectors, unscaled as in the paper.

    Raises:
        InputError: The embedding has another number of tokens than the task, or no token of the
            task has a neighbour at Hamming distance 1.
    """
    _check_tokens(embedding, task)
    return _lookup(embedding, _near(task).to(embedding))


def random(
    embedding: Float[Tensor, "vocab d_model"], task: ConceptTask, generator: torch.Generator
) -> Float[Tensor, "d_model d_model"]:
    """The random memory of figures C.2 and C.3: equation 5.1 with partners drawn by chance.

    Each token t keeps as many partners as it has neighbours in N1(t), drawn uniformly from all
    tokens with replacement. Nothing is excluded, neither t nor its true neighbours; the paper's
    exclusions are not known, this choice is ours.

    Raises:
        InputError: As for `constructed`.
    """
    _check_tokens(embedding, task)
    source = _near(task).nonzero()[:, 0].to(generator.device)
    partner = torch.randint(task.vocab, source.shape, generator=generator, device=generator.device)
    pairs = torch.zeros(task.vocab * task.vocab, dtype=embedding.dtype, device=generator.device)
    ones = torch.ones(source.shape, dtype=embedding.dtype, device=generator.device)
    pairs.index_add_(0, source * task.vocab + partner, ones)
    return _lookup(embedding, pairs.view(task.vocab, task.vocab).to(embedding.device))


def identity(
    d_model: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "d_model d_model"]:
    """No memory: values are the embeddings themselves (figures 3a, C.1, C.6, Theorem 3)."""
    return torch.eye(d_model, dtype=dtype)


def gaussian(
    d_model: int,
    generator: torch.Generator,
    *,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "d_model d_model"]:
    """Independent Gaussian entries of standard deviation `scale`, 1 / sqrt(d_model) if not given.

    They are drawn in float64, so that all types start alike.
    """
    values = torch.randn(
        d_model, d_model, generator=generator, device=generator.device, dtype=torch.float64
    )
    return (values * (d_model**-0.5 if scale is None else scale)).to(dtype)


def low_rank(
    matrix: Float[Tensor, "*axes rows columns"], rank: int
) -> Float[Tensor, "*axes rows columns"]:
    """The best approximation of a matrix by one of rank at most `rank` (its truncated SVD).

    Raises:
        InputError: `rank` is below 1 or above the smaller side of the matrix.
    """
    largest = min(matrix.shape[-2:])
    if not 1 <= rank <= largest:
        raise InputError(
            f"rank must lie in 1..{largest} for a matrix {list(matrix.shape)}, got {rank!r}."
        )
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


def matched(
    matrix: Float[Tensor, "rows columns"], like: Float[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """The matrix rescaled to the Frobenius norm of another (the argmax of the logits stays).

    Raises:
        InputError: The matrix is zero, so that no factor gives it a norm.
    """
    norm = torch.linalg.matrix_norm(matrix)
    if norm == 0:
        raise InputError("a matrix of zeros cannot be rescaled to the norm of another.")
    return matrix * (torch.linalg.matrix_norm(like) / norm)


def theorem_1(
    task: ConceptTask,
    d_model: int | None = None,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> OneLayerWeights:
    """The model of Theorem 1: orthonormal W_E, W_V of equation 5.1, W_Q = W_K = 0.

    Zero scores make attention uniform. For omega = 1, at least 3 bits and the support of all other
    tokens its error falls below any bound as L grows; the model can be made for any task.

    Args:
        task: The task it solves.
        d_model: Width, at least the vocabulary; the vocabulary if not given.
        generator: For a random frame in place of unit vectors (see `embeddings.orthonormal`).
        dtype: Type of the weights.

    Raises:
        InputError: `d_model` is below the vocabulary, or as for `constructed`.
    """
    W_E = orthonormal(
        task.vocab, task.vocab if d_model is None else d_model, generator, dtype=dtype
    )
    width = W_E.shape[1]
    zero = torch.zeros(width, width, dtype=dtype, device=W_E.device)
    return OneLayerWeights(W_E=W_E, W_Q=zero, W_K=zero.clone(), W_V=constructed(W_E, task))


def uniform_logits(
    counts: Float[Tensor, "batch vocab"],
    *,
    W_E: Float[Tensor, "vocab d_model"],
    W_V: Float[Tensor, "d_model d_model"],
) -> Float[Tensor, "batch vocab"]:
    """Logits at the last position under uniform attention: counts / L @ (W_E W_V W_E^T).

    Args:
        counts: How often each token occurs in the context (`task.token_counts`); or, for
            the population logits, the distribution p(. | y) itself.
        W_E: Embeddings, a row per token; they unembed too.
        W_V: Value matrix.

    Returns:
        Logits in the type of `W_E`. With unit vectors as embeddings they are exact up to the
        division by L, so equal logits are equal in floating point.
    """
    counts = counts.to(W_E)
    # The division comes last: sums of whole numbers are exact, and ties survive it.
    return ((counts @ W_E) @ W_V) @ W_E.T / counts.sum(1, keepdim=True)


def _near(task: ConceptTask) -> Tensor:
    """A[t, t'] of equation 5.1, as booleans."""
    near = task.neighbours() & (task.hamming() == 1)
    if not near.any():
        raise InputError(
            f"the memory of equation 5.1 is zero for {task!r}: no token has a neighbour at "
            "Hamming distance 1 in its support. Use a support that has some."
        )
    return near


def _lookup(embedding: Tensor, pairs: Tensor) -> Tensor:
    """The sum over t, t' of pairs[t, t'] outer(W_E(t'), W_E(t)): on row vectors, t' looks up t."""
    return embedding.T @ (pairs.T @ embedding)


def _check_tokens(embedding: Tensor, task: ConceptTask) -> None:
    if len(embedding) != task.vocab:
        raise InputError(
            f"the embedding has {len(embedding)} rows, and the task with bits={task.bits} has "
            f"{task.vocab} tokens: one row per token is needed."
        )
