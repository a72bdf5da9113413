"""How well a matrix is explained by outer products of associated vectors, with two controls.

A memory that looks up target o for source s is M = sum of outer(x_s, y_o) over the associated
pairs, as in equation 5.1: on row vectors x_s M gives y_o. Three statistics measure how much of it
is in a matrix W [d_in, d_out], from its scores S[s, o] = x_s W y_o:

    cosine   <W, M> / |W| |M|. Its square is the fraction of |W|^2 (squared Frobenius norm) that a
             multiple of M explains.
    span     The fraction of |W|^2 in the span of the matrices (sum of x_s over the sources of o)
             outer y_o, which has one coefficient per target.
    recall   For an associated pair, the fraction of targets not associated with s whose score is
             below that of o (ties count half); the mean over pairs. It is the area under the ROC
             curve within a source, 1 for perfect retrieval, 0.5 for none, whatever its scale.

    shuffled  Control: the same matrix with targets permuted among the pairs. It keeps the effects
              of the mean of a matrix, of frequent targets and of long vectors.
    rotated   Control: random matrices U' S V'^T with the singular values of W. If associated tokens
              have similar vectors (as on the hypercube), even a Gaussian matrix scores them alike,
              and its recall deviates from 0.5 more than shuffles show.

The largest z-score of each draw gives p-values over all matrices together (Westfall and Young
1993). All matrices get the same shuffles; each gets separate U' and V'. No matrix is larger than
[source, target] or [d_in, d_out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float64, Int64
from scipy import stats
from torch import Tensor

from hijacklens.one_layer.embeddings import orthonormal, seeded_generator

STATISTICS = ("cosine", "span", "recall")
RIDGE = 1e-10
"""Added to the normal equations, relative to their mean diagonal, since outer products may be
dependent; directions that much weaker than the others are rounding errors."""

Factors: TypeAlias = tuple[Float64[Tensor, "d_in inner"], Float64[Tensor, "inner d_out"]]
"""A matrix as a product; any other matrix has the identity as its second factor."""
Frames: TypeAlias = tuple[
    Float64[Tensor, "draw source inner"], Float64[Tensor, "draw target inner"]
]
"""The vectors read and written by a memory: coordinates along random orthonormal directions."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Associated vectors in the space that a matrix reads and in the space that it writes."""

    read: Float64[Tensor, "source d_in"]
    """x: a row per distinct source."""
    write: Float64[Tensor, "target d_out"]
    """y: a row per distinct target."""
    source: Int64[np.ndarray, " pair"]
    """Row of `read` of each pair."""
    target: Int64[np.ndarray, " pair"]
    """Row of `write` of each pair."""

    def matrix(self) -> Float64[Tensor, "d_in d_out"]:
        """Return M, the sum of the outer products of the associated pairs."""
        return self.read.T @ (self._counts(self.target).T @ self.write)

    def shuffled(
        self, matrices: Sequence[Factors], orders: Sequence[Int64[np.ndarray, " pair"]]
    ) -> Float64[np.ndarray, "matrix draw statistic"]:
        """Return `STATISTICS` of each matrix: first with the true targets, then for each shuffle.

        Each shuffle, with the targets `target[order]`, solves one [target, target] system for all
        matrices together. No matrix may be zero.
        """
        scores = torch.stack([(self.read @ A) @ (B @ self.write.T) for A, B in matrices])
        norms = np.array([float(torch.linalg.vector_norm(s)) for s in map(_spectrum, matrices)])
        ranks = torch.from_numpy(stats.rankdata(scores.numpy(), axis=2))
        statistics = []
        for order in [np.arange(len(self.target)), *orders]:
            target = self.target[order]
            recall = self._recall(target, lambda s, t: ranks[:, s, t])
            statistics.append(_columns(self._basis(target), scores, norms, recall))
        return np.stack(statistics, axis=1)

    def frames(self, rank: int, *, draws: int, seed: int) -> Frames:
        """Return the vectors in random frames, from which `rotated` makes random matrices."""

        def turned(side: int, vectors: Tensor) -> Tensor:
            draw, width = seeded_generator(seed, side), vectors.shape[1]
            frames = (orthonormal(rank, width, draw, dtype=vectors.dtype) for _ in range(draws))
            return torch.stack([vectors @ frame.T for frame in frames])

        return turned(0, self.read), turned(1, self.write)

    def rotated(
        self,
        matrices: Sequence[Factors],
        frames: Frames,
        *,
        seed: int,
        branches: Sequence[tuple[int, int]],
    ) -> Float64[np.ndarray, "matrix draw statistic"]:
        """Return `STATISTICS` of random matrices with the singular values of each matrix.

        The rank of a matrix is at most that of the frames. Its combinations of left and right
        frames are seeded by `seed` and its two numbers in `branches`, not by other matrices.
        """
        read, write = frames
        draws, _, rank = read.shape
        spectra = [_spectrum(factors) for factors in matrices]
        padded = torch.stack([torch.nn.functional.pad(s, (0, rank - len(s))) for s in spectra])
        norms = torch.linalg.vector_norm(padded, dim=1).numpy()
        # Independent rotations for each matrix: it uses the frames in a separate order.
        generators = [seeded_generator(seed, 2, *branch) for branch in branches]
        permutations = [torch.randperm(draws, generator=g) for g in generators for _ in range(2)]
        orders = torch.stack(permutations).reshape(-1, 2, draws)
        basis = self._basis(self.target)
        statistics = []
        for draw in range(draws):
            scores = (read[orders[:, 0, draw]] * padded[:, None]) @ write[orders[:, 1, draw]].mT
            recall = self._recall(self.target, partial(_ranks, scores))
            statistics.append(_columns(basis, scores, norms, recall))
        return np.stack(statistics, axis=1)

    def _counts(self, target: np.ndarray) -> Float64[Tensor, "target source"]:
        counts = torch.zeros(len(self.write), len(self.read), dtype=torch.float64)
        index = (torch.from_numpy(target), torch.from_numpy(self.source))
        return counts.index_put_(index, torch.ones(len(target), dtype=counts.dtype), True)

    def _basis(self, target: np.ndarray) -> _Basis:
        counts = self._counts(target)
        places = (torch.from_numpy(self.source), torch.from_numpy(target))
        # Inner products of the summed sources of two targets, times those of the targets.
        gram = (counts @ (self.read @ self.read.T) @ counts.T) * (self.write @ self.write.T)
        ridge = torch.eye(len(gram), dtype=gram.dtype) * (RIDGE * gram.diagonal().mean())
        length = math.sqrt(max(float(gram.sum()), 0.0))
        return _Basis(*places, torch.linalg.cholesky(gram + ridge), length)

    def _recall(
        self, target: np.ndarray, ranks: Callable[[Tensor, Tensor], Tensor]
    ) -> Float64[np.ndarray, " matrix"]:
        """Return Mann and Whitney's U within each source, divided by its largest value.

        `ranks` gives the ranks of pairs among all targets of their source.
        """
        width = len(self.write)
        # A shuffle may join a source with a target twice; the pair counts once.
        pairs = np.unique(self.source * width + target)
        source, target = pairs // width, pairs % width
        partners = np.bincount(source, minlength=len(self.read))[source]
        # A source that is paired with all targets cannot be tested.
        testable = partners < width
        source, target, partners = source[testable], target[testable], partners[testable]
        at = ranks(torch.from_numpy(source), torch.from_numpy(target)).numpy()
        if not len(source):
            return np.full(len(at), 0.5)
        return ((at - (partners + 1) / 2) / (width - partners)).mean(1)


@dataclass(frozen=True, slots=True)
class _Basis:
    """What the statistics need of the outer products of an association."""

    source: Int64[Tensor, " pair"]
    target: Int64[Tensor, " pair"]
    factor: Float64[Tensor, "target target"]
    """Cholesky factor of the inner products of (summed sources of o) outer y_o."""
    length: float
    """|M|, the norm of their sum."""


def _columns(
    basis: _Basis,
    scores: Float64[Tensor, "matrix source target"],
    norms: Float64[np.ndarray, " matrix"],
    recall: Float64[np.ndarray, " matrix"],
) -> Float64[np.ndarray, "matrix statistic"]:
    # [matrix, target]: <W, (summed sources of o) outer y_o>
    along = scores.new_zeros(len(scores), len(basis.factor))
    along.index_add_(1, basis.target, scores[:, basis.source, basis.target])
    # Vectors that cancel make a memory of zero, which has no direction.
    cosine = along.sum(1).numpy() / (norms * basis.length) if basis.length else 0 * norms
    solved = torch.linalg.solve_triangular(basis.factor, along.T, upper=False)
    return np.stack([cosine, solved.square().sum(0).numpy() / norms**2, recall], axis=1)


def _ranks(scores: Tensor, source: Tensor, target: Tensor) -> Float64[Tensor, "matrix pair"]:
    """Return ranks from 1 within the row of each pair, with mid-ranks for ties."""
    rows = scores[:, source]
    at = scores[:, source, target][..., None]
    return (rows < at).sum(-1) + ((rows == at).sum(-1) + 1).double() / 2


def spectrum_length(factors: Factors) -> int:
    """Return the maximum number of nonzero singular values of a product."""
    A, B = factors
    return min(*A.shape, *B.shape)


def _spectrum(factors: Factors) -> Float64[Tensor, " inner"]:
    """Return the singular values of a product, computed from triangular factors."""
    A, B = factors
    return torch.linalg.svdvals(torch.linalg.qr(A).R @ torch.linalg.qr(B.T).R.T)


class Control(NamedTuple):
    """Statistics compared with those of the draws of a control, all [matrix, statistic]."""

    mean: np.ndarray
    """Mean over draws."""
    std: np.ndarray
    z: np.ndarray
    """(value - mean) / std; 0 if the draws are all equal."""
    p: np.ndarray
    """Fraction of draws, including the value itself, with at least this value."""
    p_family: np.ndarray
    """Fraction of draws in which the largest z of any matrix is at least this one's."""

    @classmethod
    def of(
        cls,
        value: Float64[np.ndarray, "matrix statistic"],
        null: Float64[np.ndarray, "matrix draw statistic"],
    ) -> Control:
        """Compare values with the draws of a control."""
        mean, std = null.mean(1), null.std(1, ddof=1)
        # Differences between draws may be mere rounding errors.
        moves = std > 1e-9 * (np.abs(mean) + np.abs(value))
        safe = np.where(moves, std, 1.0)
        z = np.where(moves, (value - mean) / safe, 0.0)
        null_z = np.where(moves[:, None], (null - mean[:, None]) / safe[:, None], 0.0)
        n = 1 + null.shape[1]
        slack = 1e-9 * (np.abs(value) + std)
        p = (1 + (null >= (value - slack)[:, None]).sum(1)) / n
        largest = null_z.max(0)  # [draw, statistic]
        family = (1 + (largest[None] >= z[:, None] - 1e-9).sum(1)) / n
        return cls(mean, std, z, p, family)
