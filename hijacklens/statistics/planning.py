"""The power of a paired comparison of verdicts, before it is run.

A fact changes its verdict with probability `discordance`, in one direction more often than in the
other: the change of efficacy is the difference. Facts of one relation change alike, by `icc`.

>>> round(detection(0.05, icc=0.119, discordance=0.3, relations=20, facts=48), 2)
0.18
>>> needed(0.05, icc=0.0, discordance=0.3, facts=1)
936
"""

from __future__ import annotations

import math

MOST_RELATIONS = 1_000_000


def detection(
    change: float,
    *,
    icc: float,
    discordance: float,
    relations: int,
    facts: int,
    alpha: float = 0.05,
) -> float:
    """Return the power of the two-sided t-test over relations with equally many facts.

    Args:
        change: The change of efficacy (or another fraction), -1..1.
        icc: Intra-cluster correlation of the change.
        discordance: The fraction of facts whose verdict changes, in either direction.
        relations: Number of relations. With one fact in each and an ICC of 0 this is the power of
            a claim about these facts.
        facts: Facts in each relation.
        alpha: Level of the test.
    """
    from scipy.special import stdtrit
    from scipy.stats import nct

    spread = (discordance - change**2) * (1 + (facts - 1) * icc) / (relations * facts)
    if spread <= 0:
        return 1.0
    df, shift = relations - 1, abs(change) / math.sqrt(spread)
    critical = stdtrit(df, 1 - alpha / 2)
    return float(nct.sf(critical, df, shift) + nct.cdf(-critical, df, shift))


def needed(
    change: float,
    *,
    icc: float,
    discordance: float,
    facts: int,
    power: float = 0.8,
    alpha: float = 0.05,
) -> int:
    """Return the smallest number of relations at which `detection` reaches a power.

    Raises:
        ValueError: More than a million relations would be needed.
    """

    def enough(relations: int) -> bool:
        found = detection(
            change, icc=icc, discordance=discordance, relations=relations, facts=facts, alpha=alpha
        )
        return found >= power

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_RELATIONS:
            raise ValueError(f"a change of {change} needs more than {MOST_RELATIONS} relations")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
