"""Embeddings W_E with a known geometry: orthonormal, Gaussian, or as in equation 5.2.

Rows are tokens: W_E is [vocab, d_model], the transpose of the paper's d x V matrix. In equation 5.2
inner products fall with the Hamming distance of the tokens,

    <W_E(t), W_E(t')>  =  b0 if t = t',  else  b - a D_H(t, t')        (a > 0)

Its Gram matrix is diagonal in the Walsh basis chi_S(t) = (-1)^|S & t|, with one eigenvalue per
level |S| (reference page, 7.3):

    level 0      b0 - b + b 2^m - a m 2^(m-1)     once
    level 1      b0 - b + a 2^(m-1)               m times
    above        b0 - b                           2^m - m - 1 times
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.one_layer import hypercube

ROUNDING = 1e-12
"""Eigenvalues this close to 0, relative to the terms that they are sums of, count as 0."""


def orthonormal(
    vocab: int,
    d_model: int,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "vocab d_model"]:
    """Return embeddings with orthonormal rows (Theorem 1, Lemma 2).

    With a generator the rows are a uniformly random frame (QR of a Gaussian matrix, in float64).
    Without it they are unit vectors, so that logits are exact small sums and equal logits stay
    equal in floating point.

    Raises:
        InputError: `d_model` is below `vocab`.
    """
    if d_model < vocab:
        raise InputError(
            f"{vocab} orthonormal embeddings do not fit into d_model={d_model}: it must be at "
            f"least {vocab}. Use a wider model, or gaussian_embedding for a narrow one."
        )
    if generator is None:
        return torch.eye(vocab, d_model, dtype=dtype)
    frame, triangle = torch.linalg.qr(_normal(d_model, vocab, generator))
    # Without its signs the QR frame is not uniformly distributed.
    return (frame * triangle.diagonal().sign()).T.contiguous().to(dtype)


def gaussian_embedding(
    vocab: int, d_model: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "vocab d_model"]:
    """Return independent Gaussian embeddings of standard deviation 1 / sqrt(d_model).

    Rows have a mean squared length of 1. The paper's scale is not known; this one is ours. The
    values are drawn in float64, so that they are alike in all types.
    """
    return (_normal(vocab, d_model, generator) / d_model**0.5).to(dtype)


def seeded_generator(*branch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by several numbers, independent of those of other numbers."""
    state = int(np.random.SeedSequence(branch).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GramSpectrum:
    """Eigenvalues of the Gram matrix of equation 5.2, by Walsh level."""

    bits: int
    constant: float
    """Level 0: the sum of each row of the Gram matrix."""
    linear: float
    """Level 1."""
    bulk: float
    """All higher levels."""
    scale: float
    """Size of the terms whose sums are the eigenvalues, for rounding."""

    @property
    def multiplicities(self) -> tuple[int, int, int]:
        """How often `constant`, `linear` and `bulk` occur."""
        return 1, self.bits, (1 << self.bits) - self.bits - 1

    @property
    def rank(self) -> int:
        """Rank of the Gram matrix and of W_E: at most bits + 1 if b0 = b (Lemma 5)."""
        pairs = zip((self.constant, self.linear, self.bulk), self.multiplicities, strict=True)
        return sum(times for value, times in pairs if abs(value) > ROUNDING * self.scale)

    def levels(self) -> Float[Tensor, " level"]:
        """Return the eigenvalue of each Walsh level 0..bits, in float64."""
        values = [self.constant, self.linear, *[self.bulk] * (self.bits - 1)]
        return torch.tensor(values, dtype=torch.float64)


def gram_eigenvalues(bits: int, *, a: float, b: float, b0: float) -> GramSpectrum:
    """Return the eigenvalues of equation 5.2 in closed form, for any a, b and b0."""
    vocab = 1 << bits
    return GramSpectrum(
        bits=bits,
        constant=b0 - b + b * vocab - a * bits * vocab / 2,
        linear=b0 - b + a * vocab / 2,
        bulk=b0 - b,
        scale=abs(b0) + abs(b) * vocab + abs(a) * bits * vocab / 2,
    )


def hamming_geometry(
    bits: int,
    *,
    a: float,
    b: float,
    b0: float,
    d_model: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "vocab d_model"]:
    """Return embeddings whose inner products are those of equation 5.2.

    The columns are Walsh functions, each scaled by the square root of its eigenvalue: the constant,
    those of the single bits, then the others; columns past the rank are 0. Any rotation of them has
    the same Gram matrix, and the logits depend on nothing else. They are computed in float64;
    `d_model=None` is 2^bits.

    Raises:
        InputError: a is not above 0, the Gram matrix is not positive semidefinite, or `d_model` is
            below its rank.
    """
    vocab = 1 << bits
    d_model = vocab if d_model is None else d_model
    if not a > 0:
        raise InputError(f"equation 5.2 needs a above 0, got a={a!r}: similarity falls with a.")
    spectrum = gram_eigenvalues(bits, a=a, b=b, b0=b0)
    slack = ROUNDING * spectrum.scale
    if spectrum.bulk < -slack or spectrum.constant < -slack:
        verdict = {True: "holds", False: "fails"}
        raise InputError(
            f"no embeddings have the geometry a={a}, b={b}, b0={b0} with bits={bits}: its Gram "
            "matrix is not positive semidefinite. It is so if and only if both hold: "
            f"(1) b0 - b = {spectrum.bulk:.6g} >= 0 ({verdict[spectrum.bulk >= -slack]}); "
            f"(2) b0 + (2^m - 1) b = {b0 + (vocab - 1) * b:.6g} >= a m 2^(m-1) = "
            f"{a * bits * vocab / 2:.6g} ({verdict[spectrum.constant >= -slack]}). "
            "Raise b0 for (1), raise b or lower a for (2)."
        )
    if d_model < spectrum.rank:
        raise InputError(
            f"the geometry a={a}, b={b}, b0={b0} with bits={bits} has rank {spectrum.rank}, and "
            f"d_model={d_model} is below it. Use a d_model of at least {spectrum.rank}, or b0 = b "
            "for a rank of bits + 1."
        )
    level = hypercube.weight(torch.arange(vocab), bits)
    sets = level.argsort(stable=True)
    eigenvalue = spectrum.levels()[level[sets]]
    sets, eigenvalue = sets[eigenvalue > slack], eigenvalue[eigenvalue > slack]
    embedding = torch.zeros(vocab, d_model, dtype=torch.float64)
    embedding[:, : len(sets)] = hypercube.signs(sets, bits) * (eigenvalue / vocab).sqrt()
    return embedding.to(dtype)


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(
        rows, columns, generator=generator, device=generator.device, dtype=torch.float64
    )
