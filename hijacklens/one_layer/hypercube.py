"""Bit strings as vertices of the hypercube: Hamming weight and Walsh functions.

A token t and a set S of bits are both numbers of m bits; chi_S(t) = (-1)^|S & t|. Matrices whose
entries depend on t xor t' alone (Gram matrices of equation 5.2, the hypercube, pi for the named
supports) have these functions as eigenvectors, and where they depend on the Hamming distance
alone, the eigenvalue depends on the level |S| alone, through the Krawtchouk polynomials
K_j(k) = sum of chi_S(t) over |S| = j, for any t with |t| = k.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def weight(values: Int[Tensor, "*axes"], bits: int) -> Int[Tensor, "*axes"]:
    """Count the set bits among the lowest `bits`; of a xor b, that is the Hamming distance."""
    count = torch.zeros_like(values)
    for bit in range(bits):
        count += (values >> bit) & 1
    return count


def signs(sets: Int[Tensor, " set"], bits: int) -> Float[Tensor, "vocab set"]:
    """Return chi_S(t) for all tokens t and these S, in float64. chi_S(t) = chi_t(S)."""
    token = torch.arange(1 << bits, device=sets.device)
    return 1 - 2 * (weight(token[:, None] & sets, bits) & 1).double()


def krawtchouk(bits: int) -> Float[Tensor, "level distance"]:
    """Return K_j(k) for levels j and distances k in 0..bits, in float64 (exact up to 12 bits).

    Column k holds the coefficients of the polynomial (1 + x)^(bits - k) (1 - x)^k.
    """
    columns = [np.poly([-1] * (bits - k) + [1] * k) for k in range(bits + 1)]
    return torch.tensor(np.stack(columns, 1))
