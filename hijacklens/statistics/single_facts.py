"""Intervals and tests about *these facts*: each fact counts as an independent observation.

>>> fraction(40, 50).value, round(fraction(40, 50).low, 3), round(fraction(40, 50).high, 3)
(0.8, 0.67, 0.888)

Two runs over the same facts are compared in pairs: verdicts by McNemar's test, means by the
bootstrap over facts, single heads with p-values corrected for the number of heads. Claims about
*relations like these* need `hijacklens.statistics.clustered`.

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
"""Bootstrap resamples: another seed moves an interval's ends by a fiftieth of its width."""
LEAST_WHOLE = 0.05
"""A ratio is undefined if its denominator is smaller: a mean shift in logits, or a change of a
fraction of facts."""
Correction = Literal["holm", "benjamini-hochberg"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its confidence interval, in the unit of the estimate."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def columns(self, name: str) -> dict[str, float]:
        """Return the columns `name`, `name_low` and `name_high` of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def fraction(count: float | int, total: int, *, confidence: float = 0.95) -> Interval:
    """Return a fraction with its Wilson score interval (Wilson 1927), accurate near 0 and 1 too.

    Args:
        count: How many of the `total` have the property; a fraction if ties count in part.
        total: The number of cases; 0 gives `nan` with the interval [0, 1].
        confidence: The level of the interval.
    """
    if not 0 <= count <= total:
        raise ValueError(f"fraction: count must lie in 0..{total}, got {count}")
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    low, high = wilson(np.array([count]), np.array([total]), confidence=confidence)
    return Interval(count / total, float(low[0]), float(high[0]))


def wilson(
    counts: np.ndarray, totals: np.ndarray, *, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the Wilson score intervals of many fractions; `totals` are at least 1."""
    from statsmodels.stats.proportion import proportion_confint

    ends: Any = proportion_confint(counts, totals, alpha=1 - confidence, method="wilson")
    fractions = counts / totals
    # At 0 and 1 an end can miss the fraction by a rounding error.
    return np.minimum(ends[0], fractions), np.maximum(ends[1], fractions)


@dataclass(frozen=True, slots=True)
class McNemar:
    """The changes of verdict between two runs over the same facts, with their p-value."""

    lost: int
    """Number of facts with the property in the first run only."""
    gained: int
    """Number of facts with the property in the second run only."""
    p: float
    """Exact two-sided p-value of equal chances for both kinds of change (McNemar 1947)."""


def mcnemar(first: Bool[np.ndarray, " fact"], second: Bool[np.ndarray, " fact"]) -> McNemar:
    """Compare two yes-or-no verdicts on the same facts, in the same order, by McNemar's exact test.

    Facts on which both runs agree do not count; without any change the p-value is 1.
    """
    from statsmodels.stats.contingency_tables import mcnemar as exact

    if first.shape != second.shape:
        raise ValueError(f"mcnemar: {len(first)} verdicts cannot be paired with {len(second)}")
    lost, gained = int((first & ~second).sum()), int((~first & second).sum())
    test: Any = exact([[0, lost], [gained, 0]], exact=True)
    return McNemar(lost, gained, float(test.pvalue))


def paired_mean(
    differences: Float[np.ndarray, " fact"],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the mean of paired differences with its percentile bootstrap interval over facts.

    `differences` are second run minus first run, one value per fact; an empty array gives `nan`.
    A difference of fractions is a mean of differences of 0s and 1s. Facts are resampled as if they
    were independent: facts of one relation that behave alike make the interval too narrow.
    """
    ones = np.ones(len(differences))
    return paired_ratio(differences, ones, seed=seed, confidence=confidence, resamples=resamples)


def ratio(part: float, whole: float) -> float:
    """Return a part of a change as a fraction of it: `nan` if the change is near zero."""
    return part / whole if abs(whole) >= LEAST_WHOLE else math.nan


def paired_ratio(
    parts: Float[np.ndarray, " fact"],
    wholes: Float[np.ndarray, " fact"],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Return the ratio of two means over the same facts, with its percentile bootstrap interval.

    An example is the fraction of a rise that goes away: `parts` are the numerator's values for each
    fact, `wholes` the denominator's. The ends are infinite if the denominator may be 0; if its mean
    is below `LEAST_WHOLE`, the ratio is undefined: all are `nan`.
    """
    if parts.shape != wholes.shape:
        raise ValueError(f"paired_ratio: {len(parts)} values cannot be paired with {len(wholes)}")
    if len(parts) == 0 or wholes.mean() < LEAST_WHOLE:
        return Interval(math.nan, math.nan, math.nan)
    value, n = float(parts.mean() / wholes.mean()), len(parts)
    if n == 1:  # a single fact has no spread
        return Interval(value, -math.inf, math.inf)
    # With counts of the drawn facts, the sums of all resamples are two matrix products.
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    tops, bottoms = draws @ parts, draws @ wholes
    tail, ends = (1 - confidence) / 2, []
    for undefined, level in ((-math.inf, tail), (math.inf, 1 - tail)):
        # A resample with a non-positive denominator is undefined; count it as -inf and as +inf.
        ratios = np.divide(tops, bottoms, out=np.full(resamples, undefined), where=bottoms > 0)
        ends.append(float(np.quantile(ratios, level, method="nearest")))
    low, high = ends
    # The mean of equal values can miss them by a rounding error.
    return Interval(value, min(low, value), max(high, value))


def signed_rank(differences: Float[np.ndarray, " fact"]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test, for symmetry about 0.

    Unlike in a t-test, a few facts with huge shifts do not decide. Differences that are all 0, or
    an empty array, give 1.
    """
    from scipy.stats import wilcoxon

    if not np.any(differences):
        return 1.0
    test: Any = wilcoxon(differences)
    return float(test.pvalue)


def adjust(
    p_values: Float[np.ndarray, " test"], *, correction: Correction, tests: int | None = None
) -> Float[np.ndarray, " test"]:
    """Correct p-values for the number of tests: Holm (1979), or Benjamini and Hochberg (1995).

    Args:
        p_values: Uncorrected p-values, each in 0..1.
        correction: `holm` bounds the chance of any false finding, `benjamini-hochberg` the expected
            fraction of false findings.
        tests: Total number of tests, if only the most promising have a p-value; the others count
            as 1.
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
    # Holm's correction in statsmodels takes 50 ms per call, as it collects garbage.
    order = np.argsort(p_values)
    raised = p_values[order] * (total - np.arange(len(p_values)))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return corrected


def rank_p(value: float, controls: Float[np.ndarray, " control"]) -> float:
    """Return the one-sided p-value of a value, compared with the values of random controls.

    It is `(1 + number of controls at least as high) / (1 + number of controls)`, so with N controls
    at least 1 / (N + 1) (Phipson and Smyth 2010).
    """
    return (1 + int((controls >= value).sum())) / (1 + len(controls))
