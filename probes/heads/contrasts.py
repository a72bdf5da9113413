"""The effect of ablating a set of heads, fact by fact, compared with random sets.

Everything is paired: a fact is compared with itself with no head ablated. Intervals and p-values
are about relations like these, or, if all facts have one relation, about these facts
(`hijacklens.statistics.independent`); those of changes of verdicts are from `clustered_change`.
p-values are corrected over the schemes and doses of a table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from hijacklens.scoring import efficacy
from hijacklens.statistics import (
    USUAL_ICC,
    Correction,
    Estimate,
    adjust,
    clustered,
    clustered_change,
    clustered_ratio,
    independent,
    rank_p,
)

NONE, CHOSEN = "none", "chosen"
"""The ablations of every test; the others are random sets."""
FRACTIONS = ("efficacy", "retention", "top_token")
"""The measures that are fractions of facts, whose change lies in -1..1."""
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
) -> pd.DataFrame:
    """Compare efficacy, retention and shift with and without the heads (`HeadTest.summary`).

    `seen_relations` and `seen_scheme` are those of the search; the schemes `reverse` have the
    opposite effect, so that they lower efficacy and the shift. Every ablation has the same facts.
    """
    margins = _by_run(items, efficacy.margin(items, rule))
    rows: list[dict[str, Any]] = []
    for (scheme, dose), hijacked in margins.items():
        bare = margins[scheme, 0]
        if dose == 0:
            continue
        for group, cases in _groups(items, hijacked.columns, seen_relations).items():
            here, there = hijacked[cases.index], bare[cases.index]
            before = there.loc[NONE].to_numpy()
            labels = {"scheme": scheme, "scheme_seen": scheme == seen_scheme, "dose": dose}
            # Undoing the hijack lowers efficacy and shift, and raises retention.
            down = 1 if scheme in reverse else -1
            for name, on_bare, table, sign in (
                ("efficacy", before > 0, here > 0, down),
                ("retention", before < 0, here < 0, -down),
                ("shift", 0 * before, here - there, down),
            ):
                row = _contrast(name, on_bare, table, kinds, sign=sign, relations=cases)
                rows.append({**labels, "relations": group, **row})
    return _corrected(rows)


def side_effects(
    items: pd.DataFrame,
    kinds: Kinds,
    *,
    rule: efficacy.Rule,
    seen_relations: Collection[str],
) -> pd.DataFrame:
    """Compare bare recall with and without the heads (`HeadTest.side_effects`)."""
    # All schemes share their bare queries, but some have sentences for more facts than others.
    bare = items.loc[items["dose"] == 0].drop_duplicates(["ablation", "case_id"]).assign(scheme="")
    (margins,) = _by_run(bare, efficacy.margin(bare, rule)).values()
    (logprobs,) = _by_run(bare, efficacy.score(bare, rule, "true")).values()
    (tops,) = _by_run(bare, bare["top_token"]).values()
    rows: list[dict[str, Any]] = []
    for group, cases in _groups(bare, margins.columns, seen_relations).items():
        measures: dict[str, Any] = {
            "retention": margins[cases.index] < 0,
            "logprob_true": logprobs[cases.index],
            "top_token": tops[cases.index] == tops[cases.index].loc[NONE],
        }
        for name, table in measures.items():
            before = table.loc[NONE].to_numpy()
            row = _contrast(name, before, table, kinds, sign=-1, relations=cases)
            rows.append({"relations": group, **row})
    meaningless = ["bare", "recovered", "recovered_low", "recovered_high"]
    return _corrected(rows).drop(columns=meaningless)


def _contrast(
    name: str,
    bare: np.ndarray,
    table: pd.DataFrame,
    kinds: Kinds,
    *,
    sign: int,
    relations: pd.Series,
) -> dict[str, Any]:
    """Return one row: the change with its interval and p-value, the recovery, and the controls.

    `bare` has the values without ablation on the bare query, `table` [ablation, fact] those to
    compare. `sign` is 1 if undoing the hijack raises the measure.
    """
    values = table.astype(float)
    none, chosen = values.loc[NONE].to_numpy(), values.loc[CHOSEN].to_numpy()
    clusters, estimand = independent(relations)

    def mean(changes: np.ndarray) -> Estimate:
        if name in FRACTIONS:
            return clustered_change(changes, clusters, least_icc=USUAL_ICC, only_if_few=True)
        return clustered(changes, clusters)

    change = mean(chosen - none)
    recovered = clustered_ratio(sign * (chosen - none), sign * (bare - none), clusters)
    row = {
        "measure": name,
        "n": len(none),
        "estimand": estimand,
        "clusters": change.clusters,
        "bare": bare.mean(),
        "none": none.mean(),
        "chosen": chosen.mean(),
        **change.columns("change"),
        "p": change.p,
        **recovered.columns("recovered"),
    }
    for kind in dict.fromkeys(kinds.values()):
        sets = values.loc[[x for x, of_kind in kinds.items() if of_kind == kind]]
        means = sets.mean(axis=1)
        row |= {
            f"{kind}_mean": means.mean(),
            f"{kind}_low": means.min(),
            f"{kind}_high": means.max(),
            f"{kind}_p": rank_p(sign * float(chosen.mean()), sign * means.to_numpy()),
            f"{kind}_least_p": 1 / (len(means) + 1),
            **mean(chosen - sets.mean().to_numpy()).columns(f"beyond_{kind}"),
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
) -> dict[str, pd.Series]:
    """Return the relations of `all` facts, of those `seen` in the search, and of the `new` ones."""
    relations = items.drop_duplicates("case_id").set_index("case_id")["relation_id"]
    relations = relations.loc[cases]
    seen = relations.isin(list(seen_relations))
    groups = {"all": relations, "seen": relations[seen], "new": relations[~seen]}
    return {name: members for name, members in groups.items() if len(members)}


def _corrected(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return the rows as a table, with p-values corrected over the runs of a measure and group."""
    table = pd.DataFrame(rows)
    after_p = list(table).index("p") + 1
    for i, (name, correction) in enumerate(CORRECTED.items()):
        table.insert(after_p + i, name, np.nan)
        for _, family in table.groupby(["relations", "measure"])["p"]:
            table.loc[family.index, name] = adjust(
                family.fillna(1).to_numpy(), correction=correction
            )
    return table
