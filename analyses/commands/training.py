"""`hijacklens train` and `hijacklens world`: train models whose data are known exactly."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from analyses.commands.declarations import RenamedOption, Whole, declared, option
from analyses.commands.options import Overwrite, out_option
from analyses.commands.screen import Output, records
from hijacklens.errors import InputError, unknown
from hijacklens.files import check_folder
from hijacklens.world.trained import Recipe as WorldRecipe
from hijacklens.world.trained import check_world_folder
from hijacklens.world.world import World

TASK = ("bits", "omega", "beta", "length", "support")
HOW = ("out", "device", "overwrite", "checkpoint_seconds")
PARTS = {"we": "W_E", "wv": "W_V", "wqk": "W_QK"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingChoice:
    """Settings of the task (`TASK`), of the recipe, and of `hijacklens.one_layer.train` (`HOW`)."""

    bits: Annotated[int, option("m; the vocabulary has 2^m tokens.", type=Whole(1))]
    d_model: Annotated[
        int,
        option("Width of the embeddings, d.", cls=RenamedOption, formerly="--dim", type=Whole(1)),
    ]
    length: Annotated[int, option("Tokens in a context, L.", type=Whole(1))] = 256
    omega: Annotated[float, option("Fraction of informative tokens.")] = 0.5
    beta: Annotated[float, option("Temperature of those tokens.")] = 1.0
    support: Annotated[
        Literal["all", "hamming-1", "first-bit", "first-two-bits"], option("N(z): see above.")
    ] = "all"
    d_attn: Annotated[
        int | None, option("Width of queries and keys, d_a.  [default: --d-model]", type=Whole(1))
    ] = None
    freeze: Annotated[
        str, option("Matrices to freeze: we, wv, wqk, separated by commas.", metavar="PARTS")
    ] = ""
    value_init: Annotated[Literal["gaussian", "identity"], option("Initial W_V.")] = "gaussian"
    seeds: Annotated[int, option("Number of seeds, from 0 on.", type=Whole(1))] = 5
    steps: Annotated[int, option("Steps of each run.", type=Whole(1))] = 4000
    batch: Annotated[int, option("Fresh contexts per step.", type=Whole(1))] = 128
    lr: Annotated[str, option("Learning rates.", metavar="LIST")] = "0.01,0.001"
    schedule: Annotated[
        Literal["constant", "cosine", "linear"], option("How the rate changes with the steps.")
    ] = "constant"
    weight_decay: Annotated[float, option("Weight decay of AdamW.")] = 0.01
    evaluation: Annotated[int, option("Contexts to evaluate on.", type=Whole(1))] = 8192
    dtype: Annotated[Literal["float32", "float64"], option("Of all numbers.")] = "float32"
    device: Annotated[str | None, option("cpu, cuda, ...  [default: a GPU if there is one]")] = None
    out: Annotated[Path, out_option("Folder for the files.")]
    overwrite: Overwrite = False
    checkpoint_seconds: Annotated[float, option("Shortest time between two checkpoints.")] = 30.0


@click.command("train")
@declared(
    "folder", "files", "task", "recipe", "seeds", "summary", "best_learning_rate", "bayes_loss"
)
def train(*, choice: TrainingChoice, output: Output) -> None:
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
    settings = asdict(choice)
    lr, freeze = settings.pop("lr"), settings.pop("freeze")
    try:
        rates = [float(rate) for rate in lr.split(",")]
    except ValueError:
        raise InputError(f"--lr is {lr!r}; give numbers with commas, such as 0.01,0.001.") from None
    parts = [part.strip().lower().replace("_", "") for part in freeze.split(",") if part.strip()]
    for part in parts:
        if part not in PARTS:
            raise unknown("part to freeze", part, PARTS)

    check_folder(choice.out, overwrite=choice.overwrite)

    # The task and the recipe check their settings; they need torch, the rest also TransformerLens.
    from hijacklens.models.devices import choose_device
    from hijacklens.one_layer.recipe import Recipe
    from hijacklens.one_layer.task import ConceptTask

    choose_device(choice.device)
    task = ConceptTask(**{name: settings.pop(name) for name in TASK})
    how = {name: settings.pop(name) for name in HOW}
    settings |= {"learning_rates": rates, "freeze": [PARTS[part] for part in parts]}
    recipe = Recipe(**settings)
    recipe.runs(task)

    from hijacklens.one_layer import training

    result = training.train(task, recipe, quiet=output.quiet, **how)
    output.show_saved(
        choice.out,
        result.glance(),
        task=result.task.configuration(),
        recipe=asdict(result.recipe),
        seeds=list(result.recipe.seeds),
        summary=records(result.summary()),
        best_learning_rate=result.best_learning_rate,
        bayes_loss=result.bayes_loss,
    )


def _choice(record: Any) -> Any:
    """Return a record with an option for each knob of another record."""
    made = []
    for each in fields(record):
        name = each.name.replace("_", "-")
        flags = [f"--{name}/--no-{name}"] if isinstance(each.default, bool) else []
        kind = Annotated[type(each.default), option(each.metadata["help"], *flags)]
        made.append((each.name, kind, each.default))
    return make_dataclass(f"{record.__name__}Choice", made, frozen=True, kw_only=True)


if TYPE_CHECKING:
    from hijacklens.world.trained import Recipe as RecipeChoice
    from hijacklens.world.world import World as WorldChoice
else:
    WorldChoice, RecipeChoice = _choice(World), _choice(WorldRecipe)


@click.command("world")
@declared("folders", "worlds")
def world(
    *,
    out: Annotated[Path, out_option("Folder for the files.")],
    vary: Annotated[
        tuple[str, ...],
        option(
            "Train one world per value, each in a folder below --out. Repeatable, for all "
            "combinations.",
            metavar="NAME=V1,V2,...",
        ),
    ] = (),
    knobs: WorldChoice,
    recipe: RecipeChoice,
    overwrite: Overwrite = False,
    output: Output,
) -> None:
    """Train a small language model on the pocket world, whose distribution is known exactly.

    The model is an ordinary GPT-2 with a tokenizer of whole words, in a folder that every other
    command takes as --model; facts.jsonl is for --facts. With --sharing 0 facts and related talk
    share no documents, and nothing else changes. The same command resumes an interrupted training
    and ends with the same weights.

    Writes into the folder: world.json (knobs, recipe, losses), facts.jsonl, model/, and
    checkpoints/step-000650/ and so on.

    \b
    Examples:
      hijacklens world --out runs/pocket
      hijacklens hijack --model runs/pocket/model --facts runs/pocket/facts.jsonl --doses 0-3
      hijacklens world --vary sharing=0,0.5,1 --vary seed=0,1,2 --out runs/sharing
    """  # noqa: D301
    settings = {**asdict(knobs), **asdict(recipe)}
    plan: dict[Path, tuple[World, WorldRecipe]] = {}
    for changes in itertools.product(*(_values(text, settings) for text in vary)):
        here = {**settings, **dict(changes)}
        name = "_".join(
            f"{name}-{value:g}" if isinstance(value, float) else f"{name}-{value}"
            for name, value in changes
        )
        made = World(**{f.name: here[f.name] for f in fields(World)})
        plan[out / name] = made, WorldRecipe(**{f.name: here[f.name] for f in fields(WorldRecipe)})
    for folder, (one, how) in plan.items():
        check_world_folder(folder, one, how, overwrite=overwrite)

    from hijacklens.world.training import train_world

    worlds = []
    for folder, (one, how) in plan.items():
        done = train_world(one, how, out=folder, overwrite=overwrite, quiet=output.quiet)
        output.show(done.glance())
        worlds.append({"world": one.record(), "recipe": asdict(how), **done.scores})
    folders = [str(folder) for folder in plan]
    output.show(folders=folders, worlds=worlds)


def _values(text: str, settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the pairs (name, value) of a text such as `sharing=0,1`."""
    name, _, values = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if name not in settings:
        raise unknown("setting in --vary", name, settings, "Write it as sharing=0,1.")
    kind = type(settings[name])
    words = [word.strip() for word in values.split(",") if word.strip()]
    try:
        if kind is bool:
            found = [{"true": True, "false": False}[word.lower()] for word in words]
        else:
            found = [kind(word) for word in words]
    except (ValueError, KeyError):
        found = []
    if not found or len(set(found)) < len(found):
        raise InputError(
            f"--vary {text!r} has no values of {name}, or one twice; write values such as "
            f"{name}={settings[name]} with commas between them."
        )
    return [(name, value) for value in found]
