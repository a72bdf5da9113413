"""Thin, named uses of scipy and statsmodels: the intervals and tests that results are printed with.

>>> share(40, 50).value, round(share(40, 50).low, 3), round(share(40, 50).high, 3)
(0.8, 0.67, 0.888)

Two runs over the same facts are compared in pairs: verdicts by McNemar's test, means by the
bootstrap over the facts, single heads with their p-values corrected for how many were looked at.

>>> before, after = [True, True, True, False], [False, False, True, False]
>>> mcnemar(np.array(before), np.array(after))
McNemar(lost=2, gained=0, p=0.5)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 2000
"""Bootstrap samples of an interval: its ends move by about a fiftieth of its width by the seed."""
Correction = Literal["holm", "benjamini-hochberg"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its confidence interval, in the unit of the estimate."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(count: float | int, total: int, *, confidence: float = 0.95) -> Interval:
    """A share with its Wilson score interval (Wilson 1927), which keeps its level near 0 and 1.

    Args:
        count: How many of the `total` have the property; a fraction where a tie counts in part.
        total: How many there are; 0 gives `nan` for the share and the interval [0, 1].
        confidence: The level of the interval.
    """
    if not 0 <= count <= total:
        raise ValueError(f"share: count must lie in 0..{total}, got {count}")
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    low, high = wilson(np.array([count]), np.array([total]), confidence=confidence)
    return Interval(count / total, float(low[0]), float(high[0]))


def wilson(
    counts: np.ndarray, totals: np.ndarray, *, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the Wilson score intervals of many shares; `totals` are at least 1."""
    from statsmodels.stats.proportion import proportion_confint

    ends: Any = proportion_confint(counts, totals, alpha=1 - confidence, method="wilson")
    shares = counts / totals
    # At 0 and 1 an end can miss the share by a rounding error.
    return np.minimum(ends[0], shares), np.maximum(ends[1], shares)


@dataclass(frozen=True, slots=True)
class McNemar:
    """How many verdicts changed between two runs over the same facts, and whether by chance."""

    lost: int
    """Facts with the property in the first run only."""
    gained: int
    """Facts with the property in the second run only."""
    p: float
    """Exact two-sided p-value that both kinds of change are equally likely (McNemar 1947)."""


def mcnemar(first: Bool[np.ndarray, " fact"], second: Bool[np.ndarray, " fact"]) -> McNemar:
    """McNemar's exact test of two yes-or-no verdicts on the same facts, in the same order.

    Facts on which both runs agree say nothing; with no change at all the p-value is 1.
    """
    from statsmodels.stats.contingency_tables import mcnemar as exact

    if first.shape != second.shape:
        raise ValueError(f"mcnemar: {len(first)} verdicts cannot be paired with {len(second)}")
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    found: Any = exact([[0, lost], [gained, 0]], exact=True)
    return McNemar(lost, gained, float(found.pvalue))


def paired_mean(
    differences: Float[np.ndarray, " fact"],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean of paired differences with its percentile bootstrap interval over the facts.

    A difference of shares is the mean of differences of 0s and 1s. Facts are drawn as if they
    were independent: facts of one relation that behave alike make the interval too narrow.

    Args:
        differences: Second run minus first run, a value per fact; none gives `nan`.
        seed: Seeds the bootstrap.
        confidence: The level of the interval.
        resamples: How many bootstrap samples.
    """
    return paired_ratio(
        differences,
        np.ones(len(differences)),
        seed=seed,
        confidence=confidence,
        resamples=resamples,
    )


def paired_ratio(
    parts: Float[np.ndarray, " fact"],
    wholes: Float[np.ndarray, " fact"],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """The ratio of two means over the same facts, with its percentile bootstrap interval.

    Such as the share of a rise that goes away. The ends are infinite where the denominator may
    as well be 0; if its mean is not above 0, there is nothing to take a share of: all are `nan`.

    Args:
        parts: The numerator's value of each fact.
        wholes: The denominator's value of each fact.
        seed: Seeds the bootstrap.
        confidence: The level of the interval.
        resamples: How many bootstrap samples.
    """
    if parts.shape != wholes.shape:
        raise ValueError(f"paired_ratio: {len(parts)} values cannot be paired with {len(wholes)}")
    if len(parts) == 0 or wholes.mean() <= 0:
        return Interval(math.nan, math.nan, math.nan)
    value = float(parts.mean() / wholes.mean())
    if len(parts) == 1:  # one fact says nothing of its spread
        return Interval(value, -math.inf, math.inf)
    # How often each fact is drawn: the means of all samples are then two matrix products.
    n = len(parts)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    tops, bottoms = draws @ parts, draws @ wholes
    samples = np.divide(tops, bottoms, out=np.full(resamples, math.nan), where=bottoms > 0)
    # A sample without a whole says nothing, so it widens the interval on both sides.
    outside = [np.where(np.isnan(samples), end, samples) for end in (-math.inf, math.inf)]
    tail = (1 - confidence) / 2
    low, high = (
        float(np.quantile(values, level, method="nearest"))
        for values, level in zip(outside, (tail, 1 - tail), strict=True)
    )
    # The mean of equal values can miss them by a rounding error.
    return Interval(value, min(low, value), max(high, value))


def signed_rank(differences: Float[np.ndarray, " fact"]) -> float:
    """Two-sided p-value that differences lie evenly about 0: Wilcoxon's signed-rank test.

    It asks less of the distribution than a t-test: a few facts with huge shifts do not decide.
    Differences that are all 0, or none at all, give 1.
    """
    from scipy.stats import wilcoxon

    if not np.any(differences):
        return 1.0
    found: Any = wilcoxon(differences)
    return float(found.pvalue)


def adjust(
    p_values: Float[np.ndarray, " test"], *, correction: Correction, tests: int | None = None
) -> Float[np.ndarray, " test"]:
    """p-values corrected for how many tests were made: Holm (1979), or Benjamini-Hochberg (1995).

    Args:
        p_values: Uncorrected p-values, each in 0..1.
        correction: `holm` bounds the chance of one false finding, `benjamini-hochberg` the
            expected share of false ones among the findings.
        tests: How many tests were made in all, where only the most promising have a p-value:
            the others count as 1.
    """
    from statsmodels.stats.multitest import fdrcorrection

    total = len(p_values) if tests is None else tests
    if total < len(p_values):
        raise ValueError(f"adjust: {len(p_values)} p-values cannot come from {total} tests")
    if len(p_values) == 0:
        return p_values
    if correction == "benjamini-hochberg":
        padded = np.concatenate([p_values, np.ones(total - len(p_values))])
        return np.asarray(fdrcorrection(padded)[1])[: len(p_values)]
    # The function of statsmodels that has Holm's correction takes 50 ms a call to free memory.
    order = np.argsort(p_values)
    raised = p_values[order] * (total - np.arange(len(p_values)))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return corrected


def rank_p(value: float, controls: Float[np.ndarray, " control"]) -> float:
    """One-sided p-value of a value among those of random controls: how often they are as high.

    `(1 + how many are at least as high) / (1 + how many there are)`, so never 0: with N controls
    it is at least 1 / (N + 1) (Phipson and Smyth 2010).
    """
    return (1 + int((controls >= value).sum())) / (1 + len(controls))
