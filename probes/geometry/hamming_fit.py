"""The fit of equation 5.2 to inner products: a line in the distance, and a jump at 0.

    <E(t), E(t')>  =  b0 if t = t',  else  b - a D(t, t')

a and b are the least-squares line over all pairs of different tokens; b0 is the mean squared
length, the least-squares fit of one number. For comparison there is the plain line through all
entries of the Gram matrix, including the diagonal (Theorem 3 and figure C.6 ask whether it
suffices). The cost is O(vocab^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped
from scipy import stats

from hijacklens.errors import InputError
from hijacklens.one_layer.embeddings import ROUNDING, GramSpectrum, gram_eigenvalues


@dataclass(frozen=True, slots=True, kw_only=True)
class GramFit:
    """Equation 5.2 fitted to one Gram matrix, and the plain line."""

    a: float
    """Decrease of the inner product per unit of distance."""
    b: float
    """Value at distance 0 of the line through different tokens."""
    b0: float
    """Mean squared length of an embedding."""
    r2: float
    """Fraction of the variance over pairs of different tokens that the line explains; NaN if the
    variance is 0."""
    r2_means: float
    """The same for the mean inner products by distance, weighted by their pairs: whether the curve
    of means is a line, whatever the spread at each distance."""
    residual: float
    """Root mean square residual of the line over pairs of different tokens."""
    linear_a: float
    """Decrease per unit of distance of the plain line through all entries."""
    linear_b: float
    linear_r2: float
    linear_residual: float

    @property
    def jump(self) -> float:
        """b0 - b: how far the diagonal is above the line; 0 if a plain line suffices."""
        return self.b0 - self.b

    def eigenvalues(self, bits: int) -> GramSpectrum:
        """Return the eigenvalues of the Gram matrix of 2^bits tokens by equation 5.2."""
        return gram_eigenvalues(bits, a=self.a, b=self.b, b0=self.b0)

    def feasible(self, bits: int) -> bool:
        """Return whether embeddings with this geometry exist: no eigenvalue is negative."""
        spectrum = self.eigenvalues(bits)
        return bool(spectrum.levels().min() >= -ROUNDING * spectrum.scale)


def fit_gram(
    gram: Float64[np.ndarray, "token token"], distance: Shaped[np.ndarray, "token token"]
) -> GramFit:
    """Fit equation 5.2 and a plain line to inner products of all pairs of tokens.

    Distances are symmetric, 0 on the diagonal and above 0 elsewhere.

    Raises:
        InputError: Different tokens have fewer than two distances, so no line is determined.
    """
    upper = np.triu_indices(len(gram), k=1)
    near, inner = distance[upper].astype(float), gram[upper]
    if len(np.unique(near)) < 2:
        raise InputError(
            f"a line in the distance needs at least two distances between different tokens; the "
            f"{len(gram)} tokens given have {sorted(set(near.tolist()))}. Give more tokens or bits."
        )
    size = float(np.abs(gram).max())
    slope, b, r2, residual = _line(near, inner, size)
    plain = _line(distance.ravel().astype(float), gram.ravel(), size)
    _, which, pairs = np.unique(near, return_inverse=True, return_counts=True)
    means = np.bincount(which, inner) / pairs
    return GramFit(
        a=-slope,
        b=b,
        b0=float(gram.diagonal().mean()),
        r2=r2,
        # The line over pairs is the line over the means, weighted by their pairs.
        r2_means=_line(near, means[which], size)[2],
        residual=residual,
        linear_a=-plain[0],
        linear_b=plain[1],
        linear_r2=plain[2],
        linear_residual=plain[3],
    )


def _line(x: np.ndarray, y: np.ndarray, size: float) -> tuple[float, float, float, float]:
    """Return slope, intercept, R² and root mean square residual of a line."""
    line: Any = stats.linregress(x, y)
    slope, intercept = float(line.slope), float(line.intercept)
    residual, variance = float(((y - slope * x - intercept) ** 2).mean()), float(y.var())
    # If all values are equal up to rounding, there is no variance to explain.
    flat = variance <= (1e-12 * size) ** 2
    return slope, intercept, math.nan if flat else 1 - residual / variance, math.sqrt(residual)
