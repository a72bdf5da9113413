"""`hijacklens law`: predict which facts give way, and compare laws of the shift."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click

from analyses.commands.declarations import declared, option
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


@click.command("law")
@declared(
    "folder",
    "files",
    "seed",
    "laws",
    "differences",
    "parameters",
    "surprises",
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
            "of scoring them. Repeatable.",
            "--run",
            metavar="DIR",
        ),
    ] = (),
    bits: Annotated[
        int | None,
        option(
            "No language model: the exact posterior of the latent concept task over 2^N tokens, "
            "and a one-layer model of it that averages over tokens.",
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
    surprises.csv, facts.parquet (predictors and shifts), predictions.parquet, result.json, and
    laws, predicted, calibration and residuals as .svg and .png.

    \b
    Examples:
      hijacklens law --model smollm2-135m --limit 300 --doses 0-1 --out runs/law
      hijacklens law --model smollm2-135m --model gemma3-270m --facts counterfact --limit 2000 \\
          --opening Well. --scheme do-not-think --scheme relation --doses 0-1
      hijacklens law --bits 5
      hijacklens law --world runs/pocket
    """  # noqa: D301
    schemes, doses = prompts.load(), prompts.counts
    if [bool(models), bits is not None, world is not None].count(True) != 1:
        raise InputError(
            "law needs one of --model, --bits (a concept task) and --world (a pocket world)."
        )
    if max(doses) == 0:
        raise InputError("law needs a dose above 0, such as --doses 0-1.")
    path = folder.check(run_name("law", *models or ["exact"], loading=loading, form=facts))
    from hijacklens.world.trained import load_world

    trained = None if world is None else load_world(world)

    import pandas as pd

    from analyses import law
    from hijacklens.results.result import load_result
    from hijacklens.scoring.hijack import hijack
    from hijacklens.scoring.result import HijackResult
    from hijacklens.store.store import chosen_store

    tables, title = [], ""
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
    chosen: Any = facts.load() if models else None
    saved: list[Any] = [load_result(run) for run in runs]
    record = chosen and chosen.record()
    for run, place in zip(saved, runs, strict=True):
        of = run.settings.facts if isinstance(run, HijackResult) else None
        same = ("hash", "opening", "joining", "chat")
        if any(getattr(of, name, place) != getattr(record, name, None) for name in same):
            raise InputError(
                f"--run {place} holds no scores of these facts; give the --facts, --limit, "
                "--seed, --opening, --joining and --chat of that run."
            )
    dtype = "" if loading.dtype == "float32" else f", {loading.dtype}"
    how = execution.load()
    store = chosen_store(how.store)
    for name in models:
        output.loading(name)
        model = loading.load(name)
        label, title = str(model.cfg.model_name), record.title + dtype
        own = [run for run in saved if label in {one.name for one in run.settings.models}]
        if saved and not own:
            have = sorted({one.name for run in saved for one in run.settings.models})
            raise InputError(f"no --run has scored {label}; these runs have {', '.join(have)}.")
        own = own or [
            hijack(
                model, chosen, schemes=schemes, doses=doses, seed=facts.seed, execution=how,
                quiet=output.quiet,
            )
        ]  # fmt: skip
        keep = store and store.path.with_suffix(".predictors")
        table = law.predictors(
            model, chosen, schemes, seed=facts.seed, keep=keep, quiet=output.quiet
        )
        tables.append(pd.concat([law.measured(run, table) for run in own]))
        del model  # before the next one is loaded
    result = law.compare(
        pd.concat(tables).drop_duplicates(["model", "scheme", "dose", "case_id"]),
        folds=folds, seed=facts.seed, name=title, quiet=output.quiet,
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
    )
