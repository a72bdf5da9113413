"""How efficacy and the shift grow with the dose: slopes with their intervals, and half doses."""

from __future__ import annotations

from typing import Any

import pandas as pd

from hijacklens.errors import InputError, choice
from hijacklens.scoring.efficacy import RULES, Rule, margin
from hijacklens.statistics import clustered, half_effect


def trends(items: pd.DataFrame, *, rule: Rule, seed: int) -> pd.DataFrame:
    """Return the table of `HijackResult.trends`.

    Raises:
        InputError: An unknown rule, or there is only one dose.
    """
    choice("rule", rule, RULES)
    if items["dose"].nunique() < 2:
        raise InputError("a trend needs at least two doses, such as doses=range(6).")
    rows = []
    table = items.assign(margin=margin(items, rule))
    runs: Any = table.groupby(["model", "scheme"], sort=False)
    for (model, scheme), run in runs:
        wide = run.pivot(index="case_id", columns="dose", values="margin")
        facts = run.drop_duplicates("case_id").set_index("case_id").loc[wide.index]
        margins, doses = wide.to_numpy(float), wide.columns.to_numpy(float)
        relations = facts["relation_id"].to_numpy(str)
        centred = doses - doses.mean()
        for measure, values in (
            ("efficacy", (margins > 0).astype(float)),
            ("shift", margins - margins[:, :1]),
        ):
            slopes = values @ centred / (centred**2).sum()
            here, like = clustered(slopes), clustered(slopes, relations)
            half = half_effect(values, doses, relations, seed=seed)
            rows.append(
                {
                    "model": model,
                    "scheme": scheme,
                    "measure": measure,
                    "n": len(wide),
                    "slope": here.value,
                    "facts_low": here.low,
                    "facts_high": here.high,
                    "facts_p": here.p,
                    "clusters": like.clusters,
                    "design_effect": like.design_effect,
                    "clustered_low": like.low,
                    "clustered_high": like.high,
                    "clustered_p": like.p,
                    **half.columns("half_dose"),
                }
            )
    return pd.DataFrame(rows)
