"""Intervals and tests about *relations like these*: clusters of facts are the sample.

Facts of one relation share a template and often an answer, so they say less about a new relation
than as many independent facts. The variance of a mean is estimated between clusters, with Student's
t for their small number.

>>> change = clustered(np.array([1.0, 0, 1, 1, 0, 0]), np.array(["P36"] * 3 + ["P103"] * 3))
>>> change.clusters, round(change.value, 3), round(change.error, 3)
(2, 0.5, 0.167)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

from hijacklens.statistics.single_facts import LEAST_WHOLE, Interval

RESAMPLES = 2000
"""Bootstrap resamples: another seed moves an interval's ends by a fiftieth of its width."""
FEW = 12
"""Clusters are nearly all alike if at most this many, and at most half of all, differ."""
EXACT = 12
"""Decimals at which means count as equal: further ones are rounding errors."""
USUAL_ICC = 0.119
"""Correlation of changes in a relation, measured on the atlas (SmolLM2, dose 0 to 1)."""


@dataclass(frozen=True, slots=True)
class Estimate(Interval):
    """A mean with its interval over clusters. With one cluster the interval is infinite."""

    clusters: int
    """Number of clusters; with two clusterings, the smaller number."""
    error: float
    """Standard error."""
    df: float
    """Degrees of freedom of Student's t."""
    icc: float
    """Intra-cluster correlation (analysis of variance), of two clusterings the larger; `nan` if
    every cluster has one fact."""
    design_effect: float
    """Variance of the mean over that of as many independent facts."""
    p: float
    """Two-sided p-value of a mean of 0; `nan` for one cluster."""

    def __str__(self) -> str:
        if self.clusters < 2:
            return f"{self.value:.3f} (one cluster: no interval)"
        return Interval.__str__(self)

    def ends(self, name: str) -> dict[str, float]:
        """Return the columns `name_low`, `name_high` and `name_p` of a table."""
        return {f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_p": self.p}

    def within(self, least: float, most: float) -> Estimate:
        """Limit the interval to the values that the mean can have, such as -1..1 of a change.

        The interval over one cluster stays infinite, which says that there is none.
        """
        if self.clusters < 2:
            return self
        return replace(self, low=max(self.low, least), high=min(self.high, most))

    def equivalence(self, largest: float) -> float:
        """Return the p-value of a mean outside -largest..largest: two one-sided t-tests.

        A small value shows that the mean differs from 0 by less than `largest` (Schuirmann 1987).
        """
        if self.clusters < 2:
            return math.nan
        room = largest - abs(self.value)
        return float(stdtr(self.df, -room / self.error)) if self.error else float(room <= 0)


def independent(relations: Iterable[str | None]) -> tuple[Shaped[np.ndarray, " fact"], str]:
    """Return the clusters of facts given their relations, and the claim of statistics over them.

    Relations are the sample, and the claim is about relations like these. Facts of one relation say
    nothing about others: each fact is then a cluster, and the claim is about these facts.

    >>> independent(["P36", "P36"])
    (array([0, 1]), 'these facts (one relation)')
    """
    labels = np.asarray([str(relation) for relation in relations])
    if len(set(labels.tolist())) > 1:
        return labels, "relations like these"
    return np.arange(len(labels)), "these facts (one relation)"


def clustered(
    values: Shaped[np.ndarray, " fact"],
    *clusters: Shaped[np.ndarray, " fact"],
    confidence: float = 0.95,
) -> Estimate:
    """Return the mean over facts with its t interval over clusters.

    The variance is unbiased if facts of a cluster have the measured correlation, and the degrees of
    freedom are Satterthwaite's (Bell and McCaffrey 2002), so that clusters may differ in size. With
    equal sizes this is Student's t of the cluster means, and without `clusters` that of the facts.

    Args:
        values: One number per fact, such as differences of paired verdicts.
        clusters: The cluster of each fact, such as its relation. A second clustering, such as the
            false target, is crossed with the first (Cameron, Gelbach and Miller 2011).
        confidence: The level of the interval.

    Raises:
        ValueError: No value, a different number of labels, or more than two clusterings.

    Note:
        p is that of t, but t finds nearly no variance if nearly all clusters have the same mean:
        at most `FEW`, and at most half of all, differ from 0, or from the mean that most have. Then
        p is the exact one of flipping the signs of the sums other than 0, as in McNemar's test; if
        they are more than `FEW`, the p of t, but at least the least p that flipping can give. With
        two clusterings it is the larger p. The interval is that of t all the same, since it depends
        on what the values can be: use `clustered_change` or `clustered_fraction` for verdicts.
    """
    labels = clusters or (np.arange(len(values)),)
    if not len(values) or len(labels) > 2 or any(len(of) != len(values) for of in labels):
        raise ValueError(f"clustered: {len(values)} values, labels {[len(of) for of in labels]}")
    values = np.asarray(values, dtype=float)
    codes = [np.unique(of, return_inverse=True)[1].astype(int) for of in labels]
    parts = [_variance(values, code) for code in codes]
    variance, df, icc = parts[0]
    if len(codes) == 2:
        icc = float(np.fmax(icc, parts[1][2]))
        cells = np.unique(codes[0] * (codes[1].max() + 1) + codes[1], return_inverse=True)[1]
        sides = [part[0] for part in parts]
        variance = max(*sides, sum(sides) - _variance(values, cells)[0])
        df = min(part[1] for part in parts)
    count, value = min(int(code.max()) + 1 for code in codes), float(values.mean())
    if count < 2:
        return Estimate(value, -math.inf, math.inf, count, math.inf, 0.0, icc, math.nan, math.nan)
    error = math.sqrt(variance)
    half = float(stdtrit(df, (1 + confidence) / 2)) * error
    independent = float(values.var(ddof=1)) / len(values)
    effect = variance / independent if independent else 1.0
    p = max(_p_value(values, code, error, df) for code in codes)
    return Estimate(value, value - half, value + half, count, error, df, icc, effect, p)


def _variance(values: np.ndarray, codes: np.ndarray) -> tuple[float, float, float]:
    """Return the variance of the mean over clusters, its degrees of freedom, and the ICC."""
    n = np.bincount(codes).astype(float)
    if len(n) < 2:
        return math.inf, 0.0, math.nan
    means, value = np.bincount(codes, values) / n, values.mean()
    total, squares = n.sum(), np.round(means - value, EXACT) ** 2
    icc = math.nan
    if total > len(n):
        between = (n * squares).sum() / (len(n) - 1)
        within = ((values - means[codes]) ** 2).sum() / (total - len(n))
        size = (total - (n**2).sum() / total) / (len(n) - 1)
        whole = between + (size - 1) * within
        icc = float((between - within) / whole) if whole else 0.0
    # Variances of the cluster means, up to a factor, if facts have this correlation.
    alike = min(max(icc, 0.0), 1.0) if total > len(n) else 0.0
    assumed, weights = alike + (1 - alike) / n, n / total
    expected = (weights**2 * assumed).sum()
    factors = weights**2 * assumed / (assumed * (1 - 2 * weights) + expected)
    # Satterthwaite: the sum over g, h of factors times the squared covariance of two deviations.
    shared = weights * assumed
    f0, f1, f2 = (float((factors * shared**k).sum()) for k in range(3))
    spread = (expected * f0) ** 2 + 2 * f0 * f2 + 2 * f1**2 - 4 * expected * f0 * f1
    spread += (factors**2 * (assumed**2 + 2 * assumed * (expected - 2 * shared))).sum()
    return float((factors * squares).sum()), float(expected**2 / spread), icc


def _few(values: np.ndarray, codes: np.ndarray) -> bool:
    """Return whether so many clusters have the same mean that their variance is uncertain."""
    means = np.round(np.bincount(codes, values) / np.bincount(codes), EXACT)
    if np.isnan(means).any():
        return False
    alike = np.unique(means, return_counts=True)[1].max()
    alike = max(alike if alike > 1 else 0, (means == 0).sum())
    return bool(len(means) - alike <= min(FEW, len(means) / 2))


def _p_value(values: np.ndarray, codes: np.ndarray, error: float, df: float) -> float:
    sums = np.round(np.bincount(codes, values), EXACT)
    changed, few = sums[sums != 0], _few(values, codes)
    if few and len(changed) <= FEW:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(changed))))
        flipped = np.abs(signs @ changed) if len(changed) else np.zeros(1)
        return float((flipped >= abs(changed.sum()) * (1 - 1e-12)).mean())
    p = float(2 * stdtr(df, -abs(values.mean()) / error)) if error else 0.0
    return max(p, 2.0 ** (1 - len(changed))) if few else p


def clustered_fraction(
    hits: Shaped[np.ndarray, " fact"],
    *clusters: Shaped[np.ndarray, " fact"],
    confidence: float = 0.95,
) -> Estimate:
    """Return a fraction with its Wilson interval for clustered facts (Dean and Pagano 2015).

    It is Wilson's interval with the effective number of facts, n over the design effect, and the
    quantile of Student's t. If no cluster differs from another, each counts as one fact.

    Args:
        hits: For each fact, whether it has the property.
        clusters: As in `clustered`.
        confidence: The level of the interval.
    """
    found = clustered(hits, *clusters, confidence=confidence)
    if found.clusters < 2:
        return found
    p, quantile = found.value, float(stdtrit(found.df, (1 + confidence) / 2))
    effective = p * (1 - p) / found.error**2 if found.error else found.clusters
    share = quantile**2 / effective
    centre = (p + share / 2) / (1 + share)
    half = math.sqrt(share * (p * (1 - p) + share / 4)) / (1 + share)
    # At 0 and 1 an end can miss the fraction by a rounding error.
    return replace(found, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


@dataclass(frozen=True, slots=True)
class Change(Estimate):
    """A change of a fraction, with a score interval for paired verdicts (Tango 1998)."""

    gained: float
    """Fraction of facts with the property on the second side only."""
    lost: float
    """Fraction of facts with the property on the first side only."""
    effective: float
    """The number of independent facts that say as much."""
    few: bool
    """Whether clusters are so nearly alike that a t interval would be too narrow."""

    def spread(self, change: float) -> float:
        """Return the variance of a fact's change if this is the true change."""
        b = (2 - self.value) * change - self.gained - self.lost
        # The likeliest fraction of losses; a root of a negative number is a rounding error.
        root = math.sqrt(max(b * b + 8 * self.lost * change * (1 - change), 0.0))
        return max((root - b) / 2 + change * (1 - change), 0.0)

    def score(self, change: float) -> float:
        """Return the distance from a hypothetical change, in standard errors at that change."""
        gap, spread = self.value - change, self.spread(change)
        return gap * math.sqrt(self.effective / spread) if spread else math.copysign(math.inf, gap)

    def equivalence(self, largest: float) -> float:
        """Return the p-value of a change outside -largest..largest: two one-sided score tests."""
        if self.clusters < 2:
            return math.nan
        return float(stdtr(self.df, max(self.score(largest), -self.score(-largest))))


def clustered_change(
    changes: Shaped[np.ndarray, " fact"],
    *clusters: Shaped[np.ndarray, " fact"],
    confidence: float = 0.95,
    least_icc: float | None = None,
    only_if_few: bool = False,
) -> Change:
    """Return the change of a fraction with its score interval for clustered facts (Tango 1998).

    The interval stays in -1..1 and is not a point if no fact changes, so it suits few facts. It is
    Tango's interval of paired verdicts with the effective number of facts and the quantile of
    Student's t, as in `clustered_fraction`.

    Args:
        changes: For each fact the change of its verdict, -1, 0 or 1, or a mean of several.
        clusters: As in `clustered`.
        confidence: The level of the interval.
        least_icc: If clusters are nearly all alike, the correlation in them cannot be estimated
            and is taken to be at least this. By default, if no cluster differs from another, each
            counts as one fact.
        only_if_few: Unless clusters are nearly all alike (see `clustered`; with two clusterings, in
            either), return the t interval, within -1..1, instead.
    """
    found = clustered(changes, *clusters, confidence=confidence)
    gained = float(np.maximum(changes, 0).mean())
    lost = gained - found.value
    n = len(changes)
    codes = [np.unique(of, return_inverse=True)[1] for of in clusters or (np.arange(n),)]
    few = any(_few(changes, code) for code in codes)
    variance = gained + lost - found.value**2
    effective = variance / found.error**2 if found.error else found.clusters
    if least_icc is not None and (few or not found.error):
        most = n / (1 + (n / found.clusters - 1) * least_icc)
        effective = min(effective, most) if found.error else most
    parts: list[Any] = [*astuple(found), gained, lost, float(effective), few]
    change = Change(*parts)
    if found.clusters < 2:
        return change
    if only_if_few and not few:
        return replace(change, low=max(found.low, -1.0), high=min(found.high, 1.0))
    square = float(stdtrit(found.df, (1 + confidence) / 2)) ** 2

    def excess(x: float) -> float:
        """Return how far the squared score exceeds its largest value in the interval."""
        return effective * (found.value - x) ** 2 - square * change.spread(x)

    # At the estimate itself the excess is 0 if no fact changes.
    ends: list[Any] = [
        end if found.value == end else brentq(excess, found.value + 1e-9 * (end - found.value), end)
        for end in (-1.0, 1.0)
    ]
    return replace(change, low=float(ends[0]), high=float(ends[1]))


def clustered_ratio(
    parts: Float[np.ndarray, " fact"],
    wholes: Float[np.ndarray, " fact"],
    *clusters: Shaped[np.ndarray, " fact"],
    confidence: float = 0.95,
) -> Interval:
    """Return the ratio of two means over the same facts, with its interval over clusters.

    The variance is that of the linearised ratio (Taylor). It is 0 if all changes of verdicts, or
    none, are undone: then the interval is that of `clustered_fraction` over the facts that changed.
    The ends are infinite if the interval of the denominator contains 0; if its mean is below
    `LEAST_WHOLE`, all are `nan`.
    """
    whole = clustered(wholes, *clusters, confidence=confidence)
    if whole.value < LEAST_WHOLE:
        return Interval(math.nan, math.nan, math.nan)
    value = float(parts.mean() / whole.value)
    if whole.low <= 0:
        return Interval(value, -math.inf, math.inf)
    rest = parts - value * wholes
    if value in (0, 1) and not rest.any() and np.isin(wholes, (-1, 0, 1)).all():
        changed = wholes != 0
        labels = clusters or (np.arange(len(wholes)),)
        found = clustered_fraction(
            np.full(changed.sum(), value), *(of[changed] for of in labels), confidence=confidence
        )
        return Interval(value, found.low, found.high)
    found = clustered(rest, *clusters, confidence=confidence)
    half = (found.high - found.low) / 2 / whole.value
    return Interval(value, value - half, value + half)


def half_effect(
    curves: Float[np.ndarray, "fact dose"],
    doses: Float[np.ndarray, " dose"],
    clusters: Shaped[np.ndarray, " fact"],
    *,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """Return the dose of half effect, with its percentile bootstrap interval over clusters.

    This is the first dose, interpolated between two doses, at which the mean curve has made half of
    its change between the first and the last dose.

    Args:
        curves: A value for each fact at each dose.
        doses: The doses, in increasing order.
        clusters: The cluster of each fact; clusters are resampled.
        seed: Seeds the resamples. One without any change counts on both sides.
        confidence: The level of the interval.
    """
    codes = np.unique(clusters, return_inverse=True)[1]
    count = int(codes.max()) + 1
    sums = np.zeros((count, curves.shape[1]))
    np.add.at(sums, codes, curves)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    value = _half(sums.sum(0), doses)
    found = np.array([_half(row, doses) for row in draws @ sums])
    tail = (1 - confidence) / 2
    ends = [
        float(np.quantile(np.nan_to_num(found, nan=gap), level, method="nearest"))
        for gap, level in ((-math.inf, tail), (math.inf, 1 - tail))
    ]
    return Interval(value, *(ends if count > 1 else (-math.inf, math.inf)))


def _half(curve: np.ndarray, doses: np.ndarray) -> float:
    whole = curve[-1] - curve[0]
    if whole == 0:
        return math.nan
    done = (curve - curve[0]) / whole
    after = int(np.argmax(done >= 0.5))
    step = (0.5 - done[after - 1]) / (done[after] - done[after - 1])
    return float(doses[after - 1] + step * (doses[after] - doses[after - 1]))
