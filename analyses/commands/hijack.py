"""`hijacklens hijack`: score facts under hijacking schemes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from analyses.commands.declarations import Whole, declared, option
from analyses.commands.options import (
    ExecutionChoice,
    FactsChoice,
    FolderChoice,
    ModelChoice,
    Models,
    Probes,
    Rule,
    SchemesChoice,
    run_name,
)
from analyses.commands.screen import Output, records, say
from hijacklens.errors import InputError, number
from hijacklens.files import FolderTakenError

if TYPE_CHECKING:
    from hijacklens.scoring.continuing import Generation
    from hijacklens.scoring.result import HijackResult


NO_STORE = "there is no store, so the same command starts from scratch"
ANSWERS = "answers"
"""The folder of generated answers, in that of the scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChoice:
    """Whether and how answers are generated."""

    generate: Annotated[
        bool, option("Also generate answers and judge them: true, false, other or refused.")
    ] = False
    answer_tokens: Annotated[
        int, option("With --generate: maximum length of an answer.", type=Whole(1))
    ] = 24
    samples: Annotated[int, option("With --generate: answers to each prompt.", type=Whole(1))] = 1
    temperature: Annotated[
        float, option("With --generate: 0 takes the likeliest token; above it, draw.", metavar="T")
    ] = 0.0

    def check(self) -> None:
        """Refuse numbers that are out of range or have no effect; imports nothing large.

        Raises:
            InputError: As `Generation`, or an option needs --generate.
        """
        number("--temperature", self.temperature, least=0)
        if not self.generate and self != GenerationChoice():
            raise InputError("--answer-tokens, --samples and --temperature need --generate.")
        if self.samples > 1 and not self.temperature:
            raise InputError(
                f"--samples {self.samples} at --temperature 0 gives equal answers; give a "
                "temperature, such as --temperature 1."
            )

    def load(self, seed: int) -> Generation:
        """Return the record that the library takes."""
        from hijacklens.scoring.continuing import Generation

        return Generation(
            tokens=self.answer_tokens,
            samples=self.samples,
            temperature=self.temperature,
            seed=seed,
        )


@click.command("hijack")
@declared(
    "folder", "files", "seed", "rule", "probes", "summary", "known", "disagreement", "skipped",
    "answers", label="<models>",
)  # fmt: skip
def command(
    *,
    models: Models,
    prompts: SchemesChoice,
    probes: Probes,
    facts: FactsChoice,
    loading: ModelChoice,
    execution: ExecutionChoice,
    rule: Rule = "first",
    generating: GenerationChoice,
    folder: FolderChoice,
    output: Output,
) -> None:
    """Score how often recall of facts fails when hijacking sentences precede the query.

    Efficacy is the fraction of facts with score(false) > score(true); hijacking raises it.
    Retention is the fraction with score(true) > score(false). Scores are log-probabilities in nats.

    Writes into the folder: items.parquet (a row per fact, scheme and dose),
    prompts.parquet (the texts), summary.csv, rules.csv (how often the rules differ), skipped.csv,
    result.json (configuration and provenance), curve.svg and curve.png. With --generate, its
    folder answers/ has answers.parquet, summary.csv, agreement.csv and a figure.

    \b
    Examples:
      hijacklens hijack --model smollm2-135m --limit 100
      hijacklens hijack --model gpt2 --model google/gemma-2b --facts counterfact \\
          --scheme relation --relation P190 --doses 0-5 --out runs/twin-cities
      hijacklens hijack --model gpt2 --probe knock-out:source=last,target=hijack,layers=8-11
    """  # noqa: D301
    doses, schemes = prompts.counts, prompts.load()
    labels = [Path(name).name for name in models]
    if len(set(labels)) < len(labels):
        raise InputError(
            f"--model: two models have the same name in {labels}. Rename a folder, or score "
            "them in separate runs."
        )
    model_probes = [probe for probe in probes if probe.needs_model]
    if model_probes and len(models) > 1:
        raise InputError(
            f"--probe {model_probes[0].text!r} is made for one model; score one model at a time."
        )
    generating.check()
    if generating.generate and execution.engine != "local":
        raise InputError("--generate needs --engine local, since answers are generated here.")
    if execution.engine == "local":  # workers may have other folders and devices
        loading.check(*models)
    scored = facts.load()
    asked = {
        "models": models,
        "loading": asdict(loading),
        "facts": asdict(scored.record()),
        "schemes": [asdict(scheme.record()) for scheme in schemes],
        "doses": doses,
        "probes": [probe.text for probe in probes],
        "seed": facts.seed,
        "answers": asdict(generating),
    }
    name = run_name(*models, loading=loading, form=facts, probes=probes)
    path = folder.check(name, asked=asked)
    computed = execution.load()
    generation = generating.load(facts.seed)

    from hijacklens.results.result import staged
    from hijacklens.scoring.generation import AnswersResult, answers
    from hijacklens.scoring.hijack import hijack
    from hijacklens.scoring.result import HijackResult

    result: HijackResult | None = None
    said: list[AnswersResult] = []
    judged = None
    with _resumable(store=not execution.no_cache):
        for i, name in enumerate(models, start=1):
            model = loading.loader(name)
            if model_probes or computed.engine == "local":
                output.loading(name)
                model = model.load()
            active = [
                probe.probe(model=model, facts=scored, quiet=output.quiet) for probe in probes
            ]
            one = hijack(
                model,
                scored,
                schemes=schemes,
                doses=doses,
                probes=active,
                seed=facts.seed,
                execution=computed,
                quiet=output.quiet,
            )
            result = one if result is None else HijackResult.join([result, one])
            if models[i:] or generating.generate:
                part = _unfinished(result, asked=asked, missing=models[i:])
                part.save(path, overwrite=folder.may_replace(path, asked=asked))
            if generating.generate:
                options = {"probes": active, "generation": generation, "quiet": output.quiet}
                said.append(answers(model, scored, one, **options))
            del model  # before the next one is loaded
            if models[i:]:
                output.note(f"{labels[i - 1]} is scored; {len(models[i:])} to go")
        assert result is not None  # click requires at least one model
        if said:
            judged = AnswersResult.join(said, result)
            output.show(judged.glance(rule=rule))
        with staged(path, overwrite=folder.may_replace(path, asked=asked)) as place:
            if judged:
                judged.save(place / ANSWERS)
            result.save(place)
    output.show_saved(
        path,
        result.glance(rule=rule),
        answers=records(judged.summary()) if judged else None,
        seed=facts.seed,
        rule=rule,
        probes=list(result.settings.probes),
        summary=records(result.summary(rule=rule)),
        known=result.known_facts(),
        disagreement=result.total_disagreement(),
        skipped=records(result.skipped),
    )


def _unfinished(
    result: HijackResult, *, asked: Mapping[str, Any], missing: Sequence[str]
) -> HijackResult:
    """Return a result of the models that are scored, with a note of what is missing.

    With that note, a command that asks for the same resumes and may write into the folder again.
    """
    note = {"asked": asked, "missing": list(missing)}
    return replace(result, settings=replace(result.settings, unfinished=note))


@contextmanager
def _resumable(*, store: bool) -> Iterator[None]:
    """Run the body; if it is cut short, say what the same command will do next time.

    Raises:
        InputError: Another command has put its result into the folder meanwhile.
    """
    from hijacklens.store.contents import chosen_store
    from hijacklens.store.database import StoreOffWarning

    lost = [] if chosen_store(store) else [NO_STORE]
    with warnings.catch_warnings():
        warnings.simplefilter("default", StoreOffWarning)
        show = warnings.showwarning

        def watch(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, StoreOffWarning):
                lost.append("the same command computes again what the store lacks")
            show(message, category, *where, **more)

        warnings.showwarning = watch
        try:
            yield
        except (KeyboardInterrupt, OSError):
            kept = "finished readings are kept; the same command resumes from there"
            say(f"note: {lost[0] if lost else kept}.")
            raise
        except FolderTakenError as error:
            kept = "" if lost else " Readings are stored: with another --out it finishes soon."
            raise InputError(f"{error} It came while this command ran.{kept}") from error
