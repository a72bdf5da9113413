"""The result of a hijack run: items, summary, rules, skipped facts, curve, provenance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from hijacklens.engine import accounting
from hijacklens.errors import InputError, choice, unknown
from hijacklens.results.exhibits import Drawing, Exhibit, Facts, Table, Text
from hijacklens.results.glance import Glance, Grid, named
from hijacklens.results.provenance import Provenance
from hijacklens.results.result import Result
from hijacklens.results.stored import Stored
from hijacklens.scoring import efficacy
from hijacklens.scoring.curves import curves, relation_curves
from hijacklens.scoring.efficacy import ALL, RULES, Rule
from hijacklens.scoring.items import ITEM_COLUMNS, PROMPT_COLUMNS, SkippedTable
from hijacklens.scoring.settings import HijackSettings

PANELS = 2
"""Panels of a drawing: more would be too small to read on a laptop."""

MEANING = {
    "efficacy": "the share of facts with score(false) > score(true): hijacking raises it. "
    "Some summaries of the paper say that it lowers ES: they mean retention.",
    "retention": "the share of facts with score(true) > score(false). Ties are counted by "
    "themselves.",
    "95% interval": "Wilson's, over the facts; the band around a curve and the two columns behind "
    "efficacy.",
    "rule": "how a target is scored: by its first token, the sum over its tokens, or their mean.",
    "known": "the facts whose true target wins on the bare query, under the same rule.",
    "shift": "score(false) - score(true), hijacked minus bare, in nats.",
}

DIFFER = {
    "any": "any two",
    "first_sum": "first and sum",
    "first_mean": "first and mean",
    "sum_mean": "sum and mean",
}

EACH = ("model", "scheme")


def hijack_exhibits(result: HijackResult) -> list[Exhibit]:
    """From top to bottom: what was asked, curves, summary, facts, rules, skipped facts."""
    summary = result.full_summary
    shown: list[Exhibit] = [_asked(result)]
    parts = _parts(result)
    for rule in RULES:
        shown.extend(_curves(parts, rule))
    labels = {"efficacy_low": "low", "efficacy_high": "high", "mean_shift": "shift (nats)"}
    shown.append(
        Table(
            "Efficacy and retention",
            summary,
            note="Choose a relation, a rule, or the facts that the model knows.",
            file="summary.csv",
            filters=(*EACH, "dose", "rule", "relation", "facts"),
            chosen={"rule": RULES[0], "relation": ALL, "facts": ALL},
            labels=labels,
        )
    )
    shown.append(Facts("Facts before and after", result.items, result.prompts))
    shown.append(
        Table(
            "How often the rules differ",
            result.disagreement(),
            note="The share of facts on which the three rules, or two of them, do not give the "
            "same verdict.",
            file="rules.csv",
            filters=EACH,
            fractions=tuple(DIFFER),
            labels=DIFFER,
            folded=True,
        )
    )
    if len(result.skipped):
        shown.append(
            Table(
                "Facts that could not be scored",
                result.skipped,
                file="skipped.csv",
                filters=EACH,
                folded=True,
            )
        )
    return shown


def _asked(result: HijackResult) -> Text:
    """The run in words, its sentences, and what the numbers mean."""
    settings = result.settings
    models = ", ".join(model.name for model in settings.models)
    doses = ", ".join(str(dose) for dose in settings.doses if dose)
    facts = result.items["case_id"].nunique()
    sentences = [
        f"{models} completed {facts} facts of {settings.facts.name}, bare (dose 0) and "
        f"behind hijacking sentences, {doses} of them (the dose)."
    ]
    if settings.probes:
        sentences.append(f"Probes changed the models: {', '.join(settings.probes)}.")
    if settings.facts.note:
        sentences.append(f"The facts: {settings.facts.note.rstrip('.')}.")
    points = []
    for scheme in settings.schemes:
        texts = scheme.text or {}
        listed = [texts] if isinstance(texts, str) else list(dict.fromkeys(texts.values()))
        more = f" and {len(listed) - 1} more, by relation" if len(listed) > 1 else ""
        points.append(f"{scheme.name}: “{listed[0]}”{more}" if listed else scheme.name)
    return Text("What was asked", sentences, points, MEANING)


def _parts(result: HijackResult) -> list[HijackResult]:
    """The run, a few models at a time where each has a panel."""
    models = list(result.items["model"].unique())
    if len(models) <= PANELS or result.items["scheme"].nunique() == 1:
        return [result]
    starts = range(0, len(models), PANELS)
    few = [result.items["model"].isin(models[start : start + PANELS]) for start in starts]
    return [replace(result, items=result.items[rows]) for rows in few]


def _curves(parts: Sequence[HijackResult], rule: Rule) -> list[Drawing]:
    """The curves under a rule; those of the first rule are open."""
    drawn = []
    for part in parts:
        of = f" ({', '.join(part.items['model'].unique())})" if len(parts) > 1 else ""
        drawn.append(
            Drawing(
                f"Efficacy by dose, rule {rule}{of}",
                part.plot(rule=rule),
                alt=_described(part, rule),
                folded=rule != RULES[0],
            )
        )
    return drawn


def _described(result: HijackResult, rule: Rule) -> str:
    """The curves in words: efficacy at the lowest and the highest dose."""
    lines = []
    groups: Any = result.summary(rule=rule).groupby(list(EACH), sort=False)
    for (model, scheme), group in groups:
        rows = group.sort_values("dose")
        ends = [rows.iloc[i] for i in (0, -1)]
        words = [f"{end['efficacy']:.3f} at dose {end['dose']}" for end in ends]
        lines.append(f"{model}, {scheme}: {' to '.join(words)}")
    return (
        f"Curves of efficacy (rule {rule}) against dose with 95% intervals. {'; '.join(lines)}. "
        "The table below has all values."
    )


@dataclass(frozen=True, eq=False)
class HijackResult(Result):
    """Scores of facts under schemes and doses, for one or several models.

    `result.summary()` is the table to look at, `to_dataframe()` has a row per item. Scores and
    shifts are in nats; what each rule and share means is in `hijacklens.scoring.efficacy`.
    """

    items: Annotated[pd.DataFrame, Stored("items.parquet", columns=ITEM_COLUMNS)]
    """A row per model, fact, scheme and dose; see the design of `items.parquet`."""
    skipped: SkippedTable
    """Facts that could not be scored, with the reason: model, case_id, ..., scheme, reason."""
    settings: HijackSettings
    provenance: Provenance
    prompts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=[*PROMPT_COLUMNS]))
    """The texts: a row per fact and scheme; empty in results that were saved without them."""
    derived: ClassVar = {"summary.csv": "full_summary", "rules.csv": "disagreement"}

    def to_dataframe(self) -> pd.DataFrame:
        """The items: one row per model, fact, scheme and dose."""
        return self.items.copy()

    @cached_property
    def full_summary(self) -> pd.DataFrame:
        """Every row of `summary.csv`: all rules, relations, and known facts apart."""
        return efficacy.summarise(self.items)

    def summary(
        self, *, rule: efficacy.Rule = "first", relation: str = "all", known_only: bool = False
    ) -> pd.DataFrame:
        """One row per model, scheme and dose: efficacy with its interval, retention, ties, shift.

        Args:
            rule: How targets are scored: `first`, `sum` or `mean`.
            relation: `all`, or one relation id.
            known_only: Only the facts whose true target wins on the bare query.

        Raises:
            InputError: An unknown rule or relation.
        """
        table = self.full_summary
        choice("rule", rule, efficacy.RULES)
        choice("relation", relation, set(table["relation"]))
        chosen = (
            (table["rule"] == rule)
            & (table["relation"] == relation)
            & (table["facts"] == ("known" if known_only else efficacy.ALL))
        )
        columns = [name for name in table.columns if name not in ("rule", "relation", "facts")]
        return table.loc[chosen, columns].reset_index(drop=True)

    def disagreement(self) -> pd.DataFrame:
        """Share of facts on which the three rules decide differently, by model, scheme and dose."""
        return efficacy.disagreement(self.items)

    def known(self) -> pd.DataFrame:
        """How many facts each model knows on the bare query under each rule."""
        table = self.full_summary
        pooled = (table["relation"] == efficacy.ALL) & (table["facts"] == efficacy.ALL)
        bare = table.loc[pooled & (table["dose"] == 0), ["model", "scheme", "rule", "n"]]
        bare["known"] = (bare["n"] * table.loc[bare.index, "retention"]).round().astype(int)
        return bare.reset_index(drop=True)

    def known_facts(self) -> list[dict[str, Any]]:
        """Count the facts that each model knows on the bare query: `model, n` and the rules.

        A fact is counted once, also where one of several schemes skips it.
        """
        bare = self.items.loc[self.items["dose"] == 0]
        facts = bare.drop_duplicates(["model", "case_id"])
        return [
            {"model": model, "n": len(rows)}
            | {rule: int((efficacy.margin(rows, rule) < 0).sum()) for rule in RULES}
            for model, rows in facts.groupby("model", sort=False)
        ]

    def total_disagreement(self) -> float:
        """Return the fraction of all items on which the three rules decide differently."""
        groups = self.disagreement()
        return float((groups["any"] * groups["n"]).sum() / groups["n"].sum())

    def plot(self, *, rule: efficacy.Rule = "first") -> Figure:
        """Efficacy against dose with 95% intervals: a line per scheme, a panel per model.

        With one scheme, all models share a panel, a line each.
        """
        return curves(self.summary(rule=rule), rule)

    def plot_relations(self, *, scheme: str | None = None, rule: efficacy.Rule = "first") -> Figure:
        """Efficacy against dose, a panel for each relation and a line for each model.

        Args:
            scheme: Which of the schemes; it may be left out where there is one.
            rule: How targets are scored.

        Raises:
            InputError: No such scheme or rule, or several schemes and none named.
        """
        schemes = list(self.items["scheme"].unique())
        if scheme is None and len(schemes) == 1:
            scheme = schemes[0]
        if scheme not in schemes:
            raise unknown("scheme", scheme, schemes)
        if rule not in efficacy.RULES:
            raise unknown("rule", rule, efficacy.RULES)
        table = self.full_summary
        chosen = table.loc[
            (table["rule"] == rule)
            & (table["facts"] == efficacy.ALL)
            & (table["relation"] != efficacy.ALL)
            & (table["scheme"] == scheme)
        ]
        return relation_curves(chosen)

    def exhibits(self) -> list[Exhibit]:
        """Curves, the summary, the facts that flip, how rules differ, and what was skipped."""
        return hijack_exhibits(self)

    def findings(self) -> dict[str, Any]:
        """Return the counts, and the cases whose targets share their first token."""
        return {
            "items": len(self.items),
            "skipped": len(self.skipped),
            "same_first_token": sorted(
                {int(case) for case in self.items.loc[self.items["same_first_token"], "case_id"]}
            ),
        }

    @classmethod
    def join(cls, results: Sequence[HijackResult]) -> HijackResult:
        """One result of several runs on the same facts, schemes and doses, a model each.

        Raises:
            InputError: No result is given, the runs differ in more than the model, or a model
                occurs twice.
        """
        if not results:
            raise InputError("join needs at least one result.")
        first = results[0]
        for result in results:
            differing = [
                item.name
                for item in fields(HijackSettings)
                if item.name != "models"
                and getattr(result.settings, item.name) != getattr(first.settings, item.name)
            ]
            if differing:
                raise InputError(
                    f"results differ in {', '.join(differing)}; only models may differ."
                )
        models = tuple(model for result in results for model in result.settings.models)
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise InputError(f"a model occurs twice in {names}; results of one model cannot join.")
        return cls(
            items=pd.concat([result.items for result in results], ignore_index=True),
            skipped=pd.concat([result.skipped for result in results], ignore_index=True),
            settings=replace(first.settings, models=models),
            provenance=first.provenance,
            prompts=pd.concat([result.prompts for result in results]).drop_duplicates(
                ["case_id", "scheme"], ignore_index=True
            ),
        )

    def glance(self, rule: Rule = "first") -> Glance:
        """Efficacy and retention by dose, the facts known, and how the run went.

        Args:
            rule: How targets are scored: `first`, `sum` or `mean`.
        """
        table, settings = self.summary(rule=rule), self.settings
        models, schemes = (list(table[name].unique()) for name in EACH)
        columns = {
            **({"model": "{model}"} if len(models) > 1 else {}),
            **({"scheme": "{scheme}", "facts": "{n:d}"} if len(schemes) > 1 else {}),
            "dose": "{dose:d}",
            "efficacy": "{efficacy:fraction} [{efficacy_low:fraction}, {efficacy_high:fraction}]",
            "retention": "{retention:fraction}",
            "ties": "{ties:d}",
            "mean shift": "{mean_shift:signed}",
        }
        counts = table["n"].max() if len(table) else 0
        return Glance(
            f"{named(models)} · {settings.facts.name}, {counts} facts · "
            f"{named(schemes)} · rule {rule}",
            (Grid.of(table, columns),),
            tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        """Probes, seed, the cost of each model, facts known, disagreement, facts skipped."""
        yield from (f"probe: {key}" for key in self.settings.probes)
        yield "[low, high]: 95% Wilson interval over facts; mean shift: nats, to false"
        yield f"seed {self.settings.seed}, for the sample of facts and random sentences"
        known = {row["model"]: row for row in self.known_facts()}
        for model in self.settings.models:
            name, counts = model.name, model.readings
            if counts.from_store:
                yield (
                    f"{name}: {counts.from_store:,} readings came from the store, "
                    f"{counts.computed:,} were computed (--no-cache computes all)"
                )
            yield f"{name}: {accounting.summary(model.engine.record())}"
            if name in known:
                by_rule = ", ".join(f"{known[name][rule]} ({rule})" for rule in RULES)
                yield f"{name} knows {by_rule} of {known[name]['n']} facts on the bare query"
        collisions = self.items.loc[self.items["same_first_token"], "case_id"].nunique()
        yield (
            f"rules first, sum and mean do not all agree on {self.total_disagreement():.1%} of the "
            f"verdicts (rules.csv); in {collisions} facts both targets begin with "
            "the same token, a tie under rule first"
        )
        if len(self.skipped):
            yield (
                f"skipped: {len(self.skipped)} pairs of fact and scheme (skipped.csv); first: "
                f"{self.skipped['reason'].iloc[0]}"
            )
