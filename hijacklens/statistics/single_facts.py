"""Intervals and tests about *these facts*: each fact counts as an independent observation.

>>> fraction(40, 50).value, round(fraction(40, 50).low, 3), round(fraction(40, 50).high, 3)
(0.8, 0.67, 0.888)

Two runs over the same facts are compared in pairs, by McNemar's test. Claims about *relations like
these* need `hijacklens.statistics.clustered`.

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

LEAST_WHOLE = 0.05
"""A ratio is undefined if its denominator is smaller: a mean shift in logits, or a change of a
fraction of facts."""
Correction = Literal["holm", "benjamini-hochberg", "none"]


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


def ratio(part: float, whole: float) -> float:
    """Return a part of a change as a fraction of it: `nan` if the change is near zero."""
    return part / whole if abs(whole) >= LEAST_WHOLE else math.nan


def adjust(
    p_values: Float[np.ndarray, " test"], *, correction: Correction, tests: int | None = None
) -> Float[np.ndarray, " test"]:
    """Correct p-values for the number of tests: Holm (1979), or Benjamini and Hochberg (1995).

    Args:
        p_values: Uncorrected p-values, each in 0..1.
        correction: `holm` bounds the chance of any false finding, `benjamini-hochberg` the expected
            fraction of false findings, `none` returns the p-values as they are.
        tests: Total number of tests, if only the most promising have a p-value; the others count
            as 1.
    """
    from statsmodels.stats.multitest import fdrcorrection

    total = len(p_values) if tests is None else tests
    if total < len(p_values):
        raise ValueError(f"adjust: {len(p_values)} p-values cannot come from {total} tests")
    if len(p_values) == 0 or correction == "none":
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
