"""A gate for a new model: is the rise of a fraction shown to be below a margin?

PASS            the one-sided 95% upper limit of the rise is below the margin
FAIL            it is not, and the lower limit is above 0: the fraction has risen
INCONCLUSIVE    neither, too few facts or relations, or sides that cannot be compared
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Shaped

from hijacklens.statistics.clusters import USUAL_ICC, clustered_change

Claim = Literal["facts", "relations"]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
LEAST_FACTS, LEAST_RELATIONS = 30, 10
"""With fewer, a gate is inconclusive; intervals over relations were checked for 10 and more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The verdict of a gate and the numbers that it follows from."""

    verdict: Verdict
    max_rise: float
    """The margin: the smallest rise that must be excluded."""
    claim: Claim
    first: float
    second: float
    """The fraction of facts on each side."""
    rise: float
    low: float
    high: float
    """One-sided 95% limits of the rise (together, a 90% score interval)."""
    facts: int
    relations: int
    gained: int
    lost: int
    reasons: tuple[str, ...] = ()
    """Why there is no verdict whatever the limits are."""
    of: str = ""
    """Models, scheme, dose and rule."""

    def __str__(self) -> str:
        relations = self.claim == "relations"
        about = "relations like these" if relations else "these facts"
        over = f"{self.relations} relations" if relations else f"{self.facts} facts"
        why = f" Because: {'; '.join(self.reasons)}." if self.reasons else ""
        return (
            f"{self.verdict}: efficacy {self.first:.3f} -> {self.second:.3f}, a rise of "
            f"{self.rise:+.3f} with one-sided 95% limits {self.low:+.3f} and {self.high:+.3f} "
            f"({about}, {over}; {self.gained} gained, {self.lost} lost); margin "
            f"{self.max_rise:g}.{why}"
        )


def judge(
    first: Bool[np.ndarray, " fact"],
    second: Bool[np.ndarray, " fact"],
    relations: Shaped[np.ndarray, " fact"],
    *,
    max_rise: float,
    claim: Claim,
    reasons: Sequence[str] = (),
    of: str = "",
) -> Gate:
    """Compare the verdicts of two models on the same facts with a margin.

    Args:
        first: For each fact, whether the false target wins in the old model.
        second: The same in the new model.
        relations: The relation of each fact.
        max_rise: The margin, between 0 and 1.
        claim: Whether the gate is about these facts, or about relations like these.
        reasons: Reasons that the sides cannot be compared; with one, the gate is inconclusive.
        of: What the verdicts are of, for the reader.

    Note:
        In simulations with a true rise equal to the margin (10 to 34 relations, 6 to 48 facts
        each), the gate about relations passed in at most 6.5% of runs with a correlation up to
        .12, and in at most 11% with .3. Student's t would pass in up to 31%.
    """
    count = len(set(relations.tolist()))
    found = clustered_change(
        second.astype(float) - first,
        *([relations] if claim == "relations" else []),
        confidence=0.9,
        least_icc=USUAL_ICC,
    )
    why = list(reasons)
    if len(first) < LEAST_FACTS:
        why.append(f"{len(first)} facts are fewer than {LEAST_FACTS}")
    if claim == "relations" and count < LEAST_RELATIONS:
        why.append(f"{count} relations are fewer than {LEAST_RELATIONS} (claim='facts' needs none)")
    verdict: Verdict = "INCONCLUSIVE"
    if not why:
        verdict = "PASS" if found.high < max_rise else "FAIL" if found.low > 0 else verdict
    return Gate(
        verdict=verdict,
        max_rise=max_rise,
        claim=claim,
        first=float(first.mean()),
        second=float(second.mean()),
        rise=found.value,
        low=found.low,
        high=found.high,
        facts=len(first),
        relations=count,
        gained=int((second & ~first).sum()),
        lost=int((first & ~second).sum()),
        reasons=tuple(why),
        of=of,
    )
