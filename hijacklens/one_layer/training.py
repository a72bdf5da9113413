"""Training the one-layer model on latent concept association, with checkpoints and evaluation.

`train` trains seeds x learning rates together (`hijacklens.one_layer.stacked_runs`), evaluates
every model on fresh contexts, next to the Bayes rule and to itself with the memory of equation 5.1
in place of its W_V, and returns a `TrainingResult`. Section 7.6 of the reference page describes
the recipe: the paper states the model and the two learning rates that it chose between for each
dimension, not the rest (`hijacklens.one_layer.recipe.OUR_DEFAULTS`).

Cost: a step of one run at V = 256, d = 128, L = 256, batch 128 takes 2 ms on one CPU core, so
the default 4,000 steps of 10 runs take one and a half minutes; 6 seconds at V = 32, d = 16, L = 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hijacklens.errors import InputError, number, one_of_type, unknown
from hijacklens.files import claim_folder
from hijacklens.models.devices import choose_device
from hijacklens.one_layer.checkpoint import Checkpoint
from hijacklens.one_layer.recipe import RENAMED, Recipe
from hijacklens.one_layer.stacked_runs import StackedRuns, train_runs
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult
from hijacklens.renamed import renamed

OPTIONS = ("out", "device", "overwrite", "checkpoint_seconds", "quiet")
"""Arguments of `train` besides the settings of the recipe."""


@renamed(**RENAMED)
def train(
    task: ConceptTask,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    checkpoint_seconds: float = 30.0,
    quiet: bool = False,
    **changes: Any,
) -> TrainingResult:
    """Train one-layer models on a task: every seed at every learning rate, all at once.

    Fresh contexts each step, cross-entropy at the last position, AdamW. Runs of one seed start
    alike and see the same contexts at every learning rate. With `out`, the state is saved there
    during training, so that the same call resumes after a kill and ends with the same result.

    Args:
        task: The task to learn.
        recipe: How to train; see `Recipe`.
        out: Folder for the result, and for the state of the training until it is finished.
        device: Where to train; None for the GPU if there is one. Starts and evaluation contexts
            are the same on every device, training contexts on every device of a kind.
        overwrite: Replace a finished result in `out` when the new one is complete, or at once the
            unfinished run of another call.
        checkpoint_seconds: Least time between two saved states.
        quiet: Draw no progress bar.
        changes: Settings that replace those of the recipe, by the names of `Recipe`'s fields;
            without a recipe they make one, and `d_model` is required.

    Raises:
        InputError: A setting is unknown or outside its range, or the folder holds a result or
            another run.
    """
    one_of_type("task", task, ConceptTask, "ConceptTask(bits=5)")
    number("checkpoint_seconds", checkpoint_seconds, least=0)
    recipe = _with_changes(recipe, changes)
    runs = recipe.runs(task)
    where = choose_device(device)
    checkpoint = None
    if out is not None:
        configuration = {"task": task.configuration(), **asdict(recipe), "device": where.type}
        checkpoint = _open_checkpoint(Path(out), configuration, overwrite=overwrite)
    stacked = train_runs(
        StackedRuns(
            runs, steps=recipe.steps, batch=recipe.batch, schedule=recipe.schedule, device=where
        ),
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        label=f"{len(runs)} models, m = {task.bits}, d = {recipe.d_model}",
        quiet=quiet,
    )
    result = TrainingResult.evaluated(
        task, recipe, stacked.models(), curves=_curves(stacked), device=str(where)
    )
    if out is not None and checkpoint is not None:
        result.save(out, overwrite=overwrite)
        checkpoint.remove()
    return result


def _with_changes(recipe: Recipe | None, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some settings replaced, or a recipe of these settings."""
    names = [field.name for field in fields(Recipe)]
    for name in changes:
        if name not in names:
            raise unknown("training setting", name, [*names, *OPTIONS])
    if recipe is not None:
        return replace(one_of_type("recipe", recipe, Recipe, "Recipe(d_model=16)"), **changes)
    if "d_model" not in changes:
        raise InputError(
            "train needs the width of the embeddings; give a recipe or d_model, such as d_model=16."
        )
    return Recipe(**changes)


def _open_checkpoint(
    folder: Path, configuration: Mapping[str, Any], *, overwrite: bool
) -> Checkpoint:
    """Return the checkpoint in the folder of a result; with `overwrite`, delete another call's.

    Even with `overwrite`, an unfinished run of the same call is kept, so that the call can resume.
    """
    folder = claim_folder(folder, overwrite=overwrite)
    checkpoint = Checkpoint(folder, configuration)
    try:
        checkpoint.load()
    except InputError:
        if not overwrite:
            raise
        checkpoint.remove()
    return checkpoint


def _curves(stacked: StackedRuns) -> pd.DataFrame:
    keys = [(run.model.seed, run.lr) for run in stacked.runs]
    columns = pd.MultiIndex.from_tuples(keys, names=["seed", "lr"])
    steps = pd.Index(stacked.curve_steps(), name="step")
    losses = pd.DataFrame(stacked.losses().double().numpy(), steps, columns)
    return pd.DataFrame({"loss": losses.unstack()}).reset_index()
