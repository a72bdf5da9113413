"""The associative memory of equation 5.1 as a value matrix, and the logits it gives.

Section 5 of the paper. All matrices here act on row vectors, as in TransformerLens: embeddings
are the rows of W_E [vocab, d_model] and a value is `x @ W_V`. The paper writes tokens as columns,
so its W_V is the transpose of ours. Its equation 5.1,

    W_V(paper) = sum_t W_E(t) ( sum_{t' in N1(t)} W_E(t')^T ) = W_E^T A W_E,
    A[t, t'] = 1 if t' is in N(t) at Hamming distance 1,

is W_E^T A^T W_E here: a context token t' votes for every t that has it as a neighbour. For the
named supports A is symmetric and the two are equal; for a user's rule they need not be. The scale
of W_V does not change the argmax of the logits, but it does change the cross-entropy.

Population logits are those of uniform attention as L goes to infinity. Their closed forms hold for
the support of all other tokens, where they depend on the Hamming distance k from the label alone:
vectors [distance] over k = 0..m, in float64, with q = exp(-1/beta) and Z = (1+q)^m - 1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.one_layer import hypercube
from hijacklens.one_layer.architecture import OneLayerWeights
from hijacklens.one_layer.embeddings import gram_eigenvalues, orthonormal
from hijacklens.one_layer.task import ConceptTask


def constructed(
    embedding: Float[Tensor, "vocab d_model"], task: ConceptTask
) -> Float[Tensor, "d_model d_model"]:
    """Return the memory of equation 5.1, W_E^T A^T W_E on row vectors, unscaled as in the paper.

    Raises:
        InputError: The embedding has another number of tokens than the task, or no token of the
            task has a neighbour at Hamming distance 1.
    """
    return embedding.T @ (_near(embedding, task).to(embedding).T @ embedding)


def random(
    embedding: Float[Tensor, "vocab d_model"], task: ConceptTask, generator: torch.Generator
) -> Float[Tensor, "d_model d_model"]:
    """Return the random memory of figures C.2 and C.3: equation 5.1 with random partners.

    Each token t keeps as many partners as it has neighbours in N1(t), drawn uniformly from all
    tokens with replacement. Nothing is excluded, neither t nor its true neighbours; the paper's
    exclusions are not known, this choice is ours.

    Raises:
        InputError: As for `constructed`.
    """
    token = _near(embedding, task).nonzero()[:, 0].to(generator.device)
    partner = torch.randint(task.vocab, token.shape, generator=generator, device=generator.device)
    pairs = torch.bincount(token * task.vocab + partner, minlength=task.vocab**2)
    return embedding.T @ (pairs.view(task.vocab, task.vocab).to(embedding).T @ embedding)


def identity(
    d_model: int, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "d_model d_model"]:
    """Return the value matrix without memory: values are the embeddings (figures 3a, C.1, C.6)."""
    return torch.eye(d_model, dtype=dtype)


def matched(
    matrix: Float[Tensor, "rows columns"], like: Float[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """Rescale a matrix to the Frobenius norm of another, which keeps the argmax of the logits.

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
    """Return the model of Theorem 1: orthonormal W_E, W_V of equation 5.1, W_Q = W_K = 0.

    Zero scores make attention uniform. For omega = 1, at least 3 bits and the support of all other
    tokens its error falls below any bound as L grows; the model can be made for any task. The width
    is the vocabulary unless `d_model` says more; a generator is for `embeddings.orthonormal`.

    Raises:
        InputError: `d_model` is below the vocabulary, or as for `constructed`.
    """
    width = task.vocab if d_model is None else d_model
    W_E = orthonormal(task.vocab, width, generator, dtype=dtype)
    zero = torch.zeros(width, width, dtype=dtype, device=W_E.device)
    return OneLayerWeights(W_E=W_E, W_Q=zero, W_K=zero.clone(), W_V=constructed(W_E, task))


def uniform_logits(
    counts: Float[Tensor, "batch vocab"],
    *,
    W_E: Float[Tensor, "vocab d_model"],
    W_V: Float[Tensor, "d_model d_model"],
) -> Float[Tensor, "batch vocab"]:
    """Return the logits at the last position under uniform attention, counts / L W_E W_V W_E^T.

    `counts` says how often each token occurs in the context (`task.token_counts`); for the
    population logits it is the distribution p(. | y) itself. Logits have the type of `W_E`. With
    unit vectors as embeddings they are exact up to the division by L, so equal logits are equal in
    floating point.
    """
    counts = counts.to(W_E)
    # The division comes last: sums of whole numbers are exact, and ties survive it.
    return ((counts @ W_E) @ W_V) @ W_E.T / counts.sum(1, keepdim=True)


def construction_logits(task: ConceptTask) -> Float[Tensor, " distance"]:
    """Return the population logits of Theorem 1 by distance from the label (reference page, 7.1).

        k = 0:   m q / Z
        k = 1:   (m-1) q^2 / Z
        k >= 2:  (k q^(k-1) + (m-k) q^(k+1)) / Z

    With noise they are multiplied by omega, and m (1 - omega) / V is added to all: the order of
    the tokens does not change.

    Raises:
        InputError: The support of the task is not `"all"`.
    """
    q, per_z = _constants(task)
    m = task.bits
    logits = [m * per_z, (m - 1) * q * per_z]
    logits += [(k * q ** (k - 2) + (m - k) * q**k) * per_z for k in range(2, m + 1)]
    informative = torch.tensor(logits, dtype=torch.float64)
    return task.omega * informative + m * (1 - task.omega) / task.vocab


def geometry_logits(
    task: ConceptTask, *, a: float, b: float, b0: float
) -> Float[Tensor, " distance"]:
    """Return the population logits by distance from the label, W_E of equation 5.2 (Theorem 4).

    They are G A G p(. | y), G the Gram matrix and A the adjacency of the hypercube. All three are
    diagonal in the Walsh basis, which makes this a sum over levels (reference page, 7.4):

        logit(k) = 2^-m sum_j K_j(k) g_j^2 (m - 2j) p_j,   p_j = omega pi_j + (1 - omega) [j = 0],
        pi_j = ((1+q)^(m-j) (1-q)^j - 1) / Z

    Exact for any a, b and b0, positive semidefinite or not. a = b = 0 and b0 = 1 are orthonormal
    embeddings.

    Raises:
        InputError: The support of the task is not `"all"`.
    """
    q, per_z = _constants(task)
    m = task.bits
    polynomial = hypercube.krawtchouk(m)
    # (1+q)^(m-j) (1-q)^j = sum_i K_i(j) q^i. Dropping i = 0 is the -1, and one q goes into per_z,
    # so that nothing cancels or underflows for a small beta.
    powers = q ** torch.arange(m, dtype=torch.float64)
    levels = task.omega * per_z * (powers @ polynomial[1:])
    levels[0] += 1 - task.omega
    adjacency = m - 2 * torch.arange(m + 1, dtype=torch.float64)
    gram = gram_eigenvalues(m, a=a, b=b, b0=b0).levels()
    return (gram**2 * adjacency * levels) @ polynomial / task.vocab


def margin(logits: Float[Tensor, " distance"]) -> float:
    """Return the logit of the label minus the largest other: above 0 the construction works."""
    return float(logits[0] - logits[1:].max())


def _near(embedding: Tensor, task: ConceptTask) -> Tensor:
    """Return A[t, t'] of equation 5.1, as booleans, if the embedding has the task's tokens."""
    if len(embedding) != task.vocab:
        raise InputError(
            f"the embedding has {len(embedding)} rows, and the task with bits={task.bits} has "
            f"{task.vocab} tokens: one row per token is needed."
        )
    near = task.neighbours() & (task.hamming() == 1)
    if not near.any():
        raise InputError(
            f"the memory of equation 5.1 is zero for {task!r}: no token has a neighbour at "
            "Hamming distance 1 in its support. Use a support that has some."
        )
    return near


def _constants(task: ConceptTask) -> tuple[float, float]:
    """Return the constants q and q / Z."""
    if task.support_name != "all":
        raise InputError(
            f"the closed forms are for the support 'all', and the task has {task.support_name!r}. "
            "For any support, memory.uniform_logits(task.token_distribution(), ...) gives the "
            "population logits."
        )
    q = math.exp(-1 / task.beta)
    # Z / q as a polynomial, so that it is 1 / m, not 0 / 0, where q underflows.
    z_per_q = sum(math.comb(task.bits, k) * q ** (k - 1) for k in range(1, task.bits + 1))
    return q, 1 / z_per_q
