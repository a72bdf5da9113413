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

import pandas as pd
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.engine.engine import read
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError, number, one_of_type, shown, whole_number
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import HookedLanguageModel, end_tokens, require_text, vocabulary_of
from hijacklens.models.identity import identify
from hijacklens.probe import Probe, spans_of
from hijacklens.progress import bar
from hijacklens.prompts.tokens import Continuation, LocatedPrompt, TokenIds, locate
from hijacklens.results.exhibits import Drawing, Exhibit, Table
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring.efficacy import RULES, Rule, margin
from hijacklens.scoring.items import Item, make_items, make_prompts, steps_in_context
from hijacklens.scoring.judging import JUDGEMENTS, judge
from hijacklens.scoring.result import HijackResult, HijackSettings
from hijacklens.statistics import clustered_fraction

COLUMNS = (
    "model", "case_id", "relation_id", "subject", "scheme", "dose", "sample", "text", "said",
    *RULES,
)  # fmt: skip
EACH = ["model", "scheme", "dose"]
SAID_COLOURS = (plots.COLOURS[0], plots.COLOURS[1], "#BBBBBB", "#666666")
_SENTENCE = re.compile(r"(?<=\w\w\w[.!?])\s|(?<=[!?])\s|(?<=\S)\n")
"""The end of a sentence; "St." and initials do not end one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How answers are generated.

    Raises:
        InputError: A number is out of its range, or several greedy answers are requested.
    """

    tokens: int = 24
    """Maximum length; an answer also stops at the end of its first sentence and at the model's end
    tokens."""
    samples: int = 1
    """Answers to each prompt."""
    temperature: float = 0.0
    """0: the likeliest token at each step; otherwise tokens are drawn at this temperature."""
    seed: int = 0
    """Seeds the draws."""

    def __post_init__(self) -> None:
        whole_number("tokens", self.tokens, least=1)
        whole_number("samples", self.samples, least=1)
        number("temperature", self.temperature, least=0)
        whole_number("seed", self.seed)
        if self.samples > 1 and not self.temperature:
            raise InputError(
                f"{self.samples} samples at temperature 0 are equal; give a temperature, such as 1."
            )


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
                rows = table[table["model"] == model]
                labels = [f"{row.scheme}, dose {row.dose}" for row in rows.itertuples()]
                left = pd.Series(0.0, index=rows.index)
                for name, colour in zip(JUDGEMENTS, SAID_COLOURS, strict=True):
                    ax.barh(range(len(rows)), rows[name], left=left, color=colour, label=name)
                    left += rows[name]
                ax.set_yticks(range(len(rows)), [plots.escape(label) for label in labels])
                ax.invert_yaxis()
                ax.set_xlim(0, 1)
                ax.set_xlabel("fraction of answers")
                ax.set_title(plots.escape(model), fontsize=9)
            handles, names = axes[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", ncols=len(JUDGEMENTS))
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
        made = self.settings.generation
        how = f"drawn at temperature {made.temperature:g}" if made.temperature else "greedy"
        return Glance(
            f"{' · '.join(map(str, one.values()))} · {self.settings.scored.facts.title} · "
            f"{len(self.answers)} answers, {how}, at most {made.tokens} tokens",
            (Grid.of(table, columns),),
            (
                "intervals: 95%, about relations like these; agree: the fraction of the answers "
                "that name a target which name the one of the verdict",
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
        facts: The facts of the run; aliases of their targets count as the targets.
        result: The run; its schemes, doses and seed are used.
        probes: Those of the run. Generated tokens belong to the spans `query`, `last` and
            `target`, like those of a target when it is scored.
        generation: Length, samples, temperature and seed.
        quiet: Draw no progress bar.

    Raises:
        InputError: The facts, the model or the probes are not those of the run.

    Note:
        Costs one forward pass over all prompts for every generated token of each sample. A drawn
        answer depends on the seed and its prompt alone, not on the batch.
    """
    one_of_type("generation", generation, Generation, "hl.Generation(tokens=24)")
    require_text(model, operation="generating answers")
    settings, name = result.settings, str(model.cfg.model_name)
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
    spans, tokenizer = spans_of(probes), model.tokenizer
    schemes = [record.scheme() for record in settings.schemes]
    prompts, _ = make_prompts(facts, schemes, settings.doses, tokenizer, seed=settings.seed)
    items, _ = make_items(
        prompts,
        tokenizer,
        context_length=int(model.cfg.n_ctx) - generation.tokens,
        vocabulary=vocabulary_of(model),
    )
    scored: Any = result.items[result.items["model"] == name]
    margins = {rule: margin(scored, rule) for rule in RULES}
    scored = scored.assign(**margins).set_index(["case_id", "scheme", "dose"])
    kept = [x for x in items if (x.fact.case_id, x.prompt.scheme, x.prompt.dose) in scored.index]
    drafts = [
        _Draft(item, i, locate(tokenizer, item.prompt) if spans else None)
        for item in kept
        for i in range(generation.samples)
    ]
    options = ReadOptions(probes=probes, spans=spans, temperature=generation.temperature)
    _write(model, drafts, options, generation, quiet=quiet)
    others = {name for fact in facts for name in (fact.target_true, fact.target_false)}
    rows = []
    for draft in drafts:
        fact, prompt = draft.item.fact, draft.item.prompt
        row: Any = scored.loc[(fact.case_id, prompt.scheme, prompt.dose)]
        rows.append(
            {
                **{name: row[name] for name in ("model", "relation_id", "subject")},
                **{"case_id": fact.case_id, "scheme": prompt.scheme, "dose": prompt.dose},
                **{"sample": draft.sample, "text": draft.text},
                "said": judge(draft.text, fact, others),
                **{
                    rule: "tie" if row[rule] == 0 else "false" if row[rule] > 0 else "true"
                    for rule in RULES
                },
            }
        )
    return AnswersResult(
        pd.DataFrame(rows, columns=list(COLUMNS)),
        AnswersSettings(scored=settings, generation=generation),
        Provenance.now(seed=generation.seed),
    )


@dataclass(slots=True)
class _Draft:
    """An answer while it is written."""

    item: Item
    sample: int
    located: LocatedPrompt | None
    """The prompt with its spans, if probes need them."""
    said: TokenIds = ()
    text: str = ""
    done: bool = False

    def prefix(self, spans: Sequence[str]) -> TokenIds:
        """Return the symbols of the prompt with what is said so far."""
        # The last step of a target made of `said` and a placeholder is read after `said`.
        target = Continuation(self.item.ids, (*self.said, 0))
        *_, (prefix, _) = steps_in_context(target, self.located, spans)
        return prefix

    def add(self, token: int, tokenizer: Any, ends: set[int | None]) -> None:
        """Add a token; the answer ends before an end token, and after its first sentence."""
        if token in ends:
            self.done = True
            return
        self.said = (*self.said, token)
        self.text = tokenizer.decode(list(self.said), skip_special_tokens=True)
        start = len(self.text) - len(self.text.lstrip())
        if end := _SENTENCE.search(self.text, start):
            self.text, self.done = self.text[: end.start()], True


def _write(
    model: HookedLanguageModel,
    drafts: Sequence[_Draft],
    options: ReadOptions,
    generation: Generation,
    *,
    quiet: bool,
) -> None:
    """Add tokens to all drafts, each sample by itself."""
    ends = end_tokens(model)
    total = generation.tokens * generation.samples
    with bar(total=total, unit="tokens", label="answers", quiet=quiet) as progress:
        for sample in range(generation.samples):
            of_sample = replace(options, draw=(generation.seed, sample))
            mine = [draft for draft in drafts if draft.sample == sample]
            for _ in range(generation.tokens):
                prefixes = {id(x): x.prefix(options.spans) for x in mine if not x.done}
                readings = read(model, dict.fromkeys(prefixes.values(), ()), of_sample)
                for draft in mine:
                    if not draft.done:
                        token = readings[prefixes[id(draft)]].top_token
                        draft.add(token, model.tokenizer, ends)
                progress.update()
