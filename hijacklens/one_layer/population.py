"""Exact population logits of the constructions: those of uniform attention as L goes to infinity.

For the support of all other tokens. Write q = exp(-1/beta), Z = (1+q)^m - 1 and k for the Hamming
distance between a token and the label; everything depends on k alone, so results are [distance]
vectors over k = 0..m, in float64, in units of logits.

* `construction_logits`: orthonormal embeddings and the memory of equation 5.1 (reference page,
  7.1; the setting of Theorem 1, and its noisy version).
* `geometry_logits`: embeddings of equation 5.2 and the same memory (7.4; Theorem 4).

>>> from hijacklens.one_layer.task import ConceptTask
>>> round(margin(construction_logits(ConceptTask(bits=5, omega=1.0))), 3)
0.252
>>> round(margin(geometry_logits(ConceptTask(bits=5, omega=1.0), a=0.1, b=0.5, b0=1.0)), 4)
0.3354
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.one_layer import hypercube
from hijacklens.one_layer.embeddings import gram_eigenvalues
from hijacklens.one_layer.task import ConceptTask


def construction_logits(task: ConceptTask) -> Float[Tensor, " distance"]:
    """Population logits by distance from the label, orthonormal W_E and W_V of equation 5.1.

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
    """Population logits by distance from the label, W_E of equation 5.2 and W_V of 5.1.

    They are G A G p(. | y), G the Gram matrix and A the adjacency of the hypercube. All three are
    diagonal in the Walsh basis, which makes this a sum over levels (7.4):

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
    """The logit of the label minus the largest other one; the construction works if it is > 0."""
    return float(logits[0] - logits[1:].max())


def _constants(task: ConceptTask) -> tuple[float, float]:
    """The constants q and q / Z."""
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
