"""Efficacy, retention and logit shifts from the scores of single items, and their trends.

Definitions (paper, section 2): the *efficacy score* is the fraction of facts whose false target
scores higher, score(o_) > score(o*), so hijacking raises it; *retention* is the fraction whose true
target scores higher; ties are counted separately. The three rules score a target by its `first`
token, by the `sum` over its tokens, or by the `mean` over them (ROME's rule), all in nats. The
logit shift of an item is the margin score(o_) - score(o*) minus the margin on its bare query.

Summaries of the paper that say hijacking lowers ES mean retention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hijacklens.errors import InputError, choice
from hijacklens.statistics import clustered, clustered_fraction, fraction, half_effect, wilson

Rule = Literal["first", "sum", "mean"]
Measure = Literal["efficacy", "retention", "margin"]
RULES: tuple[Rule, ...] = ("first", "sum", "mean")
KEYS = ("model", "scheme", "dose", "rule", "relation", "facts")
CLUSTERED = ("clusters", "clustered_low", "clustered_high", "design_effect")
NUMBERS = (
    *("n", "efficacy", "efficacy_low", "efficacy_high", *CLUSTERED),
    *("retention", "ties", "mean_shift"),
)
UNKNOWN = (np.nan,) * 3
"""Interval and design effect if all facts are of one relation."""
SUMMARY_COLUMNS = (*KEYS, *NUMBERS)
ALL = "all"
"""The value of `relation` and of `facts` in rows over all of them."""


def score(items: pd.DataFrame, rule: Rule, side: Literal["true", "false"]) -> pd.Series:
    """Return the score of one target of every item under a rule, in nats."""
    if rule == "mean":
        return items[f"sum_{side}"] / items[f"n_tokens_{side}"]
    return items[f"{rule}_{side}"]


def margin(items: pd.DataFrame, rule: Rule) -> pd.Series:
    """Return score(o_) - score(o*) of every item, in nats: above 0 if the false target wins."""
    return score(items, rule, "false") - score(items, rule, "true")


def summarise(items: pd.DataFrame) -> pd.DataFrame:
    """Return the summary: a row per model, scheme, dose, rule, relation and set of facts.

    `relation` is `all`, or a relation id as `relation_label` writes it. `facts` is `all`, or
    `known` for the facts whose true target wins on the bare query under the same rule. `n` and
    `ties` count facts, `efficacy` and `retention` are fractions of `n`, the first with its 95%
    Wilson interval, and `mean_shift` is the mean logit shift in nats.

    Args:
        items: The items of a result, with dose 0 for every fact and scheme.
    """
    # Sums of arrays: pandas takes seven times as long to group a row for each fact, rule and set.
    codes, names = pd.factorize(items["relation_id"])
    labels = list(map(relation_label, names))
    runs: Any = items.groupby(["model", "scheme", "dose"], sort=False).indices
    rows: list[tuple[Any, ...]] = []
    for rule in RULES:
        of_rule = margins(items, rule)
        values = of_rule[["false_wins", "true_wins", "shift"]].to_numpy(float)
        known = of_rule["known"].to_numpy()
        for run, of_run in runs.items():
            for facts, chosen in ((ALL, of_run), ("known", of_run[known[of_run]])):
                if len(chosen):
                    found = _relation_rows(values[chosen], codes[chosen], labels)
                    rows += [(*run, rule, facts, *row) for row in found]
    wins = ("false_wins", "true_wins")
    columns = ("model", "scheme", "dose", "rule", "facts", "relation", "n", *wins, "mean_shift")
    table = pd.DataFrame(rows, columns=[*columns, *CLUSTERED]).astype(dict.fromkeys(wins, int))
    table["efficacy"] = table["false_wins"] / table["n"]
    table["retention"] = table["true_wins"] / table["n"]
    table["ties"] = table["n"] - table["false_wins"] - table["true_wins"]
    ends = wilson(table["false_wins"].to_numpy(), table["n"].to_numpy())
    table["efficacy_low"], table["efficacy_high"] = ends
    return _ordered(table, items).loc[:, list(SUMMARY_COLUMNS)]


def _relation_rows(
    values: Float[np.ndarray, "fact 3"], codes: Int[np.ndarray, " fact"], labels: Sequence[str]
) -> list[tuple[Any, ...]]:
    """Return numbers of all facts, then of each relation that they have.

    Args:
        values: Whether the false and the true target of each fact win, and its shift in nats.
        codes: The index of each fact's relation in `labels`.
        labels: The relations, as `relation_label` writes them.

    Returns:
        Tuples of a label, n, both wins, the mean shift in nats, and `CLUSTERED`.
    """
    pooled = clustered_fraction(values[:, 0], codes)
    ends = (pooled.low, pooled.high, pooled.design_effect) if pooled.clusters > 1 else UNKNOWN
    *wins, shift = values.sum(axis=0).tolist()
    rows: list[tuple[Any, ...]] = [
        (ALL, len(codes), *wins, shift / len(codes), pooled.clusters, *ends)
    ]
    weights = (None, *values.T)
    sums = [np.bincount(codes, weight, len(labels)).tolist() for weight in weights]
    for label, n, *wins, shift in zip(labels, *sums, strict=True):
        if n:
            rows.append((label, n, *wins, shift / n, 1, *UNKNOWN))
    return rows


def about_these_facts(items: pd.DataFrame, rule: Rule, measure: Measure) -> pd.DataFrame:
    """Return a measure with its 95% interval about these facts: a row per model, scheme and dose.

    Columns: `n`, the measure, and its ends `_low` and `_high` (Wilson; for the mean `margin`, in
    nats, Student's t, infinite for one fact).
    """
    rows = []
    groups: Any = margins(items, rule).groupby(["model", "scheme", "dose"], sort=False)
    for (model, scheme, dose), facts in groups:
        if measure == "margin":
            found = clustered(facts["margin"].to_numpy())
        else:
            wins = facts["false_wins" if measure == "efficacy" else "true_wins"]
            found = fraction(int(wins.sum()), len(wins))
        row = {"model": model, "scheme": scheme, "dose": dose, "n": len(facts)}
        rows.append(row | found.columns(measure))
    return pd.DataFrame(rows)


def relation_label(relation_id: str) -> str:
    """Return the name of a relation in the summary, which differs from `ALL`.

    >>> relation_label("P36"), relation_label("all"), relation_label("relation all")
    ('P36', 'relation all', 'relation relation all')
    """
    reserved = re.fullmatch(rf"(relation )*{ALL}", relation_id)
    return f"relation {relation_id}" if reserved else relation_id


def disagreement(items: pd.DataFrame) -> pd.DataFrame:
    """Return how often the rules decide differently: a row per model, scheme and dose.

    Columns: `n`; `any`, the fraction of facts on which not all three rules give the same verdict
    (false wins, true wins, tie); and the same fraction for each pair of rules.
    """
    first, total, mean = (np.sign(margin(items, rule)) for rule in RULES)
    table = items[["model", "scheme", "dose"]].assign(
        any=(first != total) | (first != mean),
        first_sum=first != total,
        first_mean=first != mean,
        sum_mean=total != mean,
    )
    groups = table.groupby(["model", "scheme", "dose"], sort=False, observed=True)
    fractions = groups.mean()
    fractions.insert(0, "n", groups.size())
    return fractions.reset_index()


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
            row = {"model": model, "scheme": scheme, "measure": measure, "n": len(wide)}
            row |= {"slope": here.value} | here.ends("facts")
            row |= {"clusters": like.clusters, "design_effect": like.design_effect}
            rows.append(row | like.ends("clustered") | half.columns("half_dose"))
    return pd.DataFrame(rows)


def margins(items: pd.DataFrame, rule: Rule) -> pd.DataFrame:
    """Return a row per item under one rule: its margin, that of the bare query, and verdicts."""
    keys = ["model", "scheme", "case_id"]
    labels = {name: relation_label(name) for name in items["relation_id"].unique()}
    table = items[[*keys, "dose"]].assign(
        relation=items["relation_id"].map(labels), rule=rule, margin=margin(items, rule)
    )
    bare = table.loc[table["dose"] == 0, [*keys, "margin"]].rename(columns={"margin": "bare"})
    table = table.merge(bare, on=keys, how="left", validate="many_to_one")
    return table.assign(
        shift=table["margin"] - table["bare"],
        known=table["bare"] < 0,
        false_wins=table["margin"] > 0,
        true_wins=table["margin"] < 0,
    )


def _ordered(table: pd.DataFrame, items: pd.DataFrame) -> pd.DataFrame:
    """Sort rows in the order of the run: models and schemes as given, `all` before its parts."""
    labels = map(relation_label, items["relation_id"].unique())
    relations = sorted(labels, key=lambda name: (len(name), name))
    orders: dict[str, Sequence[Any]] = {
        "model": list(items["model"].unique()),
        "scheme": list(items["scheme"].unique()),
        "rule": RULES,
        "relation": [ALL, *relations],
        "facts": [ALL, "known"],
    }
    ranks = {name: pd.Categorical(table[name], list(order)) for name, order in orders.items()}
    keys = ["facts", "relation", "model", "scheme", "rule", "dose"]
    order = table.assign(**ranks).sort_values(keys).index
    return table.loc[order].reset_index(drop=True)
