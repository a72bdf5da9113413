"""Thin, named uses of scipy and statsmodels: the intervals and tests that results are printed with.

>>> share(40, 50).value, round(share(40, 50).low, 3), round(share(40, 50).high, 3)
(0.8, 0.67, 0.888)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


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
