"""`hijacklens world`: train a small model on a world whose distribution is known exactly."""

from __future__ import annotations

import itertools
from dataclasses import asdict, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from analyses.commands.declarations import declared, option
from analyses.commands.options import Overwrite, out_option
from analyses.commands.screen import Output
from hijacklens.errors import InputError, unknown
from hijacklens.world.trained import Recipe, check_world_folder
from hijacklens.world.world import World


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
    WorldChoice, RecipeChoice = _choice(World), _choice(Recipe)


@click.command("world")
@declared("folders", "worlds")
def command(
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
    world: WorldChoice,
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
    settings = {**asdict(world), **asdict(recipe)}
    plan: dict[Path, tuple[World, Recipe]] = {}
    for changes in itertools.product(*(_values(text, settings) for text in vary)):
        here = {**settings, **dict(changes)}
        name = "_".join(
            f"{name}-{value:g}" if isinstance(value, float) else f"{name}-{value}"
            for name, value in changes
        )
        made = World(**{f.name: here[f.name] for f in fields(World)})
        plan[out / name] = made, Recipe(**{f.name: here[f.name] for f in fields(Recipe)})
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
