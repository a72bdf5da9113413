"""Checks: claims about a figure or statement, each with the range in which it holds.

A check measures one number, with its confidence interval, on the table of an analysis. The claim
passes according to its kind:

    above, below   a direction: the whole interval lies on the stated side of a bound
    near           an anchor: the estimate lies within a tolerance of a known number

>>> table = pd.DataFrame({"trained": [0.92, 0.91, 0.93], "identity": [0.60, 0.58, 0.61]})
>>> lower = above("a trained W_V is better", lambda t: mean(t.trained - t.identity), 0.0)
>>> outcome = lower.judge(table, "quick")
>>> outcome.state, round(outcome.value, 2)
('pass', 0.32)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from hijacklens.errors import unknown
from hijacklens.statistics import Interval, clustered

Scale: TypeAlias = Literal["quick", "full"]
SCALES: tuple[Scale, ...] = ("quick", "full")
Origin: TypeAlias = Literal["paper", "identity", "own"]
"""Where a claim comes from: the paper states it or implies it; it is exact, so that it tests our
code or a theorem that is proved; or it is ours."""
State: TypeAlias = Literal["pass", "fail", "open"]
"""`open` means that the claim is not decided at this scale, or with these settings; the check says
why."""


def scale_named(name: str) -> Scale:
    """Return the scale of a name; `paper` is the former name of `full`.

    Raises:
        InputError: No scale has that name.
    """
    scale = "full" if name == "paper" else name
    if scale not in SCALES:
        raise unknown("scale", name, SCALES)
    return scale


FEW: Mapping[str, Any] = {
    "scales": ("full",),
    "few": True,
    "remark": "undecided with the few facts of this scale",
}
"""Options of a direction for which the facts of the quick scale may be too few."""

NOTHING = Interval(math.nan, math.nan, math.nan)
"""What a measure returns if the table has no rows that its claim is about. A number that was
computed and is not finite is another object."""

Measure: TypeAlias = Callable[[Any], Interval]
"""A function from the table of an analysis (a DataFrame) to a number with its interval."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The measured number of a check and its verdict."""

    claim: str
    value: float
    low: float
    """Ends of the 95% confidence interval of the value."""
    high: float
    allowed: str
    """The values under which the claim holds, e.g. `> 0` or `0.252 ± 0.001`."""
    state: State
    remark: str
    """Why a check is open."""
    origin: Origin = "paper"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim; make it with `above`, `below` or `near`."""

    claim: str
    measure: Measure
    """Computes the number and its interval from the table of the analysis."""
    kind: Literal["above", "below", "near"]
    bound: float
    tolerance: float = 0.0
    scales: tuple[Scale, ...] = SCALES
    """The scales at which the claim is decided."""
    remark: str = ""
    """Why the claim is open at the other scales."""
    known_at: Mapping[str, Any] = field(default_factory=dict)
    """Settings for which the anchor is known. With others the claim is open."""
    few: bool = False
    """Whether the other scales only have fewer facts: there the claim is open while its interval
    has values on both sides of the bound."""
    origin: Origin | None = None
    """None for the origin that the catalogue has for the analysis."""

    @property
    def allowed(self) -> str:
        """The values under which the claim holds, as text."""
        if self.kind == "near":
            return f"{self.bound:.4g} ± {self.tolerance:.2g}"
        return f"{'>' if self.kind == 'above' else '<'} {self.bound:.4g}"

    def judge(
        self, table: pd.DataFrame, scale: Scale, settings: Any = None, *, own: bool = False
    ) -> Outcome:
        """Measure the claim on a table that was made with `settings`.

        A value that is not finite never passes. `own` says that settings, models or facts are not
        those of the scale. Only then may the table have nothing that a claim is about.
        """
        measured = self.measure(table)
        # Tables hold NumPy numbers; outcomes are saved as JSON.
        interval = Interval(*map(float, (measured.value, measured.low, measured.high)))
        holds = self._holds(interval)
        decided = holds or (interval.low > self.bound or interval.high < self.bound)
        known = settings is None or all(
            getattr(settings, name) == value for name, value in self.known_at.items()
        )
        state, remark = "open", self.remark
        if measured is NOTHING and own:
            remark = "the table has nothing that the claim is about"
        elif not known:
            anchored = ", ".join(f"{name} = {value}" for name, value in self.known_at.items())
            remark = f"the anchor is known for {anchored} only"
        elif scale in self.scales or (self.few and decided):
            state, remark = "pass" if holds else "fail", ""
        return Outcome(
            claim=self.claim,
            value=interval.value,
            low=interval.low,
            high=interval.high,
            allowed=self.allowed,
            state=state,
            remark=remark,
        )

    def _holds(self, measured: Interval) -> bool:
        if self.kind == "near":
            return abs(measured.value - self.bound) <= self.tolerance
        if not all(map(math.isfinite, (measured.value, measured.low, measured.high))):
            return False
        return measured.low > self.bound if self.kind == "above" else measured.high < self.bound


def above(claim: str, measure: Measure, bound: float, **more: Any) -> Check:
    """Claim that the interval lies above a bound. `more`: other fields of `Check`."""
    return Check(claim=claim, measure=measure, kind="above", bound=bound, **more)


def below(claim: str, measure: Measure, bound: float, **more: Any) -> Check:
    """Claim that the interval lies below a bound."""
    return Check(claim=claim, measure=measure, kind="below", bound=bound, **more)


def near(claim: str, measure: Measure, anchor: float, tolerance: float, **more: Any) -> Check:
    """Claim that the estimate lies within a tolerance of a known number."""
    return Check(
        claim=claim, measure=measure, kind="near", bound=anchor, tolerance=tolerance, **more
    )


def lowest(intervals: list[Interval]) -> Interval:
    """Return the interval with the lowest lower end, which decides a claim about all of them.

    An end that is no number comes first; without intervals there is `NOTHING`.
    """
    return min(intervals, key=lambda each: (each.low == each.low, each.low), default=NOTHING)


def highest(intervals: list[Interval]) -> Interval:
    """Return the interval with the highest upper end, as `lowest` does for the lower one."""
    return max(intervals, key=lambda each: (each.high != each.high, each.high), default=NOTHING)


def every(values: Any, by: Any, clusters: Any = None) -> list[Interval]:
    """Return the mean of each group with its interval, for a claim about every group."""
    return [mean(group, clusters) for _, group in values.groupby(by)]


def paired(table: pd.DataFrame, value: str, by: list[str], **ends: tuple[Any, Any]) -> Any:
    """Return the difference of a column between two conditions, run by run.

    Args:
        table: A row per run and condition.
        value: The column that is compared.
        by: The columns that identify a run.
        **ends: The column of the condition, with its two entries: the value at the first minus the
            value at the second, NaN for a run that lacks one of them. Nothing is compared if the
            entries are equal, or no run has one of them.

    >>> table = pd.DataFrame({"seed": [0, 0], "W_V": ["trained", "fixed"], "accuracy": [0.75, 0.5]})
    >>> paired(table, "accuracy", ["seed"], W_V=("trained", "fixed")).tolist()
    [0.25]
    """
    ((column, (first, second)),) = ends.items()
    wide = table.pivot(index=by, columns=column, values=value)
    if first == second or first not in wide or second not in wide:
        return pd.Series(index=wide.index[:0], dtype=float)
    return wide[first] - wide[second]


def mean(values: Any, by: Any = None) -> Interval:
    """Return the mean over seeds (or facts) with its 95% Student interval.

    The interval of a single value, or of a single cluster, is infinite, so that no claim about a
    direction can pass on it.

    Args:
        values: Independent numbers, or a column of numbers that are alike within clusters.
        by: What defines the clusters, as in `DataFrame.groupby`.
    """
    numbers = np.asarray(values, dtype=float)
    if not len(numbers):
        return NOTHING
    clusters = () if by is None else (values.groupby(by).ngroup().to_numpy(),)
    found = clustered(numbers, *clusters)
    return Interval(found.value, found.low, found.high)


def exact(value: Any) -> Interval:
    """Return the degenerate interval of a number that is computed exactly, not sampled."""
    number = float(value)
    return Interval(number, number, number)
