"""The comparison of defences as a result: what each undoes, what it costs, and which ones help."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analyses.defence.decoding import PLACEBO
from analyses.defence.evaluation import Bench, Made, chosen, split, tuned
from analyses.defence.measures import COSTS, HALF, HELPFUL, LIMIT, measures, verdicts
from analyses.defence.methods import Method, named
from hijacklens import plots
from hijacklens.errors import InputError, one_of_type, whole_number
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.models.identity import ModelIdentity
from hijacklens.progress import bar
from hijacklens.prompts.prompt import DOSE, MOST_SENTENCES
from hijacklens.prompts.schemes import Scheme, SchemeRecord, get_scheme, get_schemes
from hijacklens.results.exhibits import Drawing, Exhibit, Table
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring.execution import Execution, LocalModel
from hijacklens.scoring.items import SkippedTable, skipped_table
from hijacklens.scoring.result import FactsRecord
from hijacklens.statistics import independent

COLUMNS = (
    *("model", "scheme", "method", "undone", "undone_low", "undone_high", "bare_retention"),
    *("bare_retention_change", "helpful_change", "neutral_nats", "tokens_ratio", "p"),
    *("p_corrected", "n", "relations"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How methods are tuned and tested."""

    tune_scheme: str | Scheme = "think"
    """The scheme under which methods learn and are tuned; it is not tested."""
    tuning: int = 60
    """Maximum number of facts that methods learn from, and of those that validate settings."""
    dose: int = 1
    """How many sentences precede the query."""
    seed: int = 0
    """Seeds the split, the placebos and what schemes draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefenceSettings:
    """The settings of a comparison of defences."""

    models: tuple[ModelIdentity, ...]
    facts: FactsRecord
    schemes: tuple[SchemeRecord, ...]
    tune_scheme: SchemeRecord
    dose: int
    seed: int
    relations: Mapping[str, tuple[str, ...]]
    """The relations of the `tuning`, `validation` and `held_out` facts."""
    methods: Mapping[str, Mapping[str, str]]
    """Method -> its `source`, what it `changes`, and what it `needs` to know."""
    tuning: int | None = None
    """At most this many facts tune, and as many validate; None in results of earlier versions."""


@dataclass(frozen=True, eq=False)
class DefenceResult(Result):
    """Defences against the hijack, compared on relations and schemes that are new to them.

    Every number is about held-out facts, by the rule `first`; intervals and p-values are clustered
    by relation, or about these facts if they have one relation.
    """

    items: pd.DataFrame
    """A row per model, method, scheme, dose and fact: scores in nats and forward tokens."""
    neutral: Annotated[pd.DataFrame, Stored("neutral.csv")]
    """A row per model, method and neutral passage: its log-likelihood in nats."""
    tuning: Annotated[pd.DataFrame, Stored("tuning.csv")]
    """A row per model, method and setting, on the validation facts; `chosen` says which is used."""
    skipped: SkippedTable
    settings: DefenceSettings
    provenance: Provenance
    figures: ClassVar = {"pareto": {}}
    derived: ClassVar = {"defences.csv": "defences", "costs.csv": "costs", "verdict.csv": "verdict"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return the table of defences."""
        return self.defences.copy()

    @cached_property
    def _measures(self) -> Any:
        tables = []
        names = [scheme.name for scheme in self.settings.schemes]
        for model, items in self.items.groupby("model", sort=False):
            texts: Any = self.neutral[self.neutral["model"] == model].groupby("method")
            each = texts["nats"].sum() / texts["tokens"].sum()
            table = measures(items, names).assign(model=model)
            table["neutral_nats"] = table["method"].map(each - each["nothing"])
            tables.append(table)
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def defences(self) -> pd.DataFrame:
        """A row per model, scheme and method, with the columns `COLUMNS`.

        `undone` is the fraction of the rise in efficacy that the method undoes. `helpful_change` is
        the lesser of two changes of retention, which `costs` has, and missing if one of them is.
        `neutral_nats` is the change of the log-likelihood of neutral text per token. `p` compares
        with the placebo of the method; `p_corrected` is Holm's over the methods of a model and
        scheme.
        """
        return self._measures[[*COLUMNS]]

    @cached_property
    def costs(self) -> pd.DataFrame:
        """A row per model and method: the changes `COSTS` with their intervals."""
        of = [f"{name}{end}" for name in COSTS for end in ("", "_low", "_high", "_n")]
        rows = self._measures.drop_duplicates(["model", "method"])
        return rows[["model", "method", *of, "neutral_nats"]].reset_index(drop=True)

    @cached_property
    def verdict(self) -> pd.DataFrame:
        """Which methods help under every scheme (`analyses.defence.measures.verdicts`)."""
        return verdicts(self._measures)

    def plot(self) -> Figure:
        """Draw the fraction undone against the largest loss: a panel per model and scheme.

        A hollow point is the placebo of the method that a line joins it to. Bars are 95% intervals
        of the fraction undone. The shaded corner has what undoes at least half at a loss of at most
        `LIMIT`; the grey steps join the methods that no other beats in both. Methods whose loss
        could not be measured are left out.
        """
        table = self.defences[self.defences["method"] != "nothing"]
        cells: Any = list(table.groupby(["model", "scheme"], sort=False))
        with plots.panels(len(cells), height=3.4) as (figure, axes):
            for ax, ((model, scheme), part) in zip(axes, cells, strict=True):
                _pareto(ax, part)
                ax.set_title(plots.escape(f"{model}, {scheme}"), fontsize=9)
            plots.label_outer(
                axes,
                x=f"largest loss of retention\n(log scale above {LIMIT:g})",
                y="fraction of the rise\nin efficacy undone",
            )
            about = independent(self.items["relation_id"])[1]
            bars = f"95% intervals, {about}; hollow: the placebo of a method"
            plots.legend_below(figure, axes, columns=5, bars=bars)
        return figure

    def exhibits(self) -> list[Exhibit]:
        """The figure, the verdict, and the tables of defences, costs and tuning."""
        return [
            Drawing("Undone against harm", self.plot()),
            Table("Verdict", self.verdict, file="verdict.csv", filters=("model",)),
            Table(
                "Defences", self.defences, file="defences.csv",
                filters=("model", "scheme", "method"),
            ),
            Table("Costs", self.costs, file="costs.csv", filters=("model", "method"), folded=True),
            Table("Tuning", self.tuning, filters=("model", "method"), folded=True),
        ]  # fmt: skip

    def findings(self) -> dict[str, Any]:
        """Return the methods that help, by model."""
        found = self.verdict[self.verdict["helps"]]
        return {"helps": {str(m): list(part["method"]) for m, part in found.groupby("model")}}

    def glance(self) -> Glance:
        """What each method undoes and costs, and which ones help."""
        forms = {
            "method": "{method}",
            "undone": "{undone:fraction} [{undone_low:fraction}, {undone_high:fraction}]",
            "placebo": "{placebo:fraction}",
            "bare": "{bare_retention_change:signed}", "helpful": "{helpful_change:signed}",
            "neutral": "{neutral_nats:signed}", "tokens": "{tokens_ratio:.2f}",
            "p": "{p_corrected:fraction}",
        }  # fmt: skip
        rows = self._measures[~self._measures["method"].str.startswith(PLACEBO)]
        cells: Any = rows.groupby(["model", "scheme"], sort=False)
        grids = tuple(
            Grid.of(part, forms, title=_title(model, scheme, part.iloc[0]))
            for (model, scheme), part in cells
        )
        return Glance(
            f"{self.settings.facts.title} · defences on "
            f"{len(self.settings.relations['held_out'])} relations new to them",
            grids,
            tuple(self._sentences()),
            steps=("defences", "costs", "verdict", "tuning", "plot()"),
        )

    def _sentences(self) -> Iterable[str]:
        goal = f"at least half at a loss of at most {LIMIT:.2f} under every scheme"
        for model, part in self.verdict.groupby("model", sort=False):
            # What is measured depends on the facts alone, so it is the same for all methods.
            missing, best = part["unmeasured"].iloc[0], part.iloc[0]
            able = part.loc[part["fails"].isin(["", "placebo"]), "method"]
            helping = part.loc[part["fails"] == "", "method"]
            if missing and len(helping):
                yield f"{model}: whether {_named(helping, 'help')} cannot be judged"
            elif missing:
                yield f"{model}: no method helps, by what could be measured"
            elif len(helping):
                yield f"{model}: {_named(helping, 'undo')} {goal}"
            elif len(able):
                yield (
                    f"{model}: {_named(able, 'undo')} {goal}, but none undoes significantly more "
                    "than a placebo"
                )
            else:
                yield (
                    f"{model}: no method undoes {goal}; nearest is {best['method']}: over the "
                    f"schemes it undoes {best['undone']:.2f} at worst and loses at most "
                    f"{best['loss']:.2f}"
                )
            if missing:
                yield f"{model}: too few facts, or no rise, to measure {missing}"
            if "answers" in missing:
                yield (
                    "answers need facts that the model does not know, of relations that have a "
                    f"sentence of {HELPFUL[-1]}: give more of them"
                )
        tuning = self.tuning
        if "answers_n" in tuning:  # results of earlier versions lack it
            for model in tuning.loc[tuning["answers"].isna(), "model"].unique():
                yield f"{model}: no setting was chosen by answers, as too few facts validate them"


def _title(model: str, scheme: str, row: Any) -> str:
    return f"{model} · {scheme}, {row['n']} facts (answers: {row['answers_n']})"


def _named(methods: Iterable[str], verb: str) -> str:
    """Return methods with their verb in the present tense."""
    *others, last = methods
    ending = "es" if verb.endswith("o") else "s"
    return f"{', '.join(others)} and {last} {verb}" if others else f"{last} {verb}{ending}"


def defend(
    models: HookedLanguageModel | Sequence[HookedLanguageModel],
    facts: FactSet,
    *,
    schemes: str | Scheme | Sequence[str | Scheme] = ("do-not-think",),
    methods: Sequence[str | Method] = (),
    protocol: Protocol = Protocol(),
    execution: Execution = Execution(),
    quiet: bool = False,
) -> DefenceResult:
    """Compare methods against the hijack: what they undo, and what they cost.

    Args:
        models: One or several hooked language models.
        facts: Facts of at least three relations, preferably 500 or more.
        schemes: The schemes under which methods are tested.
        methods: Names, `Method`s or `mine.py:Method`; all by default. The baselines `nothing` and
            `oracle` are always run.
        protocol: How methods are tuned and tested.
        execution: The store, sharing and batch size; the engine must be local.
        quiet: Draw no progress bar.

    Raises:
        InputError: Too few relations, an unknown method or scheme, a scheme that is repeated, also
            tuned on, or measures a cost, an engine with workers, or a method that does not fit a
            model.

    Note:
        Costs about as many runs over all prompts as there are methods and placebos, and one per
        setting over the validation facts. Interrupted, it resumes from the store, except for
        decoding methods and what methods learn besides heads.
    """
    one_of_type("facts", facts, FactSet, "hl.atlas()")
    whole_number(DOSE, protocol.dose, least=1, most=MOST_SENTENCES)
    seed = whole_number("seed", protocol.seed)
    tested, scheme = check_schemes(schemes, protocol.tune_scheme)
    if execution.engine != "local":
        raise InputError("a comparison of defences needs the engine 'local'.")
    listed: list[Any] = list(models) if isinstance(models, (list, tuple)) else [models]
    used, parts = named(methods), split(facts, most=protocol.tuning, seed=seed)
    tried = sum(len(method.settings) for method in used if len(method.settings) > 1)
    total = len(listed) * (tried + 1 + len(used) + sum(x.placebo is not None for x in used))
    benches: dict[str, Bench] = {}
    with bar(total, unit="runs", label="defences", quiet=quiet) as progress:
        for model in listed:
            with execution.running(model) as run:
                assert isinstance(run, LocalModel)
                bench = Bench(model, run, parts, protocol.dose, seed, scheme, execution)
                if benches.setdefault(run.identity.name, bench) is not bench:
                    raise InputError(f"two models are called {run.identity.name}; rename one.")
        tables = [tuned(x, used, progress.update).assign(model=n) for n, x in benches.items()]
        tuning = chosen(pd.concat(tables, ignore_index=True), used)
        items, neutral = [], []
        for name, bench in benches.items():
            made = _made(bench, used, tuning[tuning["chosen"] & (tuning["model"] == name)])
            schemes_of = [*tested, *HELPFUL]
            found = bench.scores(parts["held_out"], schemes_of, made, progress.update)
            items.append(found.assign(model=name))
            neutral.append(bench.neutral(made).assign(model=name))
    written = {(x.name, i): json.dumps(s) for x in used for i, s in enumerate(x.settings)}
    pairs = zip(tuning["method"], tuning["setting"], strict=True)
    tuning["setting"] = [written[pair] for pair in pairs]
    skipped = [skipped_table(bench.skipped, name) for name, bench in benches.items()]
    return DefenceResult(
        items=pd.concat(items, ignore_index=True),
        neutral=pd.concat(neutral, ignore_index=True),
        tuning=tuning,
        skipped=pd.concat(skipped).drop_duplicates(ignore_index=True),
        settings=DefenceSettings(
            models=tuple(bench.run.identity for bench in benches.values()),
            facts=facts.record(),
            schemes=tuple(each.record() for each in tested),
            tune_scheme=scheme.record(),
            dose=protocol.dose,
            seed=seed,
            tuning=protocol.tuning,
            relations={name: tuple(part.relations()) for name, part in parts.items()},
            methods={
                x.name: {"source": x.source, "changes": x.changes, "needs": x.needs} for x in used
            },
        ),
        provenance=Provenance.now(seed=seed),
    )


def check_schemes(
    schemes: str | Scheme | Sequence[str | Scheme], tune_scheme: str | Scheme
) -> tuple[list[Scheme], Scheme]:
    """Return the schemes that are tested, and the one that methods are tuned on.

    Raises:
        InputError: As `get_schemes`, or a scheme has two uses.
    """
    tested, tuned_on = get_schemes(schemes), get_scheme(tune_scheme)
    uses = {tuned_on.name: "tuned on"} | dict.fromkeys(HELPFUL, "a measure of costs")
    if tuned_on.name in HELPFUL:
        raise InputError(
            f"the scheme {tuned_on.name} is a measure of costs, so methods cannot be tuned on it; "
            "choose another one, such as 'think'."
        )
    for each in tested:
        if each.name in uses:
            raise InputError(
                f"the scheme {each.name} is {uses[each.name]}, so methods cannot be tested on it; "
                "leave it out, or choose another scheme to tune on."
            )
    return tested, tuned_on


def _made(bench: Bench, used: Sequence[Method], tuning: Any) -> dict[str, Made]:
    """Return what each method and its placebo change under the setting that was chosen."""
    best, made = dict(zip(tuning["method"], tuning["setting"], strict=True)), {}
    for method in used:
        setting = method.settings[best.get(method.name, 0)]
        made[method.name] = (method, bench.make(method, setting))
        if method.placebo is not None:
            what = bench.make(method, setting, placebo=True)
            made[f"{PLACEBO}{method.name}"] = (method, what)
    return made


def _pareto(ax: Any, part: Any) -> None:
    changes = part[["bare_retention_change", "helpful_change"]]
    # A point whose loss is not measured has no place.
    loss = -changes.min(axis=1, skipna=False).clip(upper=0)
    if loss.isna().all():
        ax.text(0.5, 0.5, "loss not measured", ha="center", transform=ax.transAxes)
    part = part.assign(loss=loss).sort_values(["loss", "undone"], ascending=[True, False])
    ax.fill_between([-LIMIT / 2, LIMIT], HALF, 1.1, color="#dddddd", linewidth=0)
    ax.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
    placebo = part["method"].str.startswith(PLACEBO)
    rows, points = part[~placebo], part.set_index("method")
    front = rows[rows["undone"] > rows["undone"].cummax().shift(fill_value=-np.inf)]
    ax.step(front["loss"], front["undone"], where="post", color="#888888", linewidth=1)
    for i, method in enumerate(rows.sort_index()["method"]):
        point, (colour, marker) = points.loc[method], plots.series(i)
        ends = np.abs([[point["undone"] - point[f"undone_{end}"]] for end in ("low", "high")])
        style = {"color": colour, "marker": marker, "markersize": 4.5, "elinewidth": 0.7}
        label = plots.escape(method)
        ax.errorbar(
            point["loss"], point["undone"], yerr=ends, linestyle="none", label=label, **style
        )
        if (name := f"{PLACEBO}{method}") in points.index:
            other, style = points.loc[name], {"color": colour, "linewidth": 0.7, "alpha": 0.6}
            ax.plot([point["loss"], other["loss"]], [point["undone"], other["undone"]], **style)
            ax.plot(other["loss"], other["undone"], marker, mfc="white", mec=colour, markersize=3.5)
    # Far intervals would leave no scale for the points; nothing is undone if nothing rose.
    undone = points["undone"]
    ax.set_ylim(np.fmin(0.0, undone.min()) - 0.2, np.fmax(1.2, undone.max() + 0.1))
    # Linear up to the limit and logarithmic above it, since most methods lose little.
    ax.set_xscale("symlog", linthresh=LIMIT, linscale=0.6)
    ax.set_xlim(-LIMIT / 2, 1.2)
    ax.set_xticks([0, LIMIT, 0.1, 1], ["0", f"{LIMIT:g}", "0.1", "1"])
