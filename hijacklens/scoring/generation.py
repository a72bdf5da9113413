"""What models say: continuations of prompts, judged, next to the verdicts by log-probability.

A verdict compares two targets; a model may say neither. `answers` generates from the prompts that
`hijack` scored, and judges what is said (`hijacklens.scoring.judging`).

    result = hl.hijack(model, facts, doses=[0, 1])
    said = hl.answers(model, facts, result)
    said.summary()      # fractions of answers: true, false, other, refused
    said.agreement()    # how often an answer has the verdict of each scoring rule
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError, one_of_type, shown, strict
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import HookedLanguageModel, require_text
from hijacklens.models.identity import identify
from hijacklens.probe import Probe
from hijacklens.prompts.wordings import make_prompts
from hijacklens.results.exhibits import Drawing, Exhibit, Table
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring.continuing import Generation, write
from hijacklens.scoring.curves import say_probes
from hijacklens.scoring.efficacy import RULES, Rule, margin
from hijacklens.scoring.judging import JUDGEMENTS, judge
from hijacklens.scoring.result import HijackResult, HijackSettings
from hijacklens.statistics import clustered_fraction

COLUMNS = (
    "model", "case_id", "relation_id", "subject", "scheme", "dose", "sample", "text", "said",
    *RULES,
)  # fmt: skip
EACH = ["model", "scheme", "dose"]
SIDES = ("false", "true")
SAID_COLOURS = (plots.COLOURS[0], plots.COLOURS[1], "#BBBBBB", "#666666")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersSettings:
    """The run that scored the prompts, and how answers were generated."""

    scored: HijackSettings
    generation: Generation


@dataclass(frozen=True, eq=False)
class AnswersResult(Result):
    """Judged answers to the prompts of facts, with the verdicts by log-probability."""

    answers: Annotated[pd.DataFrame, Stored("answers.parquet", columns=COLUMNS)]
    """A row per model, fact, scheme, dose and sample: the `text`, how it is judged (`said`), and
    the target that each rule prefers (`first`, `sum`, `mean`: `true`, `false` or `tie`)."""
    settings: AnswersSettings
    provenance: Provenance
    figures: ClassVar = {"answers": {}}
    derived: ClassVar = {"summary.csv": "summary", "agreement.csv": "agreement"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per answer."""
        return self.answers.copy()

    def summary(self) -> pd.DataFrame:
        """Return the fractions of `true`, `false`, `other` and `refused` by model, scheme and dose.

        `false_low` and `false_high` are the 95% interval of `false` over relations like these.
        """
        rows = []
        groups: Any = self.answers.groupby(EACH, sort=False)
        for key, part in groups:
            row = {**dict(zip(EACH, key, strict=True)), "n": len(part)}
            row |= {name: (part["said"] == name).mean() for name in JUDGEMENTS}
            rows.append({**row, **_ends("false", part["said"] == "false", part["relation_id"])})
        return pd.DataFrame(rows)

    def agreement(self, *, by_relation: bool = False) -> pd.DataFrame:
        """Return how often an answer that names a target has the verdict of each rule.

        Returns:
            A row per model, scheme, dose and rule (and relation): `n` answers; how many are
            `decided`, which name one of the targets; the fraction `agree` of these, with 95% Wilson
            intervals about these facts (`agree_low`, `agree_high`; samples of a fact are a
            cluster) and about relations like these (`clustered_low`, `clustered_high`); and
            `verdict_false`, `said_false`: the fractions of all answers with each.
        """
        rows = []
        by = [*EACH, "relation_id"] if by_relation else EACH
        groups: Any = self.answers.groupby(by, sort=False)
        for key, part in groups:
            decided = part[part["said"].isin(["true", "false"])]
            for rule in RULES:
                same = decided["said"] == decided[rule]
                row = {**dict(zip(by, key, strict=True)), "rule": rule, "n": len(part)}
                row |= {"decided": len(same), "agree": same.mean()}
                row |= _ends("agree", same, decided["case_id"])
                row |= _ends("clustered", same, decided["relation_id"])
                row |= {"verdict_false": (part[rule] == "false").mean()}
                rows.append({**row, "said_false": (part["said"] == "false").mean()})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Draw what is said at each dose: a bar per scheme and dose, a panel per model."""
        table = self.summary()
        models = list(table["model"].unique())
        bars = max(len(table[table["model"] == model]) for model in models)
        with plots.canvas(len(models), height=1.4 + 0.3 * bars) as (figure, axes):
            for ax, model in zip(axes, models, strict=True):
                rows: Any = table[table["model"] == model]
                labels = [f"{row.scheme}, dose {row.dose}" for row in rows.itertuples()]
                parts = rows[list(JUDGEMENTS)].set_axis(map(plots.escape, labels))
                parts.plot.barh(stacked=True, ax=ax, color=SAID_COLOURS, legend=False, width=0.8)
                ax.invert_yaxis()
                ax.set_xlim(0, 1)
                ax.set_xlabel("fraction of answers")
                ax.set_title(plots.escape(model), fontsize=9)
            handles, names = axes[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", ncols=len(JUDGEMENTS))
            say_probes(figure, self.settings.scored.probes)
        return figure

    def exhibits(self) -> list[Exhibit]:
        """What is said, how it agrees with the verdicts, and all answers."""
        return [
            Drawing("What is said", self.plot()),
            Table("Answers by dose", self.summary(), file="summary.csv", filters=EACH),
            Table("Agreement with verdicts", self.agreement(), file="agreement.csv", filters=EACH),
            Table(
                "Answers", self.answers, file="answers.csv", filters=[*EACH, "said"], folded=True
            ),
        ]

    def glance(self, rule: Rule = "first") -> Glance:
        """Fractions of answers and their agreement with the verdicts of a rule."""
        agreement = self.agreement()
        table = self.summary().merge(agreement[agreement["rule"] == rule], on=[*EACH, "n"])
        one = {name: table[name].iloc[0] for name in EACH[:2] if table[name].nunique() == 1}
        scored = self.settings.scored
        one |= {"model": scored.title} if "model" in one else {}
        columns = {
            **{name: f"{{{name}}}" for name in EACH if name not in one},
            "true": "{true:fraction}",
            "false": "{false:fraction} [{false_low:fraction}, {false_high:fraction}]",
            "other": "{other:fraction}",
            "refused": "{refused:fraction}",
            f"verdict false ({rule})": "{verdict_false:fraction}",
            "agree": "{agree:fraction} [{clustered_low:fraction}, {clustered_high:fraction}] of "
            "{decided:d}",
        }
        about = "intervals: 95%, about relations like these"
        if table["false_low"].isna().all():
            columns = {name: re.sub(r" \[.*\]", "", form) for name, form in columns.items()}
            about = "one relation: these facts say nothing about relations like these"
        made = self.settings.generation
        how = f"drawn at temperature {made.temperature:g}" if made.temperature else "greedy"
        return Glance(
            f"{' · '.join(map(str, one.values()))} · {scored.facts.title} · "
            f"{len(self.answers)} answers, {how}, at most {made.tokens} tokens",
            (Grid.of(table, columns),),
            (
                f"{about}; agree: the fraction of the answers that name a target which name the "
                "one of the verdict",
            ),
            ("summary()", "agreement(by_relation=True)", "answers", "plot()"),
        )

    @classmethod
    def join(cls, results: Sequence[AnswersResult], scored: HijackResult) -> AnswersResult:
        """Return one result of the answers of several models, which one run scored."""
        first = results[0]
        table = pd.concat([result.answers for result in results], ignore_index=True)
        return replace(
            first, answers=table, settings=replace(first.settings, scored=scored.settings)
        )

    def findings(self) -> dict[str, Any]:
        """Return the number of answers of each kind."""
        return {"answers": len(self.answers), **self.answers["said"].value_counts().to_dict()}


def _ends(name: str, hits: pd.Series, clusters: pd.Series) -> dict[str, float | None]:
    """Return the columns of an interval that is clustered; empty with fewer than two clusters."""
    ends: list[float | None] = [None, None]
    if clusters.nunique() > 1:
        found = clustered_fraction(hits.to_numpy(float), clusters.to_numpy(str))
        ends = [found.low, found.high]
    return dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))


@strict
def answers(
    model: HookedLanguageModel,
    facts: FactSet,
    result: HijackResult,
    *,
    probes: Sequence[Probe] = (),
    generation: Generation = Generation(),
    quiet: bool = False,
) -> AnswersResult:
    """Generate and judge answers to the prompts of a hijack run.

    Args:
        model: The model that the run scored, or one of them.
        facts: The facts of the run, asked in its chat; aliases of a target count as the target.
        result: The run; its schemes, doses and seed are used.
        probes: Those of the run. Generated tokens belong to the spans `query`, `last` and
            `target`, like those of a target when it is scored.
        generation: Length, samples, temperature and seed.
        quiet: Draw no progress bar.

    Raises:
        InputError: The facts, the model or the probes are not those of the run.

    Note:
        As `hijacklens.scoring.continuing.write`.
    """
    one_of_type("generation", generation, Generation, "hl.Generation(tokens=24)")
    require_text(model, operation="generating answers")
    settings, name = result.settings, str(model.cfg.model_name)
    facts = facts.in_chat(settings.facts.chat)
    theirs = [one.weights_hash for one in settings.models if one.name == name]
    given = (facts.record(), tuple(probe.key for probe in probes), [identify(model).weights_hash])
    for what, mine, run in zip(
        ("facts", "probes", "model"),
        given,
        (settings.facts, settings.probes, theirs),
        strict=True,
    ):
        if mine != run:
            raise InputError(
                f"the {what} of these answers are not those of the run: {shown(mine)} and "
                f"{shown(run)}. Give what hl.hijack was given."
            )
    schemes = [record.scheme() for record in settings.schemes]
    prompts, _ = make_prompts(facts, schemes, settings.doses, model.tokenizer, seed=settings.seed)
    scored: Any = result.items[result.items["model"] == name]
    scored = scored.set_index(["case_id", "scheme", "dose"])
    verdicts = {
        rule: np.select([margin(scored, rule) > 0, margin(scored, rule) < 0], SIDES, "tie")
        for rule in RULES
    }
    scored = scored[["model", "relation_id", "subject"]].assign(**verdicts)
    keyed = {(fact.case_id, prompt.scheme, prompt.dose): (fact, prompt) for fact, prompt in prompts}
    kept = [(key, *keyed[key]) for key in keyed if key in scored.index]
    texts = write(model, [x[-1] for x in kept], generation, probes=probes, quiet=quiet)
    others = frozenset(x for fact in facts for x in (fact.target_true, fact.target_false))
    rows = [
        {**scored.loc[key], **dict(zip(scored.index.names, key, strict=True))}
        | {"sample": sample, "text": text, "said": judge(text, fact, others)}
        for (key, fact, _), samples in zip(kept, texts, strict=True)
        for sample, text in enumerate(samples)
    ]
    return AnswersResult(
        pd.DataFrame(rows, columns=list(COLUMNS)),
        AnswersSettings(scored=settings, generation=generation),
        Provenance.now(seed=generation.seed),
    )
