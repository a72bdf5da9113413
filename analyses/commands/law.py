"""`hijacklens law`: predict which facts give way, and compare laws of the shift."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from analyses.commands.declarations import declared, given, option
from analyses.commands.options import (
    ExecutionChoice,
    FactsChoice,
    FolderChoice,
    ModelChoice,
    Models,
    SchemesChoice,
    run_name,
)
from analyses.commands.screen import Output, records
from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.models.identity import ModelIdentity
    from hijacklens.prompts.schemes import Scheme
    from hijacklens.scoring.result import HijackResult


def _names(*records: type) -> set[str]:
    return {item.name for record in records for item in fields(record)}


EVERY = {"folds", "seed"} | _names(FolderChoice, Output)
EXACT = {"bits": {"bits"} | EVERY, "world": {"world", "doses"} | EVERY | _names(ModelChoice)}
"""The options that an exact task uses."""
SCORING = _names(ExecutionChoice) - {"no_cache"}
"""Options of the scores, which a saved run has."""


@click.command("law")
@declared(
    "folder",
    "files",
    "seed",
    "laws",
    "differences",
    "parameters",
    "surprises",
    "skipped",
    label="law-<models>",
)
def command(
    *,
    models: Models = (),
    prompts: SchemesChoice,
    facts: FactsChoice,
    runs: Annotated[
        tuple[Path, ...],
        option(
            "Take the shifts from this folder of `hijacklens hijack`, on the same facts, instead "
            "of scoring them; it decides schemes, doses and seed. Repeatable, for more models.",
            "--run",
            metavar="DIR",
        ),
    ] = (),
    bits: Annotated[
        int | None,
        option(
            "No language model: the exact posterior of the latent concept task over 2^N tokens, "
            "and a one-layer model of it that averages over tokens; 500 facts, doses 1, 2 and 5.",
            metavar="N",
        ),
    ] = None,
    world: Annotated[
        Path | None,
        option(
            "No other model: an ideal reader of the pocket world in this folder of `hijacklens "
            "world`, and the model that was trained on it.",
            metavar="DIR",
        ),
    ] = None,
    folds: Annotated[int, option("Folds of the cross-validation, by relation.")] = 10,
    loading: ModelChoice,
    execution: ExecutionChoice,
    folder: FolderChoice,
    output: Output,
) -> None:
    """Predict which facts give way, and compare eight laws of the logit shift.

    The predictors are read before the hijack: from the bare query, and from the hijacking sentence
    alone. Laws are fitted on some relations and predict others; with several schemes, models or
    doses they also predict these. Interrupted, the same command resumes: scores are in the store,
    predictors in the folder next to it that ends in .predictors.

    Writes into the folder: laws.csv (a row per law and split), differences.csv, parameters.csv,
    surprises.csv, skipped.csv, facts.parquet (predictors and shifts), predictions.parquet,
    result.json, and laws, predicted, calibration and residuals as .svg and .png.

    \b
    Examples:
      hijacklens law --model smollm2-135m --limit 300 --doses 0-1 --out runs/law
      hijacklens law --model smollm2-135m --model gemma3-270m --facts counterfact --limit 2000 \\
          --opening Well. --scheme do-not-think --scheme relation --doses 0-1
      hijacklens law --bits 5
      hijacklens law --world runs/pocket
    """  # noqa: D301
    schemes, doses, stated = prompts.load(), prompts.counts, given()
    if [bool(models), bits is not None, world is not None].count(True) != 1:
        raise InputError(
            "law needs one of --model, --bits (a concept task) and --world (a pocket world)."
        )
    exact = next((name for name in EXACT if name in stated), None)
    if exact:
        _refuse(stated, stated.keys() - EXACT[exact], f"--{exact}")
    if runs:
        _refuse(stated, stated.keys() & SCORING, "--run")
    if max(doses) == 0:
        raise InputError("law needs a dose above 0, such as --doses 0-1.")
    path = folder.check(run_name("law", *models or ["exact"], loading=loading, form=facts))
    loading.check(*models)
    from hijacklens.world.trained import load_world

    trained = None if world is None else load_world(world)

    import pandas as pd

    from analyses import law
    from hijacklens.models.identity import identify
    from hijacklens.scoring.hijack import hijack
    from hijacklens.store.contents import chosen_store

    tables, left_out, title = [], [], ""
    if bits is not None:
        from hijacklens.one_layer import memory
        from hijacklens.one_layer.model import OneLayerTransformer
        from hijacklens.one_layer.task import ConceptTask

        task, title = ConceptTask(bits=bits, length=12), f"latent concept task of {bits} bits"
        averaging = OneLayerTransformer.from_weights(memory.theorem_1(task), length=40)
        tables = [law.exact(task, each, seed=facts.seed) for each in (None, averaging)]
    elif trained is not None:
        title = "pocket world"
        by = (None, loading.load(str(trained.model)))
        counts = [dose for dose in doses if dose]
        tables = [law.exact(trained.world, x, doses=counts, seed=facts.seed) for x in by]
    run = _joined(runs) if runs else None
    if run:
        settings = run.settings
        own = [each.scheme() for each in settings.schemes]
        for what, names, asked, scored in (
            ("--scheme", {"schemes", "templates"}, _texts(schemes), _texts(own)),
            ("--doses", {"doses"}, sorted({0, *doses}), [*settings.doses]),
            ("--seed", {"seed"}, facts.seed, settings.seed),
        ):
            if names & stated.keys() and asked != scored:
                raise InputError(
                    f"{what} is not that of the --run: {asked} and {scored}. Leave it out, "
                    "since the run decides schemes, doses and seed."
                )
        schemes, doses, facts = own, settings.doses, replace(facts, seed=settings.seed)
    chosen: Any = facts.load() if models else None
    record = chosen and chosen.record()
    if run:
        same = ("hash", "opening", "joining", "chat")
        if any(getattr(run.settings.facts, name) != getattr(record, name) for name in same):
            raise InputError(
                f"--run {runs[0]} holds no scores of these facts; give the --facts, --relation, "
                "--case, --limit, --opening, --joining and --chat of that run."
            )
    dtype = "" if loading.dtype == "float32" else f", {loading.dtype}"
    how = execution.load()
    store = chosen_store(how.store)
    for name in models:
        output.loading(name)
        model = loading.load(name)
        title = record.title + dtype
        if run:
            _require_same(identify(model), run)
        measured = run or hijack(
            model, chosen, schemes=schemes, doses=doses, seed=facts.seed, execution=how,
            quiet=output.quiet,
        )  # fmt: skip
        keep = store and store.path.with_suffix(".predictors")
        table = law.predictors(
            model, chosen, schemes, seed=facts.seed, keep=keep, quiet=output.quiet
        )
        tables.append(law.measured(measured, table))
        unscored = measured.skipped
        left_out += [
            unscored[unscored["model"] == model.cfg.model_name],
            law.skipped(model, chosen, schemes, seed=facts.seed),
        ]
        del model  # before the next one is loaded
    result = law.compare(
        pd.concat(tables).drop_duplicates(["model", "scheme", "dose", "case_id"]),
        folds=folds, seed=facts.seed, name=title, quiet=output.quiet,
        skipped=pd.concat(left_out).drop_duplicates(ignore_index=True) if left_out else None,
    )  # fmt: skip
    result.save(path, overwrite=folder.overwrite)
    output.show_saved(
        path,
        result.glance(),
        seed=facts.seed,
        laws=records(result.laws),
        differences=records(result.differences),
        parameters=records(result.parameters),
        surprises=records(result.surprises()),
        skipped=records(result.skipped),
    )


def _refuse(stated: dict[str, str], unused: AbstractSet[str], what: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        InputError: There are some.
    """
    if unused:
        listed = ", ".join(option for name, option in stated.items() if name in unused)
        raise InputError(f"{what} makes no use of {listed}; leave that out.")


def _joined(folders: Sequence[Path]) -> HijackResult:
    """Read saved runs, each of other models.

    Raises:
        InputError: A folder holds no run, or the runs differ in more than the model.
    """
    from hijacklens.results.result import load_result
    from hijacklens.scoring.result import HijackResult

    found = []
    for folder in folders:
        run = load_result(folder)
        if not isinstance(run, HijackResult):
            raise InputError(
                f"--run {folder} holds a {type(run).__name__}; give a folder that `hijacklens "
                "hijack` wrote."
            )
        found.append(run)
    return HijackResult.join(found)


def _texts(schemes: Sequence[Scheme]) -> str:
    """Return the names of schemes and what they say, in an order that is always the same."""
    return ", ".join(
        sorted(f"{x.name} ({x.template or 'a sentence per relation'})" for x in schemes)
    )


def _require_same(mine: ModelIdentity, run: HijackResult) -> None:
    """Refuse a model that is not the one that a run scored.

    Raises:
        InputError: Its name, dtype, weights or tokenizer is another one.
    """
    theirs = {one.name: one for one in run.settings.models}
    if mine.name not in theirs:
        raise InputError(f"no --run has scored {mine.name}; these runs have {', '.join(theirs)}.")
    for name in ("dtype", "weights_hash", "tokenizer_hash"):
        this, that = getattr(mine, name), getattr(theirs[mine.name], name)
        if this != that:
            raise InputError(
                f"the {name.replace('_', ' ')} of {mine.name} is not that of the --run: {this} "
                f"and {that}. Load the same model as the run (--model, --dtype, --revision)."
            )
