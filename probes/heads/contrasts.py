"""The effect of ablating a set of heads, fact by fact, compared with random sets of its size.

Everything is paired: a fact is compared with itself with no head ablated. Verdicts are compared by
McNemar's exact test, other measures by Wilcoxon's signed-rank test, both with bootstrap intervals
over the facts. p-values are corrected over the schemes and doses of a table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from hijacklens.scoring import efficacy
from hijacklens.statistics import (
    Correction,
    adjust,
    mcnemar,
    paired_mean,
    paired_ratio,
    rank_p,
    signed_rank,
)

NONE, CHOSEN = "none", "chosen"
"""The ablations of every test; the others are random sets."""
CORRECTED: dict[str, Correction] = {"p_holm": "holm", "p_bh": "benjamini-hochberg"}
"""Column -> the correction of its p-values."""
Kinds: TypeAlias = Mapping[str, str]
"""Name of each random set -> its kind."""


def contrasts(
    items: pd.DataFrame,
    kinds: Kinds,
    *,
    rule: efficacy.Rule,
    seen_relations: Collection[str],
    seen_scheme: str,
    reverse: Collection[str] = (),
    seed: int,
) -> pd.DataFrame:
    """Compare hijacked efficacy, retention and shift with and without the heads.

    Args:
        items: Items with a column `ablation`; every ablation has the same facts.
        kinds: Name of each random set -> its kind.
        rule: How targets are scored.
        seen_relations: Relations that the heads were found on.
        seen_scheme: The scheme that the heads were found with.
        reverse: Schemes with the opposite effect, which lower efficacy and the shift.
        seed: Seeds the bootstrap.
    """
    margins = _by_run(items, efficacy.margin(items, rule))
    rows: list[dict[str, Any]] = []
    for (scheme, dose), hijacked in margins.items():
        if dose == 0:
            continue
        bare = margins[scheme, 0]
        for group, cases in _groups(items, hijacked.columns, seen_relations).items():
            here, there = hijacked[cases], bare[cases]
            before = there.loc[NONE].to_numpy()
            labels = {
                "scheme": scheme,
                "scheme_seen": scheme == seen_scheme,
                "dose": dose,
                "relations": group,
            }
            # Undoing the hijack lowers efficacy and shift, and raises retention.
            down = 1 if scheme in reverse else -1
            for name, on_bare, table, sign in (
                ("efficacy", before > 0, here > 0, down),
                ("retention", before < 0, here < 0, -down),
                ("shift", 0 * before, here - there, down),
            ):
                row = _contrast(name, on_bare, table, kinds, sign=sign, seed=seed)
                rows.append({**labels, **row})
    return _corrected(rows)


def side_effects(
    items: pd.DataFrame,
    kinds: Kinds,
    *,
    rule: efficacy.Rule,
    seen_relations: Collection[str],
    seed: int,
) -> pd.DataFrame:
    """Compare bare recall with and without the heads.

    The measures are `retention`; `logprob_true`, the score of the true target under the rule, in
    nats; and `top_token`, the fraction of facts whose most likely next token stays the same text.
    The p-values of the random sets say whether they do as much harm.
    """
    # All schemes share their bare queries, but some have sentences for more facts than others.
    bare = items.loc[items["dose"] == 0].drop_duplicates(["ablation", "case_id"]).assign(scheme="")
    (margins,) = _by_run(bare, efficacy.margin(bare, rule)).values()
    (logprobs,) = _by_run(bare, efficacy.score(bare, rule, "true")).values()
    (tops,) = _by_run(bare, bare["top_token"]).values()
    rows: list[dict[str, Any]] = []
    for group, cases in _groups(bare, margins.columns, seen_relations).items():
        measures: dict[str, Any] = {
            "retention": margins[cases] < 0,
            "logprob_true": logprobs[cases],
            "top_token": tops[cases] == tops[cases].loc[NONE],
        }
        for name, table in measures.items():
            row = _contrast(name, table.loc[NONE].to_numpy(), table, kinds, sign=-1, seed=seed)
            rows.append({"relations": group, **row})
    meaningless = ["bare", "recovered", "recovered_low", "recovered_high"]
    return _corrected(rows).drop(columns=meaningless)


def _contrast(
    name: str, bare: np.ndarray, table: pd.DataFrame, kinds: Kinds, *, sign: int, seed: int
) -> dict[str, Any]:
    """Return one row: the change with its interval and p-value, the recovery, and the controls.

    Args:
        name: The measure.
        bare: Its value for each fact on the bare query with no head ablated.
        table: A row per ablation and a column per fact; truth values are compared as verdicts.
        kinds: Name of each random set -> its kind.
        sign: 1 if the hijack lowers the measure and undoing it raises it, -1 otherwise. The
            p-value of random sets counts those that move the measure as far in this direction.
        seed: Seeds the bootstrap.
    """
    verdicts = all(map(pd.api.types.is_bool_dtype, table.dtypes))
    values = table.astype(float)
    bare, none, chosen = (
        np.asarray(x, float) for x in (bare, values.loc[NONE], values.loc[CHOSEN])
    )
    change = paired_mean(chosen - none, seed=seed)
    recovered = paired_ratio(sign * (chosen - none), sign * (bare - none), seed=seed)
    row: dict[str, Any] = {
        "measure": name,
        "n": len(none),
        "bare": bare.mean(),
        "none": none.mean(),
        "chosen": chosen.mean(),
        "change": change.value,
        "change_low": change.low,
        "change_high": change.high,
        "p": mcnemar(none > 0, chosen > 0).p if verdicts else signed_rank(chosen - none),
        "recovered": recovered.value,
        "recovered_low": recovered.low,
        "recovered_high": recovered.high,
    }
    for kind in dict.fromkeys(kinds.values()):
        means = values.loc[[x for x, of_kind in kinds.items() if of_kind == kind]].mean(axis=1)
        row |= {
            f"{kind}_mean": means.mean(),
            f"{kind}_low": means.min(),
            f"{kind}_high": means.max(),
            f"{kind}_p": rank_p(sign * float(chosen.mean()), sign * means.to_numpy()),
        }
    return row


def _by_run(items: pd.DataFrame, values: pd.Series) -> dict[tuple[str, int], pd.DataFrame]:
    """Map scheme and dose to a table with a row per ablation and a column per fact."""
    groups: Any = items.assign(value=values).groupby(["scheme", "dose"], sort=False)
    return {
        run: group.pivot(index="ablation", columns="case_id", values="value")
        for run, group in groups
    }


def _groups(
    items: pd.DataFrame, cases: pd.Index, seen_relations: Collection[str]
) -> dict[str, list[Any]]:
    """Return `all` facts, and those of relations in the search (`seen`) and not in it (`new`)."""
    relations = items.drop_duplicates("case_id").set_index("case_id")["relation_id"]
    seen = relations.loc[cases].isin(list(seen_relations))
    groups = {"all": list(cases), "seen": list(cases[seen]), "new": list(cases[~seen])}
    return {name: members for name, members in groups.items() if members}


def _corrected(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return the rows as a table, with p-values corrected over the runs of a measure and group."""
    table = pd.DataFrame(rows)
    after_p = list(table).index("p") + 1
    for i, (name, correction) in enumerate(CORRECTED.items()):
        table.insert(after_p + i, name, np.nan)
        for _, family in table.groupby(["relations", "measure"])["p"]:
            table.loc[family.index, name] = adjust(family.to_numpy(), correction=correction)
    return table
