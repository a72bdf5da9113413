"""`hijacklens train`: one-layer models on latent concept association (paper, sections 4 and 5)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from analyses.commands.options import RenamedOption, option, overwrite_option
from analyses.commands.screen import Output, files_in, files_written, output_options, records
from hijacklens.errors import InputError, unknown

TASK = ("bits", "omega", "beta", "length", "support")
PARTS = {"we": "W_E", "wv": "W_V", "wqk": "W_QK"}


@click.command("train")
@option("--bits", type=int, required=True, help="m; the vocabulary has 2^m tokens.")
@option(
    "--d-model",
    cls=RenamedOption,
    formerly="--dim",
    type=int,
    required=True,
    help="Width of the embeddings, d.",
)
@option("--length", type=int, default=256, help="Tokens in a context, L.")
@option("--omega", type=float, default=0.5, help="Fraction of informative tokens.")
@option("--beta", type=float, default=1.0, help="Temperature of those tokens.")
@option("--support", default="all", help="N(z): see above.")
@option("--d-attn", type=int, help="Width of queries and keys, d_a.  [default: --d-model]")
@option(
    "--freeze",
    default="",
    metavar="PARTS",
    help="Matrices to freeze: we, wv, wqk, separated by commas.",
)
@option("--value-init", default="gaussian", help="Initial W_V: gaussian or identity.")
@option("--seeds", type=int, default=5, help="Number of seeds, from 0 on.")
@option("--steps", type=int, default=4000, help="Steps of each run.")
@option("--batch", type=int, default=128, help="Fresh contexts per step.")
@option("--lr", default="0.01,0.001", metavar="LIST", help="Learning rates.")
@option("--weight-decay", type=float, default=0.01, help="Weight decay of AdamW.")
@option("--evaluation", type=int, default=8192, help="Contexts to evaluate on.")
@option("--dtype", default="float32", help="float32 or float64.")
@option("--device", help="cpu, cuda, ...  [default: a GPU if there is one]")
@option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@overwrite_option
@option(
    "--checkpoint-seconds", type=float, default=30.0, help="Shortest time between two checkpoints."
)
@output_options(
    "folder", "files", "task", "recipe", "seeds", "summary", "best_learning_rate", "bayes_loss"
)
def command(freeze: str, lr: str, out: Path, output: Output, **settings: Any) -> None:
    """Train one-layer transformers on latent concept association, all seeds and rates at once.

    The table has a row per learning rate and seed, with three accuracies on the same fresh
    contexts: of the trained model (with its 95% interval), of the Bayes rule, and of the model with
    the memory of equation 5.1 in place of its W_V. The same command resumes an interrupted run and
    ends with the same result.

    The support N(z) of informative tokens is all (other tokens), hamming-1, first-bit or
    first-two-bits. --freeze wv keeps W_V at its initial value; figure 3a freezes the identity.

    Writes into the folder: summary.csv, curves.csv, result.json (task, recipe, which
    settings are our defaults, provenance), curve.svg, curve.png, models/seed0-lr0.01/ and so on
    (hijacklens.load_result reads the folder back).

    \b
    Examples:
      hijacklens train --bits 6 --d-model 32 --out runs/six-bits
      hijacklens train --bits 8 --d-model 128 --freeze wv --value-init identity --out runs/fixed
    """  # noqa: D301
    try:
        rates = [float(rate) for rate in lr.split(",")]
    except ValueError:
        raise InputError(f"--lr is {lr!r}; give numbers with commas, such as 0.01,0.001.") from None
    parts = [part.strip().lower().replace("_", "") for part in freeze.split(",") if part.strip()]
    for part in parts:
        if part not in PARTS:
            raise unknown("part to freeze", part, PARTS)

    from hijacklens.one_layer.task import ConceptTask
    from hijacklens.one_layer.training import train

    task = ConceptTask(**{name: settings.pop(name) for name in TASK})
    frozen = [PARTS[part] for part in parts]
    result = train(
        task, learning_rates=rates, freeze=frozen, out=out, quiet=output.quiet, **settings
    )
    written = files_in(out)
    output.show(
        result.glance(),
        files_written(out, written),
        folder=str(out),
        files=written,
        task=result.task.configuration(),
        recipe=asdict(result.recipe),
        seeds=list(result.recipe.seeds),
        summary=records(result.summary()),
        best_learning_rate=result.best_learning_rate,
        bayes_loss=result.bayes_loss,
    )
