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
            here, there = hijacked[cases], bare[cases]
            before = there.loc[NONE].to_numpy()
            labels = {"scheme": scheme, "scheme_seen": scheme == seen_scheme, "dose": dose}
            # Undoing the hijack lowers efficacy and shift, and raises retention.
            down = 1 if scheme in reverse else -1
            for name, on_bare, table, sign in (
                ("efficacy", before > 0, here > 0, down),
                ("retention", before < 0, here < 0, -down),
                ("shift", 0 * before, here - there, down),
            ):
                row = _contrast(name, on_bare, table, kinds, sign=sign, seed=seed)
                rows.append({**labels, "relations": group, **row})
    return _corrected(rows)


def side_effects(
    items: pd.DataFrame,
    kinds: Kinds,
    *,
    rule: efficacy.Rule,
    seen_relations: Collection[str],
    seed: int,
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

    `bare` has the values without ablation on the bare query, `table` [ablation, fact] those to
    compare: truth values as verdicts. `sign` is 1 if undoing the hijack raises the measure.
    """
    verdicts = all(map(pd.api.types.is_bool_dtype, table.dtypes))
    values = table.astype(float)
    none, chosen = values.loc[NONE].to_numpy(), values.loc[CHOSEN].to_numpy()
    change = paired_mean(chosen - none, seed=seed)
    recovered = paired_ratio(sign * (chosen - none), sign * (bare - none), seed=seed)
    row = {
        "measure": name,
        "n": len(none),
        "bare": bare.mean(),
        "none": none.mean(),
        "chosen": chosen.mean(),
        **change.columns("change"),
        "p": mcnemar(none > 0, chosen > 0).p if verdicts else signed_rank(chosen - none),
        **recovered.columns("recovered"),
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
