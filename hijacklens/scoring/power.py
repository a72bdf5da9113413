"""How many facts and relations a paired comparison needs to find a change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from hijacklens.errors import InputError, shown, strict
from hijacklens.results.glance import Glance, Grid, Shown
from hijacklens.scoring.comparison import Comparison
from hijacklens.statistics import USUAL_ICC, needed

DISCORDANCE = 0.36
"""Measured on the atlas: SmolLM2, `do-not-think`, dose 0 to 1."""
PER_RELATION = (10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class Power(Shown):
    """The numbers of facts and relations that find a change, and what they assume."""

    change: float
    power: float
    alpha: float
    icc: float
    discordance: float
    facts: int
    """Facts for a claim about these facts."""
    relations: pd.DataFrame
    """For claims about relations like these: `facts_per_relation`, `relations`, `facts`."""
    gate_facts: int
    gate_relations: int
    """Facts, or relations of 20 facts, with which a gate with the change as its margin passes a
    model that has not changed (one-sided, with the same power)."""

    def glance(self) -> Glance:
        """The numbers for both claims."""
        rows = [{"claim": "these facts", "needed": f"{self.facts:,} facts"}]
        form = "{relations:,} relations of {facts_per_relation} facts ({facts:,})"
        for row in self.relations.to_dict("records"):
            rows.append({"claim": "relations like these", "needed": form.format_map(row)})
        return Glance(
            f"to find a change of {self.change:g} with power {self.power:g} (two-sided, alpha "
            f"{self.alpha:g})",
            (Grid.of(rows, {"claim about": "{claim}", "needed": "{needed}"}),),
            (
                f"assumed: {self.discordance:.3g} of the verdicts change, and changes correlate by "
                f"{self.icc:.3g} in a relation (ICC); like=result.compare(...) takes both from a "
                "pilot",
                f"a gate with the margin {abs(self.change):g} (compare --max-rise) passes an "
                f"unchanged model with that power from {self.gate_facts:,} facts on, or from "
                f"{self.gate_relations:,} relations of 20 facts (one-sided)",
            ),
            ("relations", "facts"),
        )


@strict
def power(
    change: float = 0.05,
    *,
    power: float = 0.8,
    icc: float | None = None,
    discordance: float | None = None,
    like: Comparison | None = None,
    alpha: float = 0.05,
) -> Power:
    """Return how many facts and relations a paired comparison needs to find a change of efficacy.

    Args:
        change: The change, between -1 and 1.
        power: The chance of finding it.
        icc: Intra-cluster correlation of the changes; by default .119, as in the atlas (SmolLM2,
            dose 0 to 1).
        discordance: The fraction of facts whose verdict changes, in either direction; by default
            .36, as there. It is at least the change.
        like: A comparison on a pilot, from which both are taken, under its first rule, as means
            over its models, schemes and doses; the discordance is at least the change.
        alpha: Level of the two-sided test.

    Raises:
        InputError: A number is out of its range.
    """
    if like is not None:
        table = like.changes()
        table = table[(table["rule"] == table["rule"].iloc[0]) & (table["measure"] == "efficacy")]
        turned = (table["gained"] + table["lost"]) / table["n"]
        icc = table["icc"].clip(0, 1).mean() if icc is None else icc
        if discordance is None:
            discordance = max(abs(change), float(turned.mean()))
    icc = USUAL_ICC if icc is None or math.isnan(icc) else float(icc)
    discordance = DISCORDANCE if discordance is None else float(discordance)
    allowed = {
        "change": (0 < abs(change) < 1, change, "a number between -1 and 1 other than 0"),
        "power": (alpha < power < 1, power, "a number between alpha and 1, such as 0.8"),
        "alpha": (0 < alpha < 1, alpha, "a number between 0 and 1, such as 0.05"),
        "icc": (0 <= icc <= 1, icc, "a number from 0 to 1"),
        "discordance": (
            abs(change) <= discordance <= 1,
            discordance,
            f"a number from the change, {abs(change)}, to 1",
        ),
    }
    for name, (fine, value, what) in allowed.items():
        if not fine:
            raise InputError(f"{name} is {shown(value)}; give {what}.")
    options = {"discordance": discordance, "power": power, "alpha": alpha}
    try:
        counts = [needed(change, icc=icc, facts=facts, **options) for facts in PER_RELATION]
        alone = needed(change, icc=0.0, facts=1, **options)
        options["alpha"] = min(2 * alpha, 0.99)
        gate = [needed(change, icc=x, facts=n, **options) for x, n in ((0.0, 1), (icc, 20))]
    except ValueError as error:
        raise InputError(f"change is {change}: {error}. Give a larger change.") from None
    relations = pd.DataFrame({"facts_per_relation": PER_RELATION, "relations": counts})
    relations["facts"] = relations["facts_per_relation"] * relations["relations"]
    return Power(change, power, alpha, icc, discordance, alone, relations, *gate)
