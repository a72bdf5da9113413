"""`hijacklens defend`: compare methods that bring recall back, with all their costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import click

from analyses.commands.declarations import Whole, declared, option
from analyses.commands.names import methods as method_names
from analyses.commands.options import (
    ExecutionChoice,
    FactsChoice,
    FolderChoice,
    ModelChoice,
    Models,
    SchemesChoice,
    run_name,
    scheme_option,
)
from analyses.commands.screen import Output, records
from analyses.texts import method_table, read_method
from hijacklens.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class TestedSchemes(SchemesChoice):
    """Schemes and one dose."""

    doses: Annotated[str, option("How many sentences precede the query.", "--dose")] = "1"


@click.command("defend")
@declared(
    "folder",
    "files",
    "seed",
    "defences",
    "costs",
    "verdict",
    "tuning",
    label="defend-<models>",
)
def command(
    *,
    models: Models,
    prompts: TestedSchemes,
    facts: FactsChoice,
    methods: Annotated[
        tuple[str, ...],
        option(
            "A method, or one of your own as mine.py:Method. Repeatable.  [default: all]",
            "--method",
            metavar="NAME",
            shell_complete=method_names,
        ),
    ] = (),
    tune_scheme: Annotated[
        str, scheme_option("The scheme that methods are tuned on; it is not tested.")
    ] = "think",
    tuning: Annotated[
        int,
        option(
            "Facts at most that methods learn from, and that choose their settings.",
            metavar="N",
            type=Whole(1),
        ),
    ] = 60,
    loading: ModelChoice,
    execution: ExecutionChoice,
    folder: FolderChoice,
    output: Output,
) -> None:
    """Compare methods that bring recall back under a hijack, with all their costs.

    A fifth of the facts, by relation, is for learning, a fifth chooses settings, and the others
    test. Every method has a placebo, and is measured on bare queries, helpful contexts, neutral
    text and tokens. Interrupted, the same command resumes from the store.

    Writes into the folder: defences.csv (a row per model, scheme and method), costs.csv,
    verdict.csv, tuning.csv, neutral.csv, items.parquet, skipped.csv, result.json, and pareto as
    .svg and .png.

    \b
    Examples:
      hijacklens defend --model smollm2-135m --opening Well. --limit 300 --out runs/defend
      hijacklens defend --model smollm2-135m --model gemma3-270m --scheme do-not-think \\
          --scheme relation --scheme mention --scheme near-word --opening Well. --limit 500
      hijacklens defend --model smollm2-135m --method gate --method mine.py:Method
    """  # noqa: D301
    from hijacklens.prompts.schemes import get_scheme

    schemes, doses = prompts.load(), prompts.counts
    if len(doses) != 1 or doses[0] == 0:
        raise InputError(f"--dose is {prompts.doses}; a defence is tested at one dose above 0.")
    get_scheme(tune_scheme)
    for name in methods:
        read_method(name, [row["name"] for row in method_table()])
    loading.check(*models)
    path = folder.check(run_name("defend", *models, loading=loading, form=facts))

    from analyses.defence import Protocol, defend
    from analyses.defence.methods import load_method
    from analyses.defence.result import check_schemes

    check_schemes(schemes, tune_scheme)
    found = [load_method(name) for name in methods]
    chosen, loaded = facts.load(), []
    for name in models:
        output.loading(name)
        loaded.append(loading.load(name))
    result = defend(
        loaded,
        chosen,
        schemes=schemes,
        methods=found,
        protocol=Protocol(tune_scheme=tune_scheme, tuning=tuning, dose=doses[0], seed=facts.seed),
        execution=execution.load(),
        quiet=output.quiet,
    )
    result.save(path, overwrite=folder.overwrite)
    output.show_saved(
        path,
        result.glance(),
        seed=facts.seed,
        defences=records(result.defences),
        costs=records(result.costs),
        verdict=records(result.verdict),
        tuning=records(result.tuning),
    )
