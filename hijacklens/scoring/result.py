"""The result of a hijack run: scores of every item, their summary, and the curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations
from typing import Annotated, Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure
from pydantic import PlainSerializer

from hijacklens.engine.reading import Accounting
from hijacklens.errors import InputError, choice, one_of_type, unknown
from hijacklens.facts.fact import FactsRecord
from hijacklens.facts.relations import known_relation, relation_title
from hijacklens.models.identity import ModelIdentity
from hijacklens.prompts.schemes import SchemeRecord
from hijacklens.prompts.wordings import PROMPT_COLUMNS
from hijacklens.results.exhibits import Exhibit, Facts, Table, Text
from hijacklens.results.glance import Glance, Grid, named, singular
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring import efficacy
from hijacklens.scoring.comparison import Comparison, compare_within
from hijacklens.scoring.curves import MEASURES, curves, drawings, relation_curves
from hijacklens.scoring.efficacy import ALL, RULES, Rule
from hijacklens.scoring.items import ITEM_COLUMNS, SkippedTable

MEANING = {
    "efficacy": "the fraction of facts with score(false) > score(true): hijacking raises it. "
    "Some summaries of the paper say that hijacking lowers ES: they mean retention.",
    "retention": "the fraction of facts with score(true) > score(false). Ties are counted "
    "separately.",
    "95% interval": "for these facts, the Wilson interval: the band around a curve, and the two "
    "columns after efficacy. For relations like these, the clustered one: relations are the "
    "sample, since facts of one relation behave alike (by the design effect).",
    "rule": "how a target is scored: by its first token, the sum over its tokens, or their mean.",
    "known": "the facts whose true target wins on the bare query, under the same rule.",
    "shift": "score(false) - score(true), hijacked minus bare, in nats.",
}

DIFFER = {"any": "any two", **{f"{a}_{b}": f"{a} and {b}" for a, b in combinations(RULES, 2)}}
LABELS = {
    **{"efficacy_low": "low", "efficacy_high": "high", "mean_shift": "shift (nats)"},
    **{f"clustered_{end}": f"{end}, relations" for end in ("low", "high")},
}
EACH = ("model", "scheme")
RELATIONS_LIKE_THESE = "[{clustered_low:fraction}, {clustered_high:fraction}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingCounts:
    """Where the readings of a run came from."""

    computed: int
    from_store: int
    store: str
    """Path of the store; empty if it was not used."""
    store_off: str
    """Why the store was not used; empty if it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredModel(ModelIdentity):
    """A model that scored facts, and the cost."""

    readings: ReadingCounts
    engine: Annotated[Accounting, PlainSerializer(Accounting.record)]


@dataclass(frozen=True, slots=True, kw_only=True)
class HijackSettings:
    """The settings of `hijacklens.hijack`."""

    models: tuple[ScoredModel, ...]
    facts: FactsRecord
    schemes: tuple[SchemeRecord, ...]
    doses: tuple[int, ...]
    probes: tuple[str, ...]
    """Keys of the probes, in their order."""
    seed: int
    unfinished: Mapping[str, Any] | None = None
    """For a run that was cut short: all settings that were `asked`, and the models that are
    `missing`; if none is, the answers are."""

    @property
    def title(self) -> str:
        """The models and the probes that changed them."""
        return _title(self.models, self.probes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedSettings:
    """One model under one scheme, with probes."""

    model: ModelIdentity
    scheme: SchemeRecord
    probes: tuple[str, ...] = ()
    """Keys of the probes, in their order."""
    seed: int

    @property
    def title(self) -> str:
        """The model and the probes that changed it."""
        return _title([self.model], self.probes)


def _title(models: Sequence[ModelIdentity], probes: Sequence[str]) -> str:
    changed = f" with {', '.join(probes)}" if probes else ""
    return named([model.title for model in models]) + changed


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings(ProbedSettings):
    """Facts, each with a bare and a hijacked prompt."""

    facts: FactsRecord
    dose: int


@dataclass(frozen=True, eq=False)
class HijackResult(Result):
    """Scores of facts under schemes and doses, for one or several models.

    `result.summary()` is the table to look at; `to_dataframe()` has a row per item. Scores and
    shifts are in nats; `hijacklens.scoring.efficacy` defines the rules and fractions.
    """

    items: Annotated[pd.DataFrame, Stored("items.parquet", columns=ITEM_COLUMNS)]
    """A row per model, fact, scheme and dose: the columns of `items.parquet`."""
    skipped: SkippedTable
    """Facts that could not be scored, with the reason: model, case_id, ..., scheme, reason."""
    settings: HijackSettings
    provenance: Provenance
    prompts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=[*PROMPT_COLUMNS]))
    """The texts, a row per fact and scheme; empty if the result was saved without them."""
    derived: ClassVar = {"summary.csv": "full_summary", "rules.csv": "disagreement"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return the items: one row per model, fact, scheme and dose."""
        return self.items.copy()

    @cached_property
    def full_summary(self) -> pd.DataFrame:
        """Every row of `summary.csv`: all rules and relations, for all facts and known facts."""
        return efficacy.summarise(self.items)

    def summary(
        self, *, rule: Rule = "first", relation: str = "all", known_only: bool = False
    ) -> pd.DataFrame:
        """Return a row per model, scheme and dose: efficacy, its interval, retention, ties, shift.

        Args:
            rule: How targets are scored: `first`, `sum` or `mean`.
            relation: `all`, or one relation by id or name (`P36`, `capital`).
            known_only: Count only the facts whose true target wins on the bare query.

        Raises:
            InputError: An unknown rule or relation.
        """
        table = self.full_summary
        choice("rule", rule, RULES)
        known = set(table["relation"])
        relation = known_relation(one_of_type("relation", relation, str, "'P36'"), known)
        chosen = {"rule": rule, "relation": relation, "facts": "known" if known_only else ALL}
        return self._rows(chosen).drop(columns=list(chosen)).reset_index(drop=True)

    def disagreement(self) -> pd.DataFrame:
        """Return how often the three rules decide differently, by model, scheme and dose."""
        return efficacy.disagreement(self.items)

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

    def compare(
        self,
        first: str | int,
        second: str | int,
        *,
        model: str | None = None,
        scheme: str | None = None,
        dose: int | None = None,
        rule: Rule | None = None,
    ) -> Comparison:
        """Compare two schemes, doses, rules or models of this run, fact by fact.

        `result.compare("do-not-think", "think", dose=1)`, `result.compare(1, 5)`. Changes are
        `second` minus `first`.

        Args:
            first: A scheme, a dose, a rule or a model.
            second: Another one.
            model: Only this model; by default every model.
            scheme: Only this scheme.
            dose: Only this dose.
            rule: Only this rule; by default all three, each with a family of p-values.

        Raises:
            InputError: The run lacks one of the names.
        """
        chosen = {"model": model, "scheme": scheme, "dose": dose, "rule": rule}
        return compare_within(self, first, second, chosen)

    def trends(self, *, rule: Rule = "first") -> pd.DataFrame:
        """Return how efficacy and the shift grow with the dose: a row per model and scheme.

        `slope` is the mean over facts of the least-squares slope, per sentence, with `facts_low`,
        `facts_high` and `facts_p` about these facts (t), and `clustered_low`, `clustered_high` and
        `clustered_p` about relations like these. `half_dose` is the dose at which the mean curve
        has made half of its change, with the bootstrap interval over relations.

        Raises:
            InputError: An unknown rule, or the run has only one dose.
        """
        return efficacy.trends(self.items, rule=rule, seed=self.settings.seed)

    def plot(self, *, rule: Rule = "first", measure: efficacy.Measure = "efficacy") -> Figure:
        """Draw a measure against dose with 95% intervals: a line per scheme, a panel per model.

        With a single scheme, all models share one panel, with a line each.

        Args:
            rule: How targets are scored: `first`, `sum` or `mean`.
            measure: `efficacy` or `retention`, with Wilson's interval; or the mean `margin`,
                score(false) - score(true) in nats, with Student's. All are about these facts.

        Raises:
            InputError: An unknown rule or measure.
        """
        choice("rule", rule, RULES)
        choice("measure", measure, MEASURES)
        table = efficacy.about_these_facts(self.items, rule, measure)
        return curves(table, rule, measure, probes=self.settings.probes)

    def plot_relations(self, *, scheme: str | None = None, rule: Rule = "first") -> Figure:
        """Draw efficacy against dose, a panel for each relation and a line for each model.

        Raises:
            InputError: An unknown scheme or rule, or no scheme is named out of several.
        """
        schemes = list(self.items["scheme"].unique())
        only = schemes[0] if len(schemes) == 1 else None
        chosen = {"scheme": scheme or only, "rule": choice("rule", rule, RULES), "facts": ALL}
        if chosen["scheme"] not in schemes:
            raise unknown("scheme", scheme, schemes)
        table = self._rows(chosen)
        of_relations = table[table["relation"] != ALL]
        return relation_curves(of_relations, rule, probes=self.settings.probes)

    def _rows(self, chosen: Mapping[str, Any]) -> Any:
        """Return the rows of the complete summary with some values."""
        table = self.full_summary
        return table[(table[list(chosen)] == pd.Series(chosen)).all(axis=1)]

    def exhibits(self) -> list[Exhibit]:
        """The run in words, curves, summary, facts that flip, how rules differ, skipped facts."""
        exhibits: list[Exhibit] = [
            _in_words(self),
            *drawings(
                {rule: self.summary(rule=rule) for rule in RULES}, probes=self.settings.probes
            ),
            Table(
                "Efficacy and retention",
                self.full_summary.assign(
                    relation=self.full_summary["relation"].map(relation_title)
                ),
                note="Choose a relation, a rule, or the facts that the model knows.",
                file="summary.csv",
                filters=(*EACH, "dose", "rule", "relation", "facts"),
                chosen={"rule": RULES[0], "relation": ALL, "facts": ALL},
                labels=LABELS,
            ),
            Facts("Facts before and after", self.items, self.prompts, _around(self.settings.facts)),
            Table(
                "How often the rules differ",
                self.disagreement(),
                note="The fraction of facts on which the three rules, or two of them, give "
                "different verdicts.",
                file="rules.csv",
                filters=EACH,
                fractions=tuple(DIFFER),
                labels=DIFFER,
                folded=True,
            ),
        ]
        if len(self.skipped):
            options: Any = {"file": "skipped.csv", "filters": EACH, "folded": True}
            exhibits.append(Table("Facts that could not be scored", self.skipped, **options))
        return exhibits

    def findings(self) -> dict[str, Any]:
        """Return the counts, and the cases whose targets share their first token."""
        cases = sorted(self.items.loc[self.items["same_first_token"], "case_id"].unique().tolist())
        return {"items": len(self.items), "skipped": len(self.skipped), "same_first_token": cases}

    @classmethod
    def join(cls, results: Sequence[HijackResult]) -> HijackResult:
        """Return one result of several runs on the same facts, schemes and doses, a model each.

        Raises:
            InputError: No result is given, the runs differ in more than the model, or a model
                occurs twice.
        """
        if not results:
            raise InputError("join needs at least one result.")
        first = results[0]
        names = [item.name for item in fields(HijackSettings) if item.name != "models"]
        values = {name: [getattr(result.settings, name) for result in results] for name in names}
        differing = [name for name in names if any(x != values[name][0] for x in values[name])]
        if differing:
            raise InputError(f"results differ in {', '.join(differing)}; only models may differ.")
        models = tuple(model for result in results for model in result.settings.models)
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise InputError(
                f"a model occurs twice in {names}; results of one model cannot join. Two "
                "models of one name need another model.cfg.model_name before they are scored."
            )
        tables = {
            name: pd.concat([getattr(result, name) for result in results], ignore_index=True)
            for name in ("items", "skipped", "prompts")
        }
        once = tables["prompts"].drop_duplicates(["case_id", "scheme"], ignore_index=True)
        settings = replace(first.settings, models=models)
        return replace(first, settings=settings, **{**tables, "prompts": once})

    def glance(self, rule: Rule = "first") -> Glance:
        """Efficacy and retention by dose under a rule, the facts known, and how the run went."""
        table, settings = self.summary(rule=rule), self.settings
        models, schemes = (list(table[name].unique()) for name in EACH)
        many = bool((table["clusters"] > 1).any())
        columns = {
            **({"model": "{model}"} if len(models) > 1 else {}),
            **({"scheme": "{scheme}"} if len(schemes) > 1 else {}),
            **({"facts": "{n:d}"} if len(schemes) > 1 or table["n"].nunique() > 1 else {}),
            "dose": "{dose:d}",
            "efficacy": "{efficacy:fraction} [{efficacy_low:fraction}, {efficacy_high:fraction}]",
            **({"relations like these": RELATIONS_LIKE_THESE} if many else {}),
            "retention": "{retention:fraction}",
            "ties": "{ties:d}",
            "mean shift": "{mean_shift:signed}",
        }
        counts = table["n"].max() if len(table) else 0
        return Glance(
            f"{settings.title} · {settings.facts.title}, {counts} facts · "
            f"{named(schemes)} · rule {rule}",
            (Grid.of(table, columns),),
            tuple(self._notes()),
            details=tuple(self._details()),
        )

    def _notes(self) -> Iterator[str]:
        """Schemes without facts, intervals, facts known, disagreement, facts skipped."""
        unscored = self.skipped.loc[~self.skipped["scheme"].isin(self.items["scheme"])]
        for scheme, rows in unscored.groupby("scheme", sort=False):
            if scheme:
                yield f"nothing was scored under {scheme}: {rows['reason'].iloc[0]}"
        yield "efficacy [low, high]: 95% Wilson interval, about these facts; mean shift in nats"
        pooled = self._rows({"relation": ALL, "facts": ALL})
        if (count := pooled["clusters"].max()) > 1:
            yield (
                f"relations like these: 95% interval clustered over {count} relations (design "
                f"effect up to {pooled['design_effect'].max():.1f}); changes: .compare(...)"
            )
        else:
            yield "one relation: these facts say nothing about relations like these"
        if self.settings.facts.note:
            yield f"{self.settings.facts.name}: {self.settings.facts.note}"
        known = {row["model"]: row for row in self.known_facts()}
        for model in self.settings.models:
            name = model.name
            if model.tokenizer_note:
                yield f"{name}: {model.tokenizer_note}"
            if name in known:
                by_rule = ", ".join(f"{known[name][rule]} ({rule})" for rule in RULES)
                yield f"{name} knows {by_rule} of {known[name]['n']} facts on the bare query"
        collisions = len(self.findings()["same_first_token"])
        yield (
            f"rules first, sum and mean do not all agree on {self.total_disagreement():.1%} of the "
            f"verdicts (.disagreement(), rules.csv); in {collisions} facts both targets begin with "
            "the same token, a tie under rule first"
        )
        if len(self.skipped):
            yield (
                f"skipped: {len(self.skipped)} pairs of fact and scheme (.skipped, skipped.csv); "
                f"first: {self.skipped['reason'].iloc[0]}"
            )

    def _details(self) -> Iterator[str]:
        """Seed and the cost of each model."""
        yield f"seed {self.settings.seed}, for the sample of facts and random sentences"
        for model in self.settings.models:
            counts = model.readings
            if counts.from_store:
                yield (
                    f"{model.name}: {counts.from_store:,} readings came from the store, "
                    f"{counts.computed:,} were computed (--no-cache computes all)"
                )
            yield f"{model.name}: {model.engine.summary()}"


def _around(facts: FactsRecord) -> str:
    """Say what the prompts have besides sentences and queries."""
    around = [f"begins with {facts.opening!r}"] * bool(facts.opening)
    around += [f"is in a {facts.chat.title}"] if facts.chat else []
    return f"Every prompt {' and '.join(around)}, which is not shown." if around else ""


def _in_words(result: HijackResult) -> Text:
    """Describe the run, its hijacking sentences, and what the numbers mean."""
    settings = result.settings
    models = ", ".join(model.name for model in settings.models)
    doses = ", ".join(str(dose) for dose in settings.doses if dose)
    count = singular(f"{result.items['case_id'].nunique()} facts")
    hijacked = singular(f" and after {doses} hijacking sentences (the dose)") if doses else ""
    paragraphs = [f"{models} completed {count} of {settings.facts.title}, bare (dose 0){hijacked}."]
    if settings.probes:
        paragraphs.append(f"Probes changed the models: {', '.join(settings.probes)}.")
    if settings.facts.note:
        paragraphs.append(f"The facts: {settings.facts.note.rstrip('.')}.")
    points = []
    for scheme in settings.schemes:
        texts = [scheme.text] if isinstance(scheme.text, str) else (scheme.text or {}).values()
        sentences = list(dict.fromkeys(texts))
        more = f" and {len(sentences) - 1} more, by relation" if len(sentences) > 1 else ""
        points.append(f"{scheme.name}: “{sentences[0]}”{more}" if sentences else scheme.name)
    return Text("What was run", paragraphs, points, MEANING)
