"""Confidence intervals and tests, from scipy and statsmodels, for two kinds of claim.

these facts             Facts are independent observations: the Wilson interval of a fraction,
                        McNemar's test, Student's t over facts (`single_facts`).
relations like these    Relations are the sample, since facts of one relation behave alike: means
                        and fractions with intervals clustered by relation (`clusters`).
"""

from __future__ import annotations

import warnings
from typing import Any

from hijacklens.statistics.clusters import (
    USUAL_ICC,
    Change,
    Estimate,
    clustered,
    clustered_change,
    clustered_fraction,
    clustered_ratio,
    half_effect,
    independent,
)
from hijacklens.statistics.gate import Claim, Gate, judge
from hijacklens.statistics.planning import detection, needed
from hijacklens.statistics.single_facts import (
    LEAST_WHOLE,
    Correction,
    Interval,
    McNemar,
    adjust,
    fraction,
    mcnemar,
    rank_p,
    ratio,
    wilson,
)

__all__ = [
    "LEAST_WHOLE",
    "USUAL_ICC",
    "Change",
    "Claim",
    "Correction",
    "Estimate",
    "Gate",
    "Interval",
    "McNemar",
    "adjust",
    "clustered",
    "clustered_change",
    "clustered_fraction",
    "clustered_ratio",
    "detection",
    "fraction",
    "half_effect",
    "independent",
    "judge",
    "mcnemar",
    "needed",
    "rank_p",
    "ratio",
    "wilson",
]


def __getattr__(name: str) -> Any:
    if name != "share":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    text = "share is now called fraction; the next release drops the old name."
    warnings.warn(text, FutureWarning, stacklevel=2)
    return fraction
