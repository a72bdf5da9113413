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

    from analyses.commands.screen import hijack_tables
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
            probes=list(result.settings["probes"]),
            summary=records(result.summary(rule=rule)),
            known=_known(result),
            disagreement=_disagreement(result),
            skipped=records(result.skipped),
        )
        return
    for key in result.settings["probes"]:
        click.echo(f"probe: {key}")
    click.echo(f"{hijack_tables(result, rule=rule)}\n\n{_notes(result)}")
    click.echo(files_written(folder, written))


def _known(result: HijackResult) -> list[dict[str, Any]]:
    """How many facts each model knows on the bare query, each fact once, by rule.

    A fact that one scheme skips is counted where another one scores it.
    """
    from hijacklens.scoring.efficacy import RULES, margin

    bare = result.items.loc[result.items["dose"] == 0]
    facts = bare.drop_duplicates(["model", "case_id"])
    found = []
    for model, of in facts.groupby("model", sort=False):
        known = {rule: int((margin(of, rule) < 0).sum()) for rule in RULES}
        found.append({"model": model, "n": len(of), **known})
    return found


def _disagreement(result: HijackResult) -> float:
    """The share of all items on which the rules do not all give the same verdict."""
    groups = result.disagreement()
    return float((groups["any"] * groups["n"]).sum() / groups["n"].sum())


def _notes(result: HijackResult) -> str:
    """Seed, what came from the store, what is known, how rules differ, what was skipped."""
    from hijacklens.engine.accounting import summary
    from hijacklens.scoring.efficacy import RULES

    lines = [
        "[low, high]: 95% Wilson interval over the facts; mean shift: nats, to the false target",
        f"seed {result.settings['seed']}, for what is drawn: facts of --limit, random sentences",
    ]
    for model in result.settings["models"]:
        counts = model["readings"]
        if counts["from_store"]:
            lines.append(
                f"{model['name']}: {counts['from_store']:,} readings came from the store, "
                f"{counts['computed']:,} were computed (--no-cache computes all anew)"
            )
        lines.append(f"{model['name']}: {summary(model['engine'])}")
    for row in _known(result):
        counts = ", ".join(f"{row[rule]} ({rule})" for rule in RULES)
        lines.append(f"{row['model']} knows {counts} of {row['n']} facts on the bare query")
    differ = _disagreement(result)
    collisions = len(result.configuration()["same_first_token"])
    lines.append(
        f"rules first, sum and mean do not all agree on {differ:.1%} of the verdicts (rules.csv); "
        f"in {collisions} facts both targets begin with the same token, a tie under rule first"
    )
    if len(result.skipped):
        reason = result.skipped["reason"].iloc[0]
        pairs = len(result.skipped)
        lines.append(f"skipped: {pairs} pairs of fact and scheme (skipped.csv); first: {reason}")
    return "\n".join(lines)
