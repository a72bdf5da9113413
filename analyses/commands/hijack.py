"""`hijacklens hijack`: score facts under hijacking schemes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from analyses.commands.options import (
    ExecutionChoice,
    FactsChoice,
    FolderChoice,
    ModelChoice,
    SchemesChoice,
    execution_options,
    facts_options,
    folder_options,
    model_options,
    models_option,
    probes_option,
    rule_option,
    schemes_options,
)
from analyses.commands.resumption import resumable, save_part
from analyses.commands.screen import Output, files_in, files_written, output_options, records
from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.scoring.result import HijackResult
    from probes.specification import Specification


@click.command("hijack")
@models_option
@schemes_options
@probes_option
@facts_options
@model_options
@execution_options
@rule_option
@folder_options("<models>")
@output_options(
    "folder", "files", "seed", "rule", "probes", "summary", "known", "disagreement", "skipped"
)
def command(
    models: tuple[str, ...],
    prompts: SchemesChoice,
    probes: list[Specification],
    facts: FactsChoice,
    loading: ModelChoice,
    execution: ExecutionChoice,
    rule: Any,
    folder: FolderChoice,
    output: Output,
) -> None:
    """Score how often recall of facts fails when hijacking sentences precede the query.

    Efficacy is the fraction of facts with score(false) > score(true); hijacking raises it.
    Retention is the fraction with score(true) > score(false). Scores are log-probabilities in nats.

    Writes into the folder: items.parquet (a row per fact, scheme and dose),
    prompts.parquet (the texts), summary.csv, rules.csv (how often the rules differ), skipped.csv,
    result.json (configuration and provenance), curve.svg and curve.png.

    \b
    Examples:
      hijacklens hijack --model smollm2-135m --limit 100
      hijacklens hijack --model gpt2 --model google/gemma-2b --facts counterfact \\
          --scheme relation --relation P190 --doses 0-5 --out runs/twin-cities
      hijacklens hijack --model gpt2 --probe knock-out:source=last,target=hijack,layers=8-11
    """  # noqa: D301
    doses, schemes = prompts.counts, prompts.load()
    scored = facts.load()
    labels = [Path(name).name for name in models]
    if len(set(labels)) < len(labels):
        raise InputError(
            f"--model: two models have the same name in {labels}; score them in separate runs."
        )
    model_probes = [probe for probe in probes if probe.needs_model]
    if model_probes and len(models) > 1:
        raise InputError(
            f"--probe {model_probes[0].text!r} is made for one model; score one model at a time."
        )
    computed = execution.load()
    path = folder.check("-".join(labels), models=models)

    from hijacklens.scoring.hijack import hijack
    from hijacklens.scoring.result import HijackResult

    if scored.note:
        output.note(f"{scored.name}: {scored.note}")
    result: HijackResult | None = None
    for i, name in enumerate(models, start=1):
        with resumable(store=not execution.no_cache):
            model = loading.loader(name)
            if model_probes or computed.engine == "local":
                output.loading(name)
                model = model.load()
            one = hijack(
                model,
                scored,
                schemes=schemes,
                doses=doses,
                probes=[
                    probe.probe(model=model, facts=scored, quiet=output.quiet) for probe in probes
                ],
                seed=facts.seed,
                execution=computed,
                quiet=output.quiet,
            )
        del model  # before the next one is loaded
        result = one if result is None else HijackResult.join([result, one])
        # Finished models are kept if a later one fails.
        save_part(result, path, requested=models, missing=models[i:])
        if models[i:]:
            output.note(f"{labels[i - 1]} is scored; {len(models[i:])} to go")
    assert result is not None  # click requires at least one model
    written = files_in(path)
    output.show(
        result.glance(rule=rule),
        files_written(path, written),
        folder=str(path),
        files=written,
        seed=facts.seed,
        rule=rule,
        probes=list(result.settings.probes),
        summary=records(result.summary(rule=rule)),
        known=result.known_facts(),
        disagreement=result.total_disagreement(),
        skipped=records(result.skipped),
    )
