"""What ablating a set of heads changes, fact by fact, and what random sets of its size change.

Everything is paired: a fact is compared with itself with no head ablated. Verdicts are compared by
McNemar's exact test, means by Wilcoxon's signed-rank test, with bootstrap intervals over the facts
for both; p-values are corrected over the schemes and doses of a table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

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
"""The ablations that every test has; the others are random sets."""
CORRECTED: dict[str, Correction] = {"p_holm": "holm", "p_bh": "benjamini-hochberg"}
"""Column -> how its p-values are corrected."""
Kinds: TypeAlias = Mapping[str, str]
"""Name of each random set -> its kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One measure of every fact of a group, under every ablation; a verdict is 0 or 1."""

    name: str
    bare: Float[np.ndarray, " fact"]
    """On the bare query with no head ablated."""
    none: Float[np.ndarray, " fact"]
    chosen: Float[np.ndarray, " fact"]
    random: Mapping[str, Float[np.ndarray, "set fact"]]
    """Kind of random set -> its sets."""
    verdict: bool


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
    """Hijacked efficacy, retention and shift, with and without the heads.

    Args:
        items: Items with a column `ablation`; every ablation has the same facts.
        kinds: Name of each random set -> its kind.
        rule: How targets are scored.
        seen_relations: Relations that the heads were found on.
        seen_scheme: The scheme that they were found with.
        reverse: Schemes that go the other way: they lower efficacy and the shift.
        seed: Seeds the bootstrap.
    """
    margins = _by_run(items, efficacy.margin(items, rule))
    found: list[dict[str, Any]] = []
    for (scheme, dose), hijacked in margins.items():
        if dose == 0:
            continue
        bare = margins[scheme, 0]
        for group, cases in _groups(items, hijacked.columns, seen_relations).items():
            here, there = hijacked[cases], bare[cases]
            before = there.loc[NONE].to_numpy()
            place = {
                "scheme": scheme,
                "scheme_seen": scheme == seen_scheme,
                "dose": dose,
                "relations": group,
            }
            # Where undoing the hijack leads: efficacy and shift go down, retention goes up.
            down = 1 if scheme in reverse else -1
            for measured, back in (
                (_measured("efficacy", before > 0, here > 0, kinds), down),
                (_measured("retention", before < 0, here < 0, kinds), -down),
                (_measured("shift", 0 * before, here - there, kinds), down),
            ):
                found.append({**place, **_contrast(measured, back, seed=seed)})
    return _corrected(found)


def side_effects(
    items: pd.DataFrame,
    kinds: Kinds,
    *,
    rule: efficacy.Rule,
    seen_relations: Collection[str],
    seed: int,
) -> pd.DataFrame:
    """What the ablation does to bare recall, where there is nothing to recover.

    The measures are `retention`, `logprob_true`, the score of the true target under the rule, in
    nats, and `top_token`, the share of facts whose likeliest next token stays (told by its text).
    The p-values of the random sets say whether they do as much harm.
    """
    # Every scheme has the same bare queries, and some have sentences for more facts than others.
    bare = items.loc[items["dose"] == 0].drop_duplicates(["ablation", "case_id"]).assign(scheme="")
    (margins,) = _by_run(bare, efficacy.margin(bare, rule)).values()
    (logprobs,) = _by_run(bare, efficacy.score(bare, rule, "true")).values()
    (tops,) = _by_run(bare, bare["top_token"]).values()
    found: list[dict[str, Any]] = []
    for group, cases in _groups(bare, margins.columns, seen_relations).items():
        measures: dict[str, Any] = {
            "retention": margins[cases] < 0,
            "logprob_true": logprobs[cases],
            "top_token": tops[cases] == tops[cases].loc[NONE],
        }
        for name, table in measures.items():
            measured = _measured(name, table.loc[NONE].to_numpy(), table, kinds)
            row = _contrast(measured, -1, seed=seed)
            meaningless = ("bare", "recovered", "recovered_low", "recovered_high")
            kept = {key: value for key, value in row.items() if key not in meaningless}
            found.append({"relations": group, **kept})
    return _corrected(found)


def _contrast(measured: Measured, way: int, *, seed: int) -> dict[str, Any]:
    """One row: the change with its interval and p-value, the share recovered, and the controls.

    Args:
        measured: The values.
        way: 1 or -1: whether random sets are asked for as high a value as that of the set, or for
            as low a one; and whether the hijack has lowered the measure or raised it.
        seed: Seeds the bootstrap.
    """
    bare, none, chosen = measured.bare, measured.none, measured.chosen
    change = paired_mean(chosen - none, seed=seed)
    recovered = paired_ratio(way * (chosen - none), way * (bare - none), seed=seed)
    row: dict[str, Any] = {
        "measure": measured.name,
        "n": len(none),
        "bare": bare.mean(),
        "none": none.mean(),
        "chosen": chosen.mean(),
        "change": change.value,
        "change_low": change.low,
        "change_high": change.high,
        "p": mcnemar(none > 0, chosen > 0).p if measured.verdict else signed_rank(chosen - none),
        "recovered": recovered.value,
        "recovered_low": recovered.low,
        "recovered_high": recovered.high,
    }
    for kind, values in measured.random.items():
        means = values.mean(axis=1)
        row |= {
            f"{kind}_mean": means.mean(),
            f"{kind}_low": means.min(),
            f"{kind}_high": means.max(),
            f"{kind}_p": rank_p(way * float(chosen.mean()), way * means),
        }
    return row


def _measured(name: str, bare: np.ndarray, table: pd.DataFrame, kinds: Kinds) -> Measured:
    """A measure from a table with a row per ablation and a column per fact."""
    verdict = all(map(pd.api.types.is_bool_dtype, table.dtypes))
    values = table.astype(float)
    random: dict[str, np.ndarray] = {}
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name, of_kind in kinds.items() if of_kind == kind]
        random[kind] = values.loc[names].to_numpy()
    return Measured(
        name,
        bare.astype(float),
        values.loc[NONE].to_numpy(),
        values.loc[CHOSEN].to_numpy(),
        random,
        verdict,
    )


def _by_run(items: pd.DataFrame, values: pd.Series) -> dict[tuple[str, int], pd.DataFrame]:
    """Scheme and dose -> a table with a row per ablation and a column per fact."""
    table = items.assign(value=values)
    found: dict[tuple[str, int], pd.DataFrame] = {}
    for key, group in table.groupby(["scheme", "dose"], sort=False):
        scheme, dose = cast("tuple[str, int]", key)
        found[scheme, dose] = group.pivot(index="ablation", columns="case_id", values="value")
    return found


def _groups(
    items: pd.DataFrame, cases: pd.Index, seen_relations: Collection[str]
) -> dict[str, list[Any]]:
    """`all` facts, and those of relations that the heads were found on (`seen`) or not (`new`)."""
    relations = items.drop_duplicates("case_id").set_index("case_id")["relation_id"]
    seen = relations.loc[cases].isin(list(seen_relations))
    groups = {"all": list(cases), "seen": list(cases[seen]), "new": list(cases[~seen])}
    return {name: members for name, members in groups.items() if members}


def _corrected(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a table, with p-values corrected over the runs of a measure and group."""
    table = pd.DataFrame(found)
    place = table.columns.get_loc("p")
    assert isinstance(place, int)
    for i, (name, correction) in enumerate(CORRECTED.items(), start=1):
        table.insert(place + i, name, np.nan)
        for _, family in table.groupby(["relations", "measure"])["p"]:
            table.loc[family.index, name] = adjust(family.to_numpy(), correction=correction)
    return table
