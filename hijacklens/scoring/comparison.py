"""Paired comparison of two schemes, doses, rules, models, probes or saved runs.

Both sides score the same facts, so each fact is compared with itself. A change is the second side
minus the first, for two claims: about *these facts*, and about *relations like these*, for which
relations are the sample (`hijacklens.statistics`).

    result.compare("do-not-think", "think", dose=1)     # two schemes; also doses, rules, models
    hl.compare("runs/plain", "runs/probed")             # two runs: probes, models, dtypes
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError, choice, number, shown, strict
from hijacklens.facts.relations import relation_title
from hijacklens.results.exhibits import Drawing, Exhibit, Table, Text
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result, load_result
from hijacklens.results.stored import Stored
from hijacklens.scoring.efficacy import RULES, Rule
from hijacklens.scoring.matching import AXES, PROMPTS, differences, labels, matched
from hijacklens.statistics import (
    USUAL_ICC,
    Change,
    Claim,
    Correction,
    Estimate,
    Gate,
    adjust,
    clustered,
    clustered_change,
    judge,
    mcnemar,
)

SIDES = ("reference", "other")
ENDS = ("facts_low", "facts_high", "clustered_low", "clustered_high")
FRACTIONS = ("efficacy", "retention")
MEASURES = (*FRACTIONS, "margin", "shift")
Cluster = Literal["relation", "subject", "target_false", "template"]
CLUSTERS: tuple[Cluster, ...] = ("relation", "subject", "target_false", "template")
BARE = "bare"
"""The scheme of dose 0 where several schemes share the bare query."""
UNMATCHED = ("only_in", "model", "case_id", "scheme", "reason")
_UNMATCHED: dict[str, Any] = {**dict.fromkeys(UNMATCHED, str), "case_id": "Int64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """A model in one of the two runs."""

    name: str
    dtype: str
    device: str
    revision: str | None
    weights_hash: str


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """Two sides, fact by fact: `reference` is the first, `other` the second."""

    verdicts: pd.DataFrame
    """A row per model, fact, scheme, dose and rule, with the margins `reference` and `other` and
    their `difference` in nats, and whether the verdict `flipped`."""
    runs: Mapping[str, tuple[ComparedModel, ...]]
    """The models of both sides, under `reference` and `other`."""
    provenance: Provenance
    labels: Mapping[str, str] = field(
        default_factory=lambda: {"reference": "first", "other": "second"}
    )
    """What distinguishes each side: a scheme, dose, rule, model, probe, dtype or folder."""
    unmatched: Annotated[pd.DataFrame, Stored("unmatched.csv", dtypes=_UNMATCHED)] = field(
        default_factory=lambda: pd.DataFrame(columns=[*UNMATCHED])
    )
    """What only one side has (`only_in`), with the reason."""
    differences: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Every setting that differs between the runs, with both values: model, prompts, probes, facts,
    seed."""
    gate: Gate | None = None
    """The verdict of `with_gate`."""
    leads: ClassVar = True
    figures: ClassVar = {"forest": {}}
    derived: ClassVar = {"summary.csv": "summary", "changes.csv": "changes"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return all rows."""
        return self.verdicts.copy()

    @property
    def flips(self) -> pd.DataFrame:
        """The rows whose verdict differs, sorted by margin in the reference, widest first."""
        rows = self.verdicts.loc[self.verdicts["flipped"]]
        widest = np.argsort(-np.abs(rows["reference"].to_numpy(dtype=float)), kind="stable")
        return rows.iloc[widest].reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """Return a row per model, scheme, dose and rule.

        Columns: `n`; how many verdicts `flipped`, and their `share` of `n`; the `median` and the
        `largest` absolute difference of the margins, in nats.
        """
        table = self.verdicts.assign(size=self.verdicts["difference"].abs())
        groups = table.groupby(list(AXES), sort=False)
        summary = groups.agg(
            n=("flipped", "size"),
            flipped=("flipped", "sum"),
            median=("size", "median"),
            largest=("size", "max"),
        ).reset_index()
        summary.insert(6, "share", summary["flipped"] / summary["n"])
        return summary

    def estimate(self, rows: pd.DataFrame, measure: str, by: Sequence[Cluster] = ()) -> Estimate:
        """Return the mean change of a measure over some rows of `verdicts`.

        Without `by` the estimate is about these facts, with `("relation",)` about relations like
        these. A saved comparison that lacks a clustering counts as one cluster.
        """
        changes = _values(rows, measure, "other") - _values(rows, measure)
        found = clustered(changes, *_labels(rows, by))
        if measure not in FRACTIONS:
            return found
        change = self._change(rows, measure, by)
        return change if change.few else found.within(-1.0, 1.0)

    def _change(self, rows: pd.DataFrame, measure: str, by: Sequence[Cluster]) -> Change:
        changes = _values(rows, measure, "other") - _values(rows, measure)
        return clustered_change(changes, *_labels(rows, by), least_icc=USUAL_ICC)

    def with_gate(
        self, max_rise: float, *, claim: Claim = "relations", rule: Rule | None = None
    ) -> Comparison:
        """Return this comparison with the verdict of a gate in `gate`.

        `PASS`: the one-sided 95% upper limit of the rise of efficacy is below `max_rise`. `FAIL`:
        it is not, and the lower limit is above 0. `INCONCLUSIVE`: neither; or fewer than 30 facts,
        or for `relations` 10 relations; or the sides have different prompts, or share less than
        half of their facts.

        Args:
            max_rise: The smallest rise of efficacy that must be excluded, between 0 and 1.
            claim: Whether the gate is about these `facts`, or about `relations` like these.
            rule: The rule of the verdicts; by default the first one.

        Raises:
            InputError: The margin or the claim is not one of these, or the comparison has several
                models, schemes or doses other than 0.
        """
        fraction_margin("max_rise", max_rise)
        choice("claim", claim, get_args(Claim))
        rows = self._of_rule(rule)
        hijacked = rows[rows["dose"] != 0]
        rows = hijacked if len(hijacked) else rows
        several = {axis: list(map(str, rows[axis].unique())) for axis in AXES[:3]}
        if many := {axis: names for axis, names in several.items() if len(names) > 1}:
            have = "; ".join(f"{axis}: {', '.join(names)}" for axis, names in many.items())
            raise InputError(
                f"a gate needs one model, scheme and dose, and these sides share several ({have}). "
                f"Name one of each: {', '.join(f'--{axis}' for axis in many)} (in Python, first= "
                "and second= of hl.compare)."
            )
        reasons = [
            f"the prompts differ: {name} {one} -> {other}"
            for name, (one, other) in self.differences.items()
            if name in PROMPTS
        ]
        reasons += self._little_shared(rows)
        gate = judge(
            *(_values(rows, "efficacy", side) > 0 for side in SIDES),
            *_labels(rows, ("relation",)),
            max_rise=max_rise,
            claim=claim,
            reasons=reasons,
            of=", ".join(f"{axis} {rows[axis].iloc[0]}" for axis in AXES),
        )
        return replace(self, gate=gate)

    def _little_shared(self, rows: pd.DataFrame) -> Iterator[str]:
        """Say for each side whether the other one lacks more than half of its facts."""
        shared = rows["case_id"].nunique()
        for side in ("first", "second"):
            only = self.unmatched.loc[self.unmatched["only_in"] == side, "case_id"].nunique()
            if only > shared:
                yield f"only {shared} of the {shared + only} facts of the {side} side are in both"

    def changes(
        self,
        *,
        by: Cluster | Sequence[Cluster] = "relation",
        correction: Correction = "holm",
        equivalence: float | None = None,
    ) -> pd.DataFrame:
        """Return a row per model, scheme, dose, rule and measure: the change and its tests.

        Measures: `efficacy` and `retention` (fractions), `margin` and `shift` (nats; the shift is
        the margin minus that of the bare query, so it is left out if both bare queries are equal).

        Args:
            by: The clusters of the second claim: `relation`, `subject`, `target_false` or
                `template`, or two of them, crossed.
            correction: Corrects p-values over the rows of a rule: `holm`, `benjamini-hochberg` or
                `none`.
            equivalence: The largest change of a fraction that counts as none, between 0 and 1. It
                adds the column `equivalent_p` of two one-sided score tests over clusters; a small
                value shows that the change is smaller than that.

        Returns:
            `n`, the value on the `first` and the `second` side, and their `change`.
            These facts: `facts_low`, `facts_high` (t over facts; Tango's score interval if few
            verdicts change), `facts_p` (McNemar's exact test; for nats t), with the verdicts
            `gained` and `lost`. Schemes share the bare query, so dose 0 has one row for all of
            them, with the scheme `bare`.
            Relations like these: `clusters`, their `icc` and `design_effect`, `clustered_low`,
            `clustered_high`, `clustered_p`. `..._corrected` are corrected over the `tests` of a
            rule; retention is no further test where it mirrors efficacy, as without ties.
        """
        names: tuple[Cluster, ...] = (by,) if isinstance(by, str) else tuple(by)
        for name in names:
            choice("by", name, CLUSTERS)
        if len(set(names)) != len(names) or not 1 <= len(names) <= 2:
            raise InputError(f"by is {shown(by)}; name one clustering, or two to cross.")
        choice("correction", correction, get_args(Correction))
        if equivalence is not None:
            fraction_margin("equivalence", equivalence)
        rows: list[dict[str, Any]] = []
        before = (0, 0)
        cells: Any = _bare_once(self.verdicts).groupby(list(AXES), sort=False)
        for key, cell in cells:
            for measure in _measures(cell):
                first, second = (_values(cell, measure, side) for side in SIDES)
                facts = self.estimate(cell, measure)
                found = self.estimate(cell, measure, names)
                row = {
                    **dict(zip(AXES, key, strict=True)),
                    **{"measure": measure, "n": len(cell)},
                    **{"first": first.mean(), "second": second.mean(), "change": facts.value},
                    **facts.ends("facts"),
                    **{"gained": pd.NA, "lost": pd.NA},
                    **{name: getattr(found, name) for name in ("clusters", "icc", "design_effect")},
                    **found.ends("clustered"),
                }
                if measure in FRACTIONS:
                    verdicts = mcnemar(first > 0, second > 0)
                    turned = (verdicts.gained, verdicts.lost)
                    row |= {"gained": turned[0], "lost": turned[1], "facts_p": verdicts.p}
                    # Without ties, retention is the same test as efficacy, which precedes it.
                    row["same"] = measure == "retention" and turned == before[::-1]
                    before = turned
                    if equivalence is not None:
                        change = self._change(cell, measure, names)
                        row["equivalent_p"] = change.equivalence(equivalence)
                rows.append(row)
        table = pd.DataFrame(rows).astype({"gained": "Int64", "lost": "Int64"})
        same = table.pop("same").eq(True)
        for name in ("facts_p", "clustered_p"):
            for _, family in table.loc[~same].groupby("rule")[name]:
                corrected = adjust(family.fillna(1).to_numpy(float), correction=correction)
                table.loc[family.index, f"{name}_corrected"] = corrected
            filled = table[f"{name}_corrected"].ffill()
            table[f"{name}_corrected"] = filled.where(table[name].notna())
        table["tests"] = (~same).groupby(table["rule"]).transform("sum")
        return table

    def plot(self, *, rule: Rule | None = None, measure: str = "efficacy") -> Figure:
        """Draw a forest plot: the change in each relation, or in each model, scheme and dose.

        The thick line is the 95% interval over facts, the thin one that over relations.
        """
        rows = self._of_rule(rule)
        choice("measure", measure, _measures(rows))
        cells: Any = list(rows.groupby(list(AXES[:3]), sort=False))
        bars: list[tuple[str, Estimate, Estimate | None]] = []
        if len(cells) == 1 and "relation" in rows:
            for name, part in rows.groupby("relation"):
                label = f"{relation_title(str(name))} ({len(part)})"
                bars.append((label, self.estimate(part, measure), None))
        for key, cell in cells:
            pooled = self.estimate(cell, measure, ("relation",))
            label = "all" if len(cells) == 1 else ", ".join(map(str, key))
            bars.append((f"{label} ({len(cell)})", self.estimate(cell, measure), pooled))
        with plots.canvas(height=1.2 + 0.25 * len(bars)) as (figure, (ax,)):
            for i, (_, facts, pooled) in enumerate(bars):
                colour = plots.COLOURS[1 if pooled else 0]
                for found, width in ((facts, 4), (pooled, 1.2)):
                    if found is not None and found.clusters > 1:
                        ax.plot([found.low, found.high], [i, i], color=colour, linewidth=width)
                ax.plot(facts.value, i, "o", color="black", markersize=4)
            ax.axvline(0, color="#888888", linewidth=0.8, linestyle=":")
            ax.set_yticks(range(len(bars)), [plots.escape(label) for label, *_ in bars])
            ax.invert_yaxis()
            unit = "fraction of facts" if measure in FRACTIONS else "nats"
            ax.set_xlabel(f"change of {measure} ({unit})\nthick: these facts; thin: relations")
            ax.set_title(plots.escape(" -> ".join(self.labels.values())), fontsize=9)
        return figure

    def _of_rule(self, rule: Rule | None) -> Any:
        """Return the verdicts by one rule; by default by the first one there is."""
        rules = list(self.verdicts["rule"].unique())
        return self.verdicts[self.verdicts["rule"] == choice("rule", rule or rules[0], rules)]

    def exhibits(self) -> list[Exhibit]:
        """The gate, settings that differ, forest plot, all changes, facts whose verdict differs."""
        filters = ("model", "scheme", "rule", "measure")
        gate = [str(self.gate)] if self.gate else []
        pairs = [f"{name}: {one} -> {other}" for name, (one, other) in self.differences.items()]
        exhibits: list[Exhibit] = [
            *([Text("Verdict of the gate", gate)] if gate else []),
            *([Text("Settings that differ", points=pairs)] if pairs else []),
            Drawing("Change of efficacy", self.plot()),
            Table("Changes", self.changes(), file="changes.csv", filters=filters),
            Table("Verdicts that differ", self.flips, file="flips.csv", folded=True),
        ]
        if len(self.unmatched):
            exhibits.append(Table("What only one side has", self.unmatched, folded=True))
        return exhibits

    def glance(self, rule: Rule | None = None, **options: Any) -> Glance:
        """The changes under one rule, with both claims; `options` are those of `changes`."""
        rows = self._of_rule(rule)
        rule = rows["rule"].iloc[0]
        table: Any = self.changes(**options)
        table = table[table["rule"] == rule]
        one = {name: table[name].iloc[0] for name in AXES[:3] if table[name].nunique() == 1}
        counts, tested = int(table["clusters"].iloc[0]), "equivalent_p" in table
        columns = {
            **{name: f"{{{name}}}" for name in AXES[:3] if name not in one},
            "measure": "{measure}",
            "first": "{first:>}",
            "second": "{second:>}",
            "change": "{change:>}",
            **({"gained, lost": "{gained}, {lost}"} if self._cells(table) > 1 else {}),
            "these facts": _interval("facts", options),
            **({"relations like these": _interval("clustered", options)} if counts > 1 else {}),
            **({f"within ±{options['equivalence']:g}": "{equivalent_p:.2g}"} if tested else {}),
        }
        words = [
            f"dose {value}" if axis == "dose" else str(value)
            for axis, value in one.items()
            if "->" not in str(value)  # the labels say it
        ]
        where = " · ".join([" -> ".join(self.labels.values()), *words])
        return Glance(
            f"{where} · {rows['case_id'].nunique()} facts · rule {rule}",
            (Grid.of(map(_texts, table.to_dict("records")), columns),),
            tuple(self._notes(table, counts, options)),
            steps=("changes()", "flips", "plot()", "save(folder)"),
        )

    @staticmethod
    def _cells(table: pd.DataFrame) -> int:
        return int((table["measure"] == "efficacy").sum())

    def _notes(self, table: pd.DataFrame, counts: int, options: Mapping[str, Any]) -> Iterator[str]:
        if self.gate:
            yield str(self.gate)
        if self.differences:
            pairs = (f"{name} {one} -> {other}" for name, (one, other) in self.differences.items())
            yield f"settings that differ: {'; '.join(pairs)}"
        turned: Any = table[table["measure"] == "efficacy"]
        if len(turned) == 1:
            yield (
                f"verdicts for the false target: {turned['gained'].iloc[0]} gained, "
                f"{turned['lost'].iloc[0]} lost; change = second - first; margin and shift in nats"
            )
        else:
            yield "gained, lost: verdicts; change = second - first; margin and shift in nats"
        correction, tests = options.get("correction", "holm"), table["tests"].iloc[0]
        corrected = f"then p corrected ({correction}) over {tests} tests"
        yield (
            "these facts: 95% t interval over facts (score interval if few verdicts change), p of "
            "McNemar's exact test (nats: t)"
            f"{f', {corrected}' if _corrected(options) else '; no p is corrected'}"
        )
        if counts < 2:
            yield "these facts are one cluster: they say nothing about relations like these"
        else:
            effect = table["design_effect"].max()
            by = options.get("by", "relation")
            by = by if isinstance(by, str) else " x ".join(by)
            yield (
                f"relations like these: 95% t interval over {counts} clusters (by {by}); design "
                f"effect up to {effect:.1f}"
            )
        if "equivalent_p" in table:
            least = options["equivalence"]
            yield (
                f"within ±{least:g}: p of a change of {least:g} or more in relations like these "
                "(two one-sided score tests); a small p shows that the change is smaller"
                if counts > 1
                else f"within ±{least:g}: one cluster shows no equivalence"
            )
        yield from self._little_shared(self.verdicts)
        if len(self.unmatched):
            first = self.unmatched.iloc[0]
            yield (
                f"only in one side: {len(self.unmatched)} (.unmatched, unmatched.csv); first: "
                f"{first['reason']}"
            )

    def findings(self) -> dict[str, Any]:
        """Return the number of items, and how many verdicts differ under each rule."""
        flipped: Any = self.verdicts.groupby("rule", sort=False)["flipped"].sum()
        return {"items": len(self.verdicts) // len(flipped), "flipped": flipped.to_dict()}


def fraction_margin(name: str, value: Any) -> None:
    """Refuse a margin of a fraction that is not between 0 and 1.

    Raises:
        InputError: It is not.
    """
    if not 0 < number(name, value) < 1:
        raise InputError(f"{name} is {shown(value)}; give a number between 0 and 1, such as 0.05.")


def _corrected(options: Mapping[str, Any]) -> bool:
    return options.get("correction", "holm") != "none"


def _interval(name: str, options: Mapping[str, Any]) -> str:
    """Return the form of a cell with an interval, its p, and the corrected p."""
    more = f" ({{{name}_p_corrected:.2g}})" if _corrected(options) else ""
    return f"[{{{name}_low}}, {{{name}_high}}] p {{{name}_p:.2g}}{more}"


def _bare_once(verdicts: Any) -> Any:
    """Keep dose 0 once per model, rule and fact, as all schemes share the bare query."""
    bare = verdicts["dose"] == 0
    if verdicts.loc[bare, "scheme"].nunique() < 2:
        return verdicts
    once = verdicts[bare].drop_duplicates(["model", "rule", "case_id"]).assign(scheme=BARE)
    return pd.concat([once, verdicts[~bare]], ignore_index=True)


def _labels(rows: pd.DataFrame, by: Sequence[Cluster]) -> list[np.ndarray]:
    """Return the cluster of each row; a saved comparison may lack a clustering."""
    return [np.asarray(rows.get(name, np.full(len(rows), "")), dtype=str) for name in by]


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Write the numbers of a row of `changes`: fractions with three digits, nats with two."""
    digits = 3 if row["measure"] in FRACTIONS else 2
    texts = {name: f"{row[name]:.{digits}f}" for name in ("first", "second")}
    texts |= {name: f"{row[name]:+.{digits}f}" for name in ("change", *ENDS)}
    if digits == 3:
        texts = {name: re.sub(r"^([+-]?)0\.", r"\1.", text) for name, text in texts.items()}
    return {**row, **texts}


def _values(rows: pd.DataFrame, measure: str, side: str = "reference") -> np.ndarray:
    """Return a measure of each row on one side: 0 or 1 for fractions, nats otherwise."""
    margins = rows[side].to_numpy(dtype=float)
    if measure == "efficacy":
        return (margins > 0).astype(float)
    if measure == "retention":
        return (margins < 0).astype(float)
    if measure == "shift":
        return margins - rows[f"bare_{side}"].to_numpy(dtype=float)
    return margins


def _measures(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return the measures; the shift only where it differs from the margin and is not 0."""
    if "bare_other" in rows:
        margins, other, bare, bare_other = (
            rows[name].to_numpy() for name in ("reference", "other", "bare_reference", "bare_other")
        )
        if (bare != bare_other).any() and ((margins != bare) | (other != bare_other)).any():
            return MEASURES
    return MEASURES[:3]


@strict
def compare(
    reference: Result | str | Path,
    other: Result | str | Path,
    *,
    first: Mapping[str, Any] | None = None,
    second: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare two hijack runs on the facts that both have.

    Models, schemes and doses that both runs have are compared with themselves. If the runs share
    none and each has one, these two are compared: two models, say, or doses 1 and 5.

    Args:
        reference: The first run, or its folder.
        other: The second run, or its folder; it may be the same one.
        first: Restricts the first run, such as `{"scheme": "think", "dose": 1, "rule": "sum"}`.
        second: Restricts the second run.

    Raises:
        InputError: A result is not one of a hijack run, a name is unknown, the runs share no
            model, scheme or dose although one has several, or they share no fact.
    """
    results = [_hijack_run(one) for one in (reference, other)]
    restrictions = (first or {}, second or {})
    table, missing, pairs = matched(results, restrictions)
    kept = [item.name for item in fields(ComparedModel)]
    models = [
        tuple(
            ComparedModel(**{name: getattr(model, name) for name in kept})
            for model in result.settings.models
            if model.name == chosen.get("model", model.name)
        )
        for result, chosen in zip(results, restrictions, strict=True)
    ]
    return Comparison(
        table,
        dict(zip(SIDES, models, strict=True)),
        Provenance.now(),
        labels=dict(zip(SIDES, labels(pairs, results, (reference, other)), strict=True)),
        unmatched=pd.DataFrame(missing, columns=[*UNMATCHED]).astype({"case_id": "Int64"}),
        differences=differences(results, models),
    )


def compare_within(result: Any, first: Any, second: Any, chosen: Mapping[str, Any]) -> Comparison:
    """Compare two schemes, doses, rules or models of one run (`HijackResult.compare`)."""
    values = {axis: list(result.items[axis].unique()) for axis in AXES[:3]} | {"rule": [*RULES]}
    axes = [axis for axis in AXES if first in values[axis] and second in values[axis]]
    if not axes or first == second:
        have = "; ".join(f"{axis}: {', '.join(map(str, values[axis]))}" for axis in AXES)
        raise InputError(
            f"cannot compare {shown(first)} with {shown(second)}: name two schemes, doses, rules "
            f"or models of this run. It has {have}."
        )
    restricted = {axis: value for axis, value in chosen.items() if value is not None}
    return compare(
        result,
        result,
        first={**restricted, axes[0]: first},
        second={**restricted, axes[0]: second},
    )


def _hijack_run(result: Result | str | Path) -> Any:
    found: Any = result if isinstance(result, Result) else load_result(result)
    if not hasattr(found, "full_summary"):
        raise InputError(
            f"a {type(found).__name__} cannot be compared; give two results of hl.hijack, or the "
            "folders that `hijacklens hijack` wrote."
        )
    return found
