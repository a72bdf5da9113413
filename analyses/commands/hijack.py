"""`hijacklens hijack`: the main job on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from analyses.commands.options import (
    batch_tokens_option,
    choose_engine,
    choose_schemes,
    engine_options,
    facts_options,
    make_probes,
    model_options,
    models_option,
    no_cache_option,
    overwrite_option,
    probes_option,
    read_probes,
    rule_option,
    schemes_options,
    sharing_option,
)
from analyses.commands.resumption import is_unfinished, resumable, save_part, usual_folder
from analyses.commands.screen import (
    document,
    files_written,
    note,
    output_options,
    records,
    say_loading,
    show,
)
from analyses.texts import choose_facts, read_doses
from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.scoring.result import HijackResult


@click.command("hijack")
@models_option
@schemes_options
@probes_option
@facts_options
@model_options
@batch_tokens_option
@sharing_option
@engine_options
@rule_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the files.  [default: runs/<date>-<models>, then -2, ...]",
)
@no_cache_option
@overwrite_option
@output_options(
    "folder", "files", "seed", "rule", "probes", "summary", "known", "disagreement", "skipped"
)
def command(
    models: tuple[str, ...],
    schemes: tuple[str, ...],
    templates: tuple[str, ...],
    doses: str,
    probes: tuple[str, ...],
    source: str,
    relations: tuple[str, ...],
    cases: tuple[int, ...],
    limit: int | None,
    seed: int,
    batch_tokens: int | None,
    sharing: Any,
    engine: str,
    workers: int | None,
    ray_address: str | None,
    rule: Any,
    out: Path | None,
    no_cache: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Score how far recall of facts gives way as hijacking sentences are put before the query.

    Efficacy is the share of facts with score(false) > score(true), which hijacking raises;
    retention the share with score(true) > score(false). Scores are log-probabilities in nats.

    Writes into the folder: items.parquet (a row per fact, scheme and dose),
    prompts.parquet (their texts), summary.csv, rules.csv (how often the rules differ), skipped.csv,
    result.json (configuration and provenance), curve.svg and curve.png.

    \b
    Examples:
      hijacklens hijack --model smollm2-135m --limit 100
      hijacklens hijack --model gpt2 --model google/gemma-2b --facts counterfact \\
          --scheme relation --relation P190 --doses 0-5 --out runs/twin-cities
      hijacklens hijack --model gpt2 --probe knock-out:source=last,target=hijack,layers=8-11
    """  # noqa: D301
    from hijacklens.files import check_folder

    counts = read_doses(doses)
    chosen = choose_schemes(schemes, templates)
    facts = choose_facts(source, relations, cases, limit, seed)
    labels = [Path(name).name for name in models]
    if len(set(labels)) < len(labels):
        raise InputError(f"--model: two models would both be called by one of {labels}.")
    specified = read_probes(probes)
    for probe in specified:
        if probe.needs_model and len(models) > 1:
            raise InputError(
                f"--probe {probe.text!r} is made for one model; score one model at a time."
            )
    where = choose_engine(engine, workers, ray_address)
    folder = out or usual_folder("-".join(labels), overwrite=overwrite, models=models)
    folder = check_folder(folder, overwrite=overwrite or is_unfinished(folder, models))

    from hijacklens.scoring.execution import Execution
    from hijacklens.scoring.hijack import hijack
    from hijacklens.scoring.result import HijackResult
    from hijacklens.workers.replica import ModelLoader

    if facts.note:
        note(f"{facts.name}: {facts.note}", quiet=quiet)
    execution = Execution(
        sharing=sharing, engine=where, store=not no_cache, batch_tokens=batch_tokens
    )
    result: HijackResult | None = None
    for i, name in enumerate(models, start=1):
        with resumable(store=not no_cache):
            model: Any = ModelLoader(name, **loading)
            if where == "local" or any(probe.needs_model for probe in specified):
                say_loading(name, quiet=quiet)
                model = model.load()
            one = hijack(
                model,
                facts,
                schemes=chosen,
                doses=counts,
                probes=make_probes(specified, model, facts, quiet=quiet),
                seed=seed,
                execution=execution,
                quiet=quiet,
            )
        del model  # before the next one is loaded
        result = one if result is None else HijackResult.join([result, one])
        # What is done is kept if a later model fails.
        save_part(result, folder, asked=models, missing=models[i:])
        if models[i:]:
            note(f"{labels[i - 1]} is scored; {len(models[i:])} to go", quiet=quiet)
    assert result is not None  # click requires at least one model
    written = [*result.files(), "result.json", *result.figure_names]
    if as_json:
        document(
            folder=str(folder),
            files=written,
            seed=seed,
            rule=rule,
            probes=list(result.settings.probes),
            summary=records(result.summary(rule=rule)),
            known=result.known_facts(),
            disagreement=result.total_disagreement(),
            skipped=records(result.skipped),
        )
        return
    show(result.glance(rule=rule), files_written(folder, written))
