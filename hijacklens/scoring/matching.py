"""What two hijack runs have in common, row by row, and what only one of them has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hijacklens.errors import InputError, unknown
from hijacklens.results.result import Result, load_result, record_of
from hijacklens.scoring.efficacy import RULES, margins

AXES = ("model", "scheme", "dose", "rule")
MODEL = ("model", "weights hash", "revision", "device")
"""Settings of a model; a new checkpoint may differ in these."""
PROMPTS = ("opening", "chat", "joining", "sentences")
"""Settings with which the same fact has other prompts."""
FACT = ("case_id", "relation", "subject", "target_true", "target_false", "template")


def matched(
    results: Sequence[Any], chosen: Sequence[Mapping[str, Any]]
) -> tuple[Any, list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """Match the rows of two runs.

    Args:
        results: The runs.
        chosen: The restrictions of each, by axis.

    Returns:
        The rows of both, as in `Comparison.verdicts`; what only one side has, with the reason; and
        the axes on which two different values are compared.

    Raises:
        InputError: A restriction is unknown, or the runs share no value of an axis, or no fact.
    """
    tables: list[Any] = [_long(*side) for side in zip(results, chosen, strict=True)]
    missing: list[dict[str, Any]] = []
    pairs: dict[str, tuple[str, str]] = {}
    for axis in AXES:
        _match(axis, tables, missing, pairs)
    facts = [name for name in FACT if all(name in table for table in tables)]
    joined = tables[0].merge(tables[1], on=[*AXES, *facts], how="outer", indicator=True, sort=False)
    # The order of the reference, which an outer join loses.
    joined = joined.sort_values("order_x", kind="stable").reset_index(drop=True)
    one_side = joined["_merge"] != "both"
    missing += _missing_facts(joined[one_side], results)
    both: Any = joined[~one_side]
    if "scheme" in pairs:  # all schemes have the same bare query
        both = both[both["dose"] != 0]
    if both.empty:
        raise InputError(
            "the two sides have no fact in common. Score the same facts in both; facts are the "
            f"same if {', '.join(facts)} are equal."
        )
    table = both[[*AXES, *facts]].assign(
        reference=both["margin_x"],
        other=both["margin_y"],
        difference=both["margin_y"] - both["margin_x"],
        bare_reference=both["bare_x"],
        bare_other=both["bare_y"],
        flipped=np.sign(both["margin_x"]) != np.sign(both["margin_y"]),
    )
    return table.reset_index(drop=True), missing, pairs


def values_of(run: Result | str | Path) -> dict[str, list[Any]]:
    """Return the models, schemes, doses and rules of a run or of its folder.

    Raises:
        InputError: The folder has no run, which is seen before torch is imported to load it.
    """
    loaded: Any = run
    items = loaded.items if isinstance(run, Result) else _items(run)
    return {axis: list(items[axis].unique()) for axis in AXES[:3]} | {"rule": [*RULES]}


def check_chosen(values: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]) -> None:
    """Refuse restrictions that a run with these values does not have."""
    for axis, value in chosen.items():
        if axis not in AXES:
            raise unknown("restriction", axis, AXES)
        if value not in values[axis]:
            raise unknown(axis, value, map(str, values[axis]))


def check_run(kind: str) -> None:
    """Refuse a type of result, such as `HijackResult`, that is not a run."""
    if kind != "HijackResult":
        raise InputError(
            f"a {kind} cannot be compared; give two results of hl.hijack, or the folders that "
            "`hijacklens hijack` wrote."
        )


def _items(folder: str | Path) -> pd.DataFrame:
    path, record = record_of(folder)
    check_run(str(record["type"]).rpartition(":")[2])
    try:
        return pd.read_parquet(path.with_name("items.parquet"), columns=[*AXES[:3]])
    except (OSError, ValueError, KeyError):  # `load_result` says what is wrong with it
        return load_result(folder).to_dataframe()


def _long(result: Any, chosen: Mapping[str, Any]) -> pd.DataFrame:
    """Return a row per item and rule, restricted to some models, schemes, doses or rules."""
    items = result.items
    check_chosen(values_of(result), chosen)
    facts = items.drop_duplicates("case_id")[["case_id", "subject"]]
    if len(result.prompts):
        facts = facts.merge(result.prompts.drop_duplicates("case_id"), on="case_id", how="left")
        texts = zip(facts["query"], facts["subject"], strict=True)
        facts["template"] = [query.replace(subject, "{}") for query, subject in texts]
    table: Any = pd.concat([margins(items, rule) for rule in RULES], ignore_index=True)
    table = table[["model", "scheme", "dose", "rule", "case_id", "relation", "margin", "bare"]]
    table = table.assign(order=np.arange(len(table))).merge(
        facts[[name for name in FACT if name in facts]], on="case_id", how="left"
    )
    for axis, value in chosen.items():
        table = table[table[axis] == value]
    return table


def _match(
    axis: str,
    tables: list[Any],
    missing: list[dict[str, Any]],
    pairs: dict[str, tuple[str, str]],
) -> None:
    """Keep the values of an axis that both tables have, or pair the only value of each.

    Changes `tables`; adds the values of one side only to `missing`, and a pair to `pairs`.
    """
    values = [list(table[axis].unique()) for table in tables]
    # All runs have dose 0, and its bare query is in `bare`.
    real = [[x for x in of if axis != "dose" or x != 0] or of for of in values]
    if not set(real[0]) & set(real[1]):
        if [len(of) for of in real] != [1, 1]:
            listed = ["; ".join(map(str, of)) for of in real]
            raise InputError(
                f"the two sides have no {axis} in common: the first has {listed[0]}, the second "
                f"{listed[1]}. Name one of each, such as first={{{axis!r}: {real[0][0]!r}}}."
            )
        pairs[axis] = (str(real[0][0]), str(real[1][0]))
        label = " -> ".join(pairs[axis])
        for i, (only,) in enumerate(real):
            tables[i] = tables[i][tables[i][axis] == only].assign(**{axis: label})
        return
    common = set(values[0]) & set(values[1])
    for i, side in enumerate(("first", "second")):
        for value in values[i]:
            if value not in common:
                reason = f"only the {side} side has the {axis} {value}"
                missing.append({"only_in": side, "reason": reason})
        tables[i] = tables[i][tables[i][axis].isin(common)]


def _missing_facts(rows: Any, results: Sequence[Any]) -> list[dict[str, Any]]:
    """Say for each fact that only one side has why the other lacks it."""
    found: list[dict[str, Any]] = []
    once = rows.drop_duplicates(["_merge", "model", "scheme", "case_id"])
    for row in once.to_dict("records"):
        i = int(row["_merge"] == "left_only")  # the side that lacks it
        skipped = results[i].skipped
        said = skipped.loc[skipped["case_id"] == row["case_id"], "reason"]
        reason = said.iloc[0] if len(said) else "the other run has another fact of this case id"
        if not len(said) and row["case_id"] not in set(results[i].items["case_id"]):
            reason = "the other run did not include this fact"
        lost = {name: row[name] for name in ("model", "case_id", "scheme")}
        found.append(lost | {"only_in": ("second", "first")[i], "reason": reason})
    return found


def labels(
    pairs: Mapping[str, tuple[str, str]], results: Sequence[Any], given: Sequence[Any]
) -> Iterator[str]:
    """Say what distinguishes each of the two sides."""
    settings = [result.settings for result in results]
    probed = settings[0].probes != settings[1].probes
    for i, (side, other) in enumerate((settings, settings[::-1])):
        parts = [("dose " if axis == "dose" else "") + pair[i] for axis, pair in pairs.items()]
        if probed:
            parts.append(" + ".join(side.probes) or "no probe")
        for name in ("dtype", "device", "revision"):
            mine, its = ({str(getattr(x, name)) for x in of.models} for of in (side, other))
            if not parts and mine != its:
                parts = [", ".join(sorted(mine))]
        if not parts and side.facts.title != other.facts.title:
            parts = [side.facts.title]
        name = "" if isinstance(given[i], Result) else str(given[i])
        yield ", ".join(parts) or name or ("first", "second")[i]


def differences(
    results: Sequence[Any], models: Sequence[Sequence[Any]]
) -> dict[str, tuple[str, str]]:
    """Return every setting that differs between two runs, with both values as text.

    Args:
        results: The runs.
        models: The models of each that are compared.
    """
    titles = {"model": "name", "weights hash": "weights_hash"}
    titles |= {name: name for name in ("revision", "dtype", "device")}
    sides = []
    for result, compared in zip(results, models, strict=True):
        settings, facts = result.settings, result.settings.facts
        side = {
            title: ", ".join(str(getattr(model, name)) for model in compared)
            for title, name in titles.items()
        }
        side |= {"probes": " + ".join(settings.probes) or "none", "seed": str(settings.seed)}
        side |= {"facts": facts.name, "facts hash": facts.hash, "opening": repr(facts.opening)}
        side |= {"chat": str(facts.chat), "joining": facts.joining}
        sides.append(side)
    sentences = [
        result.prompts.set_index(["case_id", "scheme"])["sentence"].rename(i)
        for i, result in enumerate(results)
    ]
    one, two = sentences[0].align(sentences[1], join="inner")
    differ = one.to_numpy() != two.to_numpy()
    if differ.any():
        example = int(np.argmax(differ))
        sides[0]["sentences"] = repr(one.iloc[example])
        sides[1]["sentences"] = f"{two.iloc[example]!r} ({differ.sum()} differ)"
    first, second = sides
    return {
        name: (_short(one), _short(second[name]))
        for name, one in first.items()
        if one != second[name]
    }


def one_endpoint(verdicts: Any) -> Any:
    """Return the verdicts that a gate judges: those above dose 0, or all if there are none.

    Raises:
        InputError: They are of several models, schemes or doses.
    """
    hijacked = verdicts[verdicts["dose"] != 0]
    rows = hijacked if len(hijacked) else verdicts
    several = {axis: list(map(str, rows[axis].unique())) for axis in AXES[:3]}
    if many := {axis: names for axis, names in several.items() if len(names) > 1}:
        have = "; ".join(f"{axis}: {', '.join(names)}" for axis, names in many.items())
        raise InputError(
            f"a gate needs one model, scheme and dose, and these sides share several ({have}). "
            f"Name one of each: {', '.join(f'--{axis}' for axis in many)} (in Python, first= "
            "and second= of hl.compare)."
        )
    return rows


def little_shared(rows: Any, unmatched: Any) -> Iterator[str]:
    """Say for each side whether the other one lacks more than half of its facts."""
    shared = rows["case_id"].nunique()
    for side in ("first", "second"):
        only = unmatched.loc[unmatched["only_in"] == side, "case_id"].nunique()
        if only > shared:
            yield f"only {shared} of the {shared + only} facts of the {side} side are in both"


def _short(text: str) -> str:
    """Cut off a hash."""
    return text[:12] if re.fullmatch("[0-9a-f]{40,}", text) else text
