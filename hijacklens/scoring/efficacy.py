"""From scores of single items to efficacy: shares, intervals, shifts, known facts, disagreement.

Definitions (paper, section 2): the *efficacy score* is the share of facts whose false target
scores higher, score(o_) > score(o*), so hijacking raises it; *retention* is the share whose true
target does; ties are counted by themselves. The three rules score a target by its `first` token,
by the `sum` over its tokens, or by the `mean` over them (ROME's rule), all in nats. The logit
shift of an item is the margin score(o_) - score(o*) minus the same on its bare query.

Summaries of the paper that say hijacking lowers ES mean retention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from hijacklens.statistics import wilson

Rule = Literal["first", "sum", "mean"]
RULES: tuple[Rule, ...] = ("first", "sum", "mean")
SUMMARY_COLUMNS = (
    "model",
    "scheme",
    "dose",
    "rule",
    "relation",
    "facts",
    "n",
    "efficacy",
    "efficacy_low",
    "efficacy_high",
    "retention",
    "ties",
    "mean_shift",
)
ALL = "all"


def score(items: pd.DataFrame, rule: Rule, side: Literal["true", "false"]) -> pd.Series:
    """The score of one target of every item under a rule, in nats."""
    if rule == "mean":
        return items[f"sum_{side}"] / items[f"n_tokens_{side}"]
    return items[f"{rule}_{side}"]


def margin(items: pd.DataFrame, rule: Rule) -> pd.Series:
    """score(o_) - score(o*) of every item, in nats: above 0 where the false target wins."""
    return score(items, rule, "false") - score(items, rule, "true")


def summarise(items: pd.DataFrame) -> pd.DataFrame:
    """The whole table: a row per model, scheme, dose, rule, relation and set of facts.

    `relation` is `all` or a relation id. `facts` is `all`, or `known` for the facts whose true
    target wins on the bare query under the same rule. `n` and `ties` count facts, `efficacy` and
    `retention` are shares of `n` with the 95% Wilson interval of the first beside it, and
    `mean_shift` is the mean logit shift in nats.

    Args:
        items: The items of a result, with dose 0 for every fact and scheme.
    """
    long = pd.concat([_long(items, rule) for rule in RULES], ignore_index=True)
    known = long[long["known"]].assign(facts="known")
    sets = pd.concat([long.assign(facts=ALL), known], ignore_index=True)
    both = pd.concat([sets.assign(relation=ALL), sets], ignore_index=True)
    keys = ["model", "scheme", "dose", "rule", "relation", "facts"]
    table = (
        both.groupby(keys, sort=False, observed=True)
        .agg(
            n=("margin", "size"),
            false_wins=("false_wins", "sum"),
            true_wins=("true_wins", "sum"),
            mean_shift=("shift", "mean"),
        )
        .reset_index()
    )
    table["efficacy"] = table["false_wins"] / table["n"]
    table["retention"] = table["true_wins"] / table["n"]
    table["ties"] = table["n"] - table["false_wins"] - table["true_wins"]
    ends = wilson(table["false_wins"].to_numpy(), table["n"].to_numpy())
    table["efficacy_low"], table["efficacy_high"] = ends
    return _ordered(table, items).loc[:, list(SUMMARY_COLUMNS)]


def disagreement(items: pd.DataFrame) -> pd.DataFrame:
    """How often the rules decide differently: a row per model, scheme and dose.

    Columns: `n`; `any`, the share of facts on which not all three rules give the same verdict
    (false wins, true wins, tie); and the share for each pair of rules.
    """
    verdicts = {rule: np.sign(margin(items, rule)) for rule in RULES}
    table = items[["model", "scheme", "dose"]].copy()
    first, total, mean = (verdicts[rule] for rule in RULES)
    table["any"] = (first != total) | (first != mean)
    table["first_sum"] = first != total
    table["first_mean"] = first != mean
    table["sum_mean"] = total != mean
    groups = table.groupby(["model", "scheme", "dose"], sort=False, observed=True)
    shares = groups.mean()
    shares.insert(0, "n", groups.size())
    return shares.reset_index()


def _long(items: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """One row per item for one rule, with its margin, shift and whether the fact is known."""
    table = items[["model", "scheme", "dose", "case_id"]].copy()
    table["relation"] = items["relation_id"]
    table["rule"] = rule
    table["margin"] = margin(items, rule)
    keys = ["model", "scheme", "case_id"]
    bare = table.loc[table["dose"] == 0, [*keys, "margin"]].rename(columns={"margin": "bare"})
    table = table.merge(bare, on=keys, how="left", validate="many_to_one")
    table["shift"] = table["margin"] - table["bare"]
    table["known"] = table["bare"] < 0
    table["false_wins"] = table["margin"] > 0
    table["true_wins"] = table["margin"] < 0
    return table


def _ordered(table: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the run: models and schemes as given, `all` before its parts."""
    relations = sorted(set(items["relation_id"]), key=lambda name: (len(name), name))
    orders: dict[str, Sequence[Any]] = {
        "model": list(items["model"].unique()),
        "scheme": list(items["scheme"].unique()),
        "rule": RULES,
        "relation": [ALL, *relations],
        "facts": [ALL, "known"],
    }
    ranks = {
        name: table[name].map({value: i for i, value in enumerate(order)})
        for name, order in orders.items()
    }
    rank = pd.DataFrame({**ranks, "dose": table["dose"]})
    order = rank.sort_values(["facts", "relation", "model", "scheme", "rule", "dose"]).index
    return table.loc[order].reset_index(drop=True)
