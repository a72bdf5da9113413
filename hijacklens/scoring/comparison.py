"""Paired comparison of two schemes, doses, rules, models, probes or saved runs.

Both sides score the same facts, so each fact is compared with itself. A change is the second side
minus the first, for two claims: about *these facts*, and about *relations like these*, for which
relations are the sample (`hijacklens.statistics`).

    result.compare("do-not-think", "think", dose=1)     # two schemes; also doses, rules, models
    hl.compare("runs/plain", "runs/probed")             # two runs: probes, models, dtypes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError, choice, fraction_margin, shown, strict
from hijacklens.facts.relations import relation_title
from hijacklens.results.exhibits import Drawing, Exhibit, Table, Text
from hijacklens.results.glance import Glance
from hijacklens.results.result import Provenance, Result, load_result
from hijacklens.results.stored import Stored
from hijacklens.scoring import matching
from hijacklens.scoring.efficacy import Rule
from hijacklens.scoring.matching import AXES
from hijacklens.scoring.printed_changes import FRACTIONS, glance_of
from hijacklens.statistics import (
    USUAL_ICC,
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

SIDES = {"reference": "first", "other": "second"}
MEASURES = (*FRACTIONS, "margin", "shift")
Cluster = Literal["relation", "subject", "target_false", "template"]
ROUNDING = 2e-4
"""Nats by which margins differ when nothing changed: a score is right to within 1e-4."""
UNMATCHED: dict[str, Any] = dict.fromkeys(("only_in", "model", "case_id", "scheme", "reason"), str)
UNMATCHED["case_id"] = "Int64"


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
    labels: Mapping[str, str] = field(default_factory=SIDES.copy)
    """What distinguishes each side: a scheme, dose, rule, model, probe, dtype or folder."""
    unmatched: Annotated[pd.DataFrame, Stored("unmatched.csv", dtypes=UNMATCHED)] = field(
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
        summary = table.groupby(list(AXES), sort=False).agg(
            n=("flipped", "size"),
            flipped=("flipped", "sum"),
            share=("flipped", "mean"),
            median=("size", "median"),
            largest=("size", "max"),
        )
        return summary.reset_index()

    def estimate(self, rows: pd.DataFrame, measure: str, by: Sequence[Cluster] = ()) -> Estimate:
        """Return the mean change of a measure over some rows of `verdicts`.

        Without `by` the estimate is about these facts, with `("relation",)` about relations like
        these. A saved comparison that lacks a clustering counts as one cluster. A change of nats
        that rounding can make counts as none.
        """
        changes = _values(rows, measure, "other") - _values(rows, measure)
        changes[np.abs(changes) <= ROUNDING] = 0.0
        clusters = _labels(rows, by)
        if measure in FRACTIONS:
            return clustered_change(changes, *clusters, least_icc=USUAL_ICC, only_if_few=True)
        return clustered(changes, *clusters)

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
        rows = matching.one_endpoint(self._of_rule(rule))
        reasons = [
            f"the prompts differ: {name} {one} -> {other}"
            for name, (one, other) in self.differences.items()
            if name in matching.PROMPTS
        ]
        gate = judge(
            *(_values(rows, "efficacy", side) > 0 for side in SIDES),
            *_labels(rows, ("relation",)),
            max_rise=max_rise,
            claim=claim,
            reasons=[*reasons, *matching.little_shared(rows, self.unmatched)],
            of=", ".join(f"{axis} {rows[axis].iloc[0]}" for axis in AXES),
        )
        return replace(self, gate=gate)

    def changes(
        self,
        *,
        by: Cluster | Sequence[Cluster] = "relation",
        correction: Correction = "holm",
        equivalence: float | None = None,
    ) -> pd.DataFrame:
        """Return a row per model, scheme, dose, rule and measure: the change and its tests.

        Measures: `efficacy` and `retention` (fractions), `margin` and `shift` (nats; the shift is
        the margin minus that of the bare query, so it is left out if both bare queries are equal
        up to rounding).

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
            These facts: `facts_low`, `facts_high` (t over facts; Tango's score interval if
            nearly all change alike, as when few do), `facts_p` (McNemar's exact test; for nats t),
            with the verdicts `gained` and `lost`. Schemes share the bare query, so dose 0 has one
            row for all of them, with the scheme `bare`.
            Relations like these: `clusters`, their `icc` and `design_effect`, `clustered_low`,
            `clustered_high`, `clustered_p`. `..._corrected` are corrected over the `tests` of a
            rule; retention is no further test where it mirrors efficacy, as without ties.
        """
        names: tuple[Cluster, ...] = (by,) if isinstance(by, str) else tuple(by)
        for name in names:
            choice("by", name, get_args(Cluster))
        if len(set(names)) != len(names) or not 1 <= len(names) <= 2:
            raise InputError(f"by is {shown(by)}; name one clustering, or two to cross.")
        choice("correction", correction, get_args(Correction))
        if equivalence is not None:
            fraction_margin("equivalence", equivalence)
        rows: list[dict[str, Any]] = []
        cells: Any = _bare_once(self.verdicts).groupby(list(AXES), sort=False)
        for key, cell in cells:
            for measure in _measures(cell):
                first, second = (_values(cell, measure, side) for side in SIDES)
                facts, found = (self.estimate(cell, measure, of) for of in ((), names))
                row = dict(zip(AXES, key, strict=True)) | {"measure": measure, "n": len(cell)}
                row |= {"first": first.mean(), "second": second.mean(), "change": facts.value}
                row |= facts.ends("facts") | {"gained": pd.NA, "lost": pd.NA}
                row |= {name: getattr(found, name) for name in ("clusters", "icc", "design_effect")}
                row |= found.ends("clustered")
                if measure in FRACTIONS:
                    verdicts = mcnemar(first > 0, second > 0)
                    row |= {"gained": verdicts.gained, "lost": verdicts.lost, "facts_p": verdicts.p}
                    if equivalence is not None:
                        row["equivalent_p"] = found.equivalence(equivalence)
                rows.append(row)
        table: Any = pd.DataFrame(rows).astype({"gained": "Int64", "lost": "Int64"})
        # Without ties, retention is the same test as efficacy, which precedes it.
        retention = table["measure"] == "retention"
        gained, lost = (table[name].astype(float) for name in ("gained", "lost"))
        tests = ~(retention & (gained == lost.shift()) & (lost == gained.shift()))
        for name in ("facts_p", "clustered_p"):
            families = table.loc[tests, name].fillna(1).groupby(table["rule"])
            corrected = families.transform(lambda p: adjust(p.to_numpy(), correction=correction))
            filled = corrected.reindex(table.index).ffill()
            table[f"{name}_corrected"] = filled.where(table[name].notna())
        table["tests"] = tests.groupby(table["rule"]).transform("sum")
        return table

    def plot(self, *, rule: Rule | None = None, measure: str = "efficacy") -> Figure:
        """Draw a forest plot: the change in each relation, or in each model, scheme and dose.

        The thick line is the 95% interval over facts, the thin one that over relations.
        """
        rows = self._of_rule(rule)
        choice("measure", measure, _measures(rows))
        cells: Any = _bare_once(rows).groupby(list(AXES[:3]), sort=False)
        bars = [
            (f"{model}, {scheme}, dose {dose}", cell, True) for (model, scheme, dose), cell in cells
        ]
        if len(bars) == 1:
            relations = rows.groupby("relation") if "relation" in rows else ()
            bars = [(relation_title(str(name)), part, False) for name, part in relations]
            bars.append(("all", rows, True))
        with plots.canvas(height=1.2 + 0.25 * len(bars)) as (figure, (ax,)):
            for i, (_, part, pooled) in enumerate(bars):
                colour, facts = plots.COLOURS[int(pooled)], self.estimate(part, measure)
                intervals = [(facts, 4.0)]
                if pooled:
                    intervals.append((self.estimate(part, measure, ("relation",)), 1.2))
                for found, width in intervals:
                    if found.clusters > 1:
                        ax.plot([found.low, found.high], [i, i], color=colour, linewidth=width)
                ax.plot(facts.value, i, "o", color="black", markersize=4)
            ax.axvline(0, color="#888888", linewidth=0.8, linestyle=":")
            texts = [plots.escape(f"{label} ({len(part)})") for label, part, _ in bars]
            ax.set_yticks(range(len(bars)), texts)
            ax.invert_yaxis()
            unit = "fraction of facts" if measure in FRACTIONS else "nats"
            compared = "->" in (used := str(rows["rule"].iloc[0]))  # the title says it
            unit += "" if compared else f"; rule: {used}"
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
        rows, changes = self._of_rule(rule), self.changes(**options)
        changes = changes[changes["rule"] == rows["rule"].iloc[0]]
        found = glance_of(changes, self.labels.values(), rows["case_id"].nunique(), **options)
        notes = [str(self.gate)] if self.gate else []
        if self.differences:
            pairs = (f"{name} {one} -> {other}" for name, (one, other) in self.differences.items())
            notes.append(f"settings that differ: {'; '.join(pairs)}")
        notes += [*found.notes, *matching.little_shared(self.verdicts, self.unmatched)]
        if len(self.unmatched):
            notes.append(
                f"only in one side: {len(self.unmatched)} (.unmatched, unmatched.csv); first: "
                f"{self.unmatched['reason'].iloc[0]}"
            )
        return replace(found, notes=tuple(notes))

    def findings(self) -> dict[str, Any]:
        """Return the number of items, and how many verdicts differ under each rule."""
        flipped: Any = self.verdicts.groupby("rule", sort=False)["flipped"].sum()
        return {"items": len(self.verdicts) // len(flipped), "flipped": flipped.to_dict()}


def _bare_once(verdicts: Any) -> Any:
    """Keep dose 0 once per model, rule and fact, as all schemes share the bare query."""
    bare = verdicts["dose"] == 0
    if verdicts.loc[bare, "scheme"].nunique() < 2:
        return verdicts
    once = verdicts[bare].drop_duplicates(["model", "rule", "case_id"]).assign(scheme="bare")
    return pd.concat([once, verdicts[~bare]], ignore_index=True)


def _labels(rows: pd.DataFrame, by: Sequence[Cluster]) -> list[np.ndarray]:
    """Return the cluster of each row; a saved comparison may lack a clustering."""
    return [np.asarray(rows.get(name, np.full(len(rows), "")), dtype=str) for name in by]


def _values(rows: pd.DataFrame, measure: str, side: str = "reference") -> np.ndarray:
    """Return a measure of each row on one side: 0 or 1 for fractions, nats otherwise."""
    margins = rows[side].to_numpy(dtype=float)
    if measure in FRACTIONS:
        return (margins > 0 if measure == "efficacy" else margins < 0).astype(float)
    return margins - rows[f"bare_{side}"].to_numpy(dtype=float) if measure == "shift" else margins


def _measures(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return the measures; the shift only where its change differs from the margin's."""
    bare = "bare_other" in rows and (
        (rows["bare_reference"] - rows["bare_other"]).abs().gt(ROUNDING).any()
    )
    shifted = bare and any(_values(rows, "shift", side).any() for side in SIDES)
    return MEASURES if shifted else MEASURES[:3]


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
    restrictions = (first or {}, second or {})
    for one, chosen in zip((reference, other), restrictions, strict=True):
        if not isinstance(one, Result):  # both before one is loaded, which imports torch
            matching.check_chosen(matching.values_of(one), chosen)
    results = [_hijack_run(one) for one in (reference, other)]
    table, missing, pairs = matching.matched(results, restrictions)
    kept = [item.name for item in fields(ComparedModel)]
    models = [
        tuple(
            ComparedModel(**{name: getattr(model, name) for name in kept})
            for model in result.settings.models
            if model.name == chosen.get("model", model.name)
        )
        for result, chosen in zip(results, restrictions, strict=True)
    ]
    labels = matching.labels(pairs, results, (reference, other))
    return Comparison(
        table,
        dict(zip(SIDES, models, strict=True)),
        Provenance.now(),
        labels=dict(zip(SIDES, labels, strict=True)),
        unmatched=pd.DataFrame(missing, columns=[*UNMATCHED]).astype({"case_id": "Int64"}),
        differences=matching.differences(results, models),
    )


def compare_within(
    run: Result | str | Path, first: Any, second: Any, chosen: Mapping[str, Any]
) -> Comparison:
    """Compare two schemes, doses, rules or models of one run (`HijackResult.compare`)."""
    values = matching.values_of(run)
    axes = [axis for axis in AXES if first in values[axis] and second in values[axis]]
    if not axes or first == second:
        have = "; ".join(f"{axis}: {', '.join(map(str, values[axis]))}" for axis in AXES)
        raise InputError(
            f"cannot compare {shown(first)} with {shown(second)}: name two schemes, doses, rules "
            f"or models of this run. It has {have}."
        )
    restricted = {axis: value for axis, value in chosen.items() if value is not None}
    matching.check_chosen(values, restricted)
    sides = [restricted | {axes[0]: name} for name in (first, second)]
    result = _hijack_run(run)
    return compare(result, result, first=sides[0], second=sides[1])


def _hijack_run(result: Result | str | Path) -> Any:
    found: Any = result if isinstance(result, Result) else load_result(result)
    matching.check_run(type(found).__name__)
    return found
