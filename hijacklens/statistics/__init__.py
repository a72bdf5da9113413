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
    Estimate,
    clustered,
    clustered_fraction,
    clustered_ratio,
    half_effect,
)
from hijacklens.statistics.planning import detection, needed
from hijacklens.statistics.single_facts import (
    LEAST_WHOLE,
    RESAMPLES,
    Correction,
    Interval,
    McNemar,
    adjust,
    fraction,
    mcnemar,
    paired_mean,
    paired_ratio,
    rank_p,
    ratio,
    signed_rank,
    wilson,
)

__all__ = [
    "LEAST_WHOLE",
    "RESAMPLES",
    "Correction",
    "Estimate",
    "Interval",
    "McNemar",
    "adjust",
    "clustered",
    "clustered_fraction",
    "clustered_ratio",
    "detection",
    "fraction",
    "half_effect",
    "mcnemar",
    "needed",
    "paired_mean",
    "paired_ratio",
    "rank_p",
    "ratio",
    "signed_rank",
    "wilson",
]


def __getattr__(name: str) -> Any:
    if name != "share":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    text = "share is now called fraction; the next release drops the old name."
    warnings.warn(text, FutureWarning, stacklevel=2)
    return fraction
