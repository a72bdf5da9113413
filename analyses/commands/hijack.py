"""`hijacklens hijack`: the main job on the command line."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import click

from analyses.options import (
    choose_engine,
    choose_facts,
    engine_options,
    facts_options,
    model_options,
    models_option,
    probes_option,
    read_doses,
    read_template,
)
from analyses.resumption import is_unfinished, resumable, save_part
from hijacklens.errors import InputError


@click.command("hijack")
@models_option
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    metavar="S",
    help="A scheme (`hijacklens schemes`). Repeatable.  [default: do-not-think]",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="NAME=TEXT",
    help="A scheme of your own: 'never-say=Never say {target_false}.' Repeatable.",
)
@click.option(
    "--doses",
    default="0-5",
    show_default=True,
    help="How many sentences stand before the query: a range or a list. 0 is always scored.",
)
@probes_option
@facts_options
@model_options
@click.option(
    "--batch-tokens",
    type=int,
    metavar="N",
    help="Tokens in a batch, padding included; smaller needs less memory.",
)
@click.option(
    "--way",
    type=click.Choice(["auto", "plain", "packed", "cached"]),
    default="auto",
    show_default=True,
    help="How prompts share what they have in common; auto takes the cheapest.",
)
@engine_options
@click.option(
    "--rule",
    type=click.Choice(["first", "sum", "mean"]),
    default="first",
    show_default=True,
    help="The rule of the printed table; the files hold all three.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the files.  [default: runs/<date>-<models>]",
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="Compute all anew: do not use the store of finished readings (`hijacklens cache`).",
)
@click.option("--overwrite", is_flag=True, help="Replace a result that is in the folder.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
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
    way: Any,
    engine: str,
    workers: int | None,
    ray_address: str | None,
    rule: Any,
    out: Path | None,
    no_cache: bool,
    overwrite: bool,
    quiet: bool,
    **loading: Any,
) -> None:
    """Score how far recall of facts gives way as hijacking sentences are put before the query.

    Efficacy is the share of facts with score(false) > score(true), which hijacking raises;
    retention the share with score(true) > score(false). Scores are log-probabilities in nats.

    \b
    Writes into the folder: items.parquet (a row per fact, scheme and dose),
    prompts.parquet (their texts), summary.csv, rules.csv (how often the rules differ), skipped.csv,
    result.json (configuration and provenance), curve.svg and curve.png.

    \b
    Examples:
      hijacklens hijack --model smollm2-135m --limit 100
      hijacklens hijack --model gpt2 --model google/gemma-2b --facts counterfact \\
          --scheme relation --relation P190 --doses 0-5 --out runs/twin-cities
      hijacklens hijack --model gpt2 --probe knock-out:layers=8-11,from=last,to=hijack
    """  # noqa: D301
    from hijacklens.results import check_folder
    from hijacklens.schemes import Scheme, get_scheme
    from hijacklens.schemes import schemes as registered
    from probes.specification import parse

    counts = read_doses(doses)
    own = [Scheme(name=name, template=text) for name, text in map(read_template, templates)]
    for scheme in own:
        if scheme.name in registered():
            raise InputError(f"--template: scheme {scheme.name!r} exists; choose another name.")
    chosen = [get_scheme(name) for name in schemes] + own
    chosen = chosen or [get_scheme("do-not-think")]
    facts = choose_facts(source, relations, cases, limit, seed)
    labels = [Path(name).name for name in models]
    if len(set(labels)) < len(labels):
        raise InputError(f"--model: two models would both be called by one of {labels}.")
    specified = [parse(text) for text in probes]
    for probe in specified:
        if probe.needs_model and len(models) > 1:
            raise InputError(
                f"--probe {probe.text!r} is made for one model; score one model at a time."
            )
    where = choose_engine(engine, workers, ray_address)
    names = "-".join(labels)
    folder = out or Path("runs") / f"{date.today()}-{names}"
    folder = check_folder(folder, overwrite=overwrite or is_unfinished(folder, models))

    from analyses.tables import hijack_tables
    from hijacklens.scoring.hijack import hijack
    from hijacklens.scoring.replica import ModelLoader
    from hijacklens.scoring.result import HijackResult

    if facts.note:
        click.echo(f"note: {facts.name}: {facts.note}", err=True)
    result: HijackResult | None = None
    for i, name in enumerate(models, start=1):
        with resumable(store=not no_cache):
            model: Any = ModelLoader(name, **loading)
            if where == "local" or any(probe.needs_model for probe in specified):
                model = model.load()
            one = hijack(
                model,
                facts,
                schemes=chosen,
                doses=counts,
                probes=[probe.probe(model=model, facts=facts) for probe in specified],
                seed=seed,
                batch_tokens=batch_tokens,
                way=way,
                store=not no_cache,
                engine=where,
                quiet=quiet,
            )
        del model  # before the next one is loaded
        result = one if result is None else HijackResult.join([result, one])
        # What is done is kept if a later model fails.
        save_part(result, folder, asked=models, missing=models[i:])
    assert result is not None  # click requires at least one model
    for key in result.settings["probes"]:
        click.echo(f"probe: {key}")
    click.echo(hijack_tables(result, rule=rule))
    click.echo()
    click.echo(_notes(result))
    click.echo(f"written to {folder}/  ({', '.join([*result.files(), *result.figure_names])})")


def _notes(result: Any) -> str:
    """What came from the store, what is known at dose 0, how rules differ, what was skipped."""
    from hijacklens.scoring.accounting import summary

    lines = []
    for model in result.settings["models"]:
        counts = model["readings"]
        if counts["from_store"]:
            lines.append(
                f"{model['name']}: {counts['from_store']:,} readings came from the store, "
                f"{counts['computed']:,} were computed (--no-cache computes all anew)"
            )
        lines.append(f"{model['name']}: {summary(model['engine'])}")
    known = result.known()
    first = known.drop_duplicates(["model", "rule"])
    for model, group in first.groupby("model", sort=False):
        counts = ", ".join(f"{row.known} ({row.rule})" for row in group.itertuples())
        lines.append(f"{model} knows {counts} of {group['n'].iloc[0]} facts on the bare query")
    differ = result.disagreement()["any"].mean()
    collisions = len(result.configuration()["same_first_token"])
    lines.append(
        f"verdicts differ between the rules on {differ:.1%} of the items; in {collisions} facts "
        "both targets share their first token (a tie under rule first)"
    )
    if len(result.skipped):
        reason = result.skipped["reason"].iloc[0]
        pairs = len(result.skipped)
        lines.append(f"skipped: {pairs} pairs of fact and scheme (skipped.csv); first: {reason}")
    return "\n".join(lines)
