"""Checks: claims about a figure or statement, written down before it is run.

A check measures one number on the table of an analysis, with its confidence interval, and says
which numbers would bear the claim out:

    above, below   a direction: the whole interval has to lie on the right side
    near           an anchor: the estimate has to lie within a tolerance of a known number

>>> table = pd.DataFrame({"trained": [0.92, 0.91, 0.93], "identity": [0.60, 0.58, 0.61]})
>>> lower = above("a trained W_V is better", lambda t: mean(t.trained - t.identity), 0.0)
>>> outcome = lower.judge(table, "quick")
>>> outcome.state, round(outcome.value, 2)
('pass', 0.32)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from scipy import stats

from hijacklens.statistics import Interval

Scale: TypeAlias = Literal["quick", "paper"]
SCALES: tuple[Scale, ...] = ("quick", "paper")
State: TypeAlias = Literal["pass", "fail", "open"]
"""`open`: the claim is not decided at this scale; the check says why."""


Measure: TypeAlias = Callable[[Any], Interval]
"""The number of a check with its interval, from the table (a pandas DataFrame) of an analysis."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a check."""

    claim: str
    value: float
    low: float
    """Ends of the 95% confidence interval of the value."""
    high: float
    allowed: str
    """What would bear the claim out, e.g. `> 0` or `0.252 ± 0.001`."""
    state: State
    remark: str
    """Why a check is open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim; `above`, `below` and `near` make them."""

    claim: str
    measure: Measure
    """The number with its interval, from the table of the analysis."""
    kind: Literal["above", "below", "near"]
    bound: float
    tolerance: float = 0.0
    scales: tuple[Scale, ...] = SCALES
    """Where the claim is decided."""
    remark: str = ""
    """Why it is left open elsewhere."""

    @property
    def allowed(self) -> str:
        """The numbers that bear the claim out, in words."""
        if self.kind == "near":
            return f"{self.bound:.4g} ± {self.tolerance:.2g}"
        return f"{'>' if self.kind == 'above' else '<'} {self.bound:.4g}"

    def judge(self, table: pd.DataFrame, scale: Scale) -> Outcome:
        """Measure the claim on a table; a number that is not finite never passes."""
        measured = self.measure(table)
        ends = (float(end) for end in (measured.value, measured.low, measured.high))
        found = Interval(*ends)  # a table's numbers are NumPy's
        if scale not in self.scales:
            state: State = "open"
        else:
            state = "pass" if self._holds(found) else "fail"
        return Outcome(
            claim=self.claim,
            value=found.value,
            low=found.low,
            high=found.high,
            allowed=self.allowed,
            state=state,
            remark=self.remark if state == "open" else "",
        )

    def _holds(self, found: Interval) -> bool:
        if not all(map(math.isfinite, (found.value, found.low, found.high))):
            return False
        if self.kind == "near":
            return abs(found.value - self.bound) <= self.tolerance
        return found.low > self.bound if self.kind == "above" else found.high < self.bound


def above(claim: str, measure: Measure, bound: float, **more: Any) -> Check:
    """The interval lies above a bound; `more` are `scales` and `remark` of a `Check`."""
    return Check(claim=claim, measure=measure, kind="above", bound=bound, **more)


def below(claim: str, measure: Measure, bound: float, **more: Any) -> Check:
    """The interval lies below a bound."""
    return Check(claim=claim, measure=measure, kind="below", bound=bound, **more)


def near(claim: str, measure: Measure, anchor: float, tolerance: float, **more: Any) -> Check:
    """The estimate lies within a tolerance of a known number."""
    return Check(
        claim=claim, measure=measure, kind="near", bound=anchor, tolerance=tolerance, **more
    )


def lowest(intervals: list[Interval]) -> Interval:
    """Of several intervals the one whose lower end is lowest: what a claim about all rests on."""
    return min(intervals, key=lambda interval: interval.low)


def highest(intervals: list[Interval]) -> Interval:
    """Of several intervals the one whose upper end is highest."""
    return max(intervals, key=lambda interval: interval.high)


def mean(values: Any) -> Interval:
    """The mean over seeds (or facts) with its 95% Student interval.

    One value alone has no interval: its ends are infinite, so that no direction can rest on it.
    """
    numbers = np.asarray(values, dtype=float)
    centre = float(numbers.mean()) if len(numbers) else math.nan
    if len(numbers) < 2:
        return Interval(centre, -math.inf, math.inf)
    error = stats.sem(numbers)
    if error == 0:
        return Interval(centre, centre, centre)
    low, high = stats.t.interval(0.95, len(numbers) - 1, loc=centre, scale=error)
    return Interval(centre, float(low), float(high))


def exact(value: Any) -> Interval:
    """A number that was computed and not sampled: its interval is itself."""
    number = float(value)
    return Interval(number, number, number)
