"""Training the one-layer model on latent concept association, and what came of it.

`train` trains seeds x learning rates as one sweep (`hijacklens.one_layer.stacked_runs`), evaluates
every model on fresh contexts beside the Bayes rule and beside itself with the memory of equation
5.1 in
place of its W_V, and returns a `TrainingResult`. The recipe is section 7.6 of the reference page:
the paper states the model and the two learning rates that it chose between for each dimension,
not the rest (`hijacklens.one_layer.recipe.OUR_DEFAULTS`).

Cost: a step of one run at V = 256, d = 128, L = 256, batch 128 takes 2 ms on one CPU core, so
the default 4,000 steps of 10 runs take one and a half minutes; 6 seconds at V = 32, d = 16, L = 64.

>>> from hijacklens.one_layer.task import ConceptTask
>>> task = ConceptTask(bits=3, length=64)
>>> trained = train(task, dim=8, seeds=2, steps=64, learning_rates=(0.01,), quiet=True)
>>> ", ".join(trained.summary().columns)
'seed, lr, accuracy, accuracy_low, accuracy_high, bayes_accuracy, constructed_accuracy, loss'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hijacklens.errors import InputError, is_whole, number, one_of_type, several, whole_number
from hijacklens.files import RECORD, claim_folder
from hijacklens.models.devices import choose_device
from hijacklens.one_layer.checkpoint import Checkpoint
from hijacklens.one_layer.model import CONFIG_FILE, WEIGHTS_FILE
from hijacklens.one_layer.recipe import Recipe
from hijacklens.one_layer.stacked_runs import Sweep, train_runs
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import MODELS, TrainingResult
from hijacklens.results.result import remove_result

MOST_SEEDS = 10_000


def train(
    task: ConceptTask,
    *,
    dim: int,
    d_attn: int | None = None,
    seeds: int | Sequence[int] = 5,
    steps: int = 4000,
    batch: int = 128,
    learning_rates: Sequence[float] = (0.01, 0.001),
    freeze: Sequence[str] = (),
    value_init: str = "gaussian",
    init_scale: float | None = None,
    weight_decay: float = 0.01,
    evaluation: int = 8192,
    dtype: str = "float32",
    device: torch.device | str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    checkpoint_seconds: float = 30.0,
    quiet: bool = False,
) -> TrainingResult:
    """Train one-layer models on a task: every seed at every learning rate, all at once.

    Fresh contexts each step, cross-entropy at the last position, AdamW. Runs of one seed start
    alike and see the same contexts at every learning rate. With `out`, the state is kept there
    while training, so that the same call after a kill goes on and ends with the same result.

    Args:
        task: What to learn.
        dim: Width of the embeddings, d.
        d_attn: Width of queries and keys, d_a; None for `dim`, our default.
        seeds: How many seeds (0, 1, ...), or the seeds.
        steps: Steps of each run.
        batch: Contexts per step.
        learning_rates: The grid; the result names the one with the highest mean accuracy over
            seeds. The paper's is .01 and .001, chosen for each dimension.
        freeze: What is not trained: any of `"W_E"`, `"W_V"`, `"W_QK"`.
        value_init: W_V starts `"gaussian"`, or as the `"identity"` (frozen too in figure 3a).
        init_scale: Standard deviation of the Gaussian start; None for 1 / sqrt(dim), our default.
        weight_decay: Of AdamW, on every matrix that is trained.
        evaluation: Fresh contexts that each model is evaluated on.
        dtype: `"float32"` or `"float64"`.
        device: Where to train; None for the GPU if there is one. Starts and evaluation contexts
            are the same on every device, training contexts on every device of a kind.
        out: Folder to save the result in, and the state until it is there.
        overwrite: Replace a finished result in `out`, or the unfinished run of another call.
        checkpoint_seconds: Least time between two saved states.
        quiet: Draw no progress bar.

    Raises:
        InputError: A setting outside its range, or a folder with a result or another run.
    """
    one_of_type("task", task, ConceptTask, "ConceptTask(bits=5)")
    number("checkpoint_seconds", checkpoint_seconds, least=0)
    recipe = Recipe(
        dim=dim,
        d_attn=d_attn,
        seeds=_seeds(seeds),
        steps=steps,
        batch=batch,
        learning_rates=several("learning_rates", learning_rates, "[0.01, 0.001]"),
        freeze=several("freeze", freeze, "['W_V']"),
        value_init=value_init,
        init_scale=init_scale,
        weight_decay=weight_decay,
        evaluation=evaluation,
        dtype=dtype,
    )
    runs = recipe.runs(task)
    where = choose_device(device)
    checkpoint = None
    if out is not None:
        asked = {"task": task.configuration(), **asdict(recipe), "device": where.type}
        checkpoint = _open_checkpoint(Path(out), asked, overwrite=overwrite)
    sweep = train_runs(
        runs,
        steps=steps,
        batch=batch,
        device=where,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        label=f"{len(runs)} models, m = {task.bits}, d = {dim}",
        quiet=quiet,
    )
    result = TrainingResult.evaluated(
        task, recipe, sweep.models(), curves=_curves(sweep), device=str(where)
    )
    if out is not None and checkpoint is not None:
        result.save(out)
        checkpoint.remove()
    return result


def _seeds(seeds: Any) -> tuple[int, ...]:
    """How many seeds, or the seeds."""
    if is_whole(seeds) or isinstance(seeds, bool):
        return tuple(range(whole_number("seeds", seeds, least=1, most=MOST_SEEDS)))
    return several("seeds", seeds, "5 or [0, 1]")


def _open_checkpoint(folder: Path, asked: Mapping[str, Any], *, overwrite: bool) -> Checkpoint:
    """The checkpoint in a folder for a result; what may be overwritten there goes first.

    An unfinished run of this very call stays even then, so that a call with `overwrite` that was
    killed goes on like any other.
    """
    folder = claim_folder(folder, overwrite=overwrite)
    checkpoint = Checkpoint(folder, asked)
    if not overwrite:
        return checkpoint
    if (folder / RECORD).exists():
        remove_result(folder)
        checkpoint.remove()
    try:
        checkpoint.load()
    except InputError:
        checkpoint.remove()
    if not checkpoint.path.exists():
        # The models of a result with other seeds or learning rates would stay beside the new ones.
        for model in (folder / MODELS).glob("seed*-lr*"):
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                (model / name).unlink(missing_ok=True)
            if not any(model.iterdir()):
                model.rmdir()
    return checkpoint


def _curves(sweep: Sweep) -> pd.DataFrame:
    steps, losses = sweep.curve_steps(), sweep.losses().double()
    return pd.concat(
        [
            pd.DataFrame(
                {"seed": run.model.seed, "lr": run.lr, "step": steps, "loss": losses[:, i].numpy()}
            )
            for i, run in enumerate(sweep.runs)
        ],
        ignore_index=True,
    )
