"""A trained pocket world: how its model is shaped and trained, and the folder that holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hijacklens.errors import InputError, choice, number
from hijacklens.files import check_folder
from hijacklens.results.glance import Glance, Grid, Shown
from hijacklens.world.world import World, check_knobs, knob

RECORD = "world.json"
FACTS = "facts.jsonl"
MODEL = "model"
CHECKPOINTS = "checkpoints"
UNFINISHED = "unfinished"
"""The folder in which these are made."""
SCORES = ("loss", "exact_loss", "recall_frequent", "recall")
"""The names of what `hijacklens.world.training.evaluate` returns."""

FAMILIES = ("gpt2", "llama")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Shape of the model and how it is trained.

    Raises:
        InputError: A setting is outside its range.
    """

    family: str = knob("gpt2", "Architecture: gpt2 or llama.")
    layers: int = knob(2, "Layers.", 1, 48)
    heads: int = knob(4, "Heads of each layer.", 1, 64)
    d_model: int = knob(64, "Width of the residual stream.", 1, 4096)
    mlps: bool = knob(True, "Whether layers have MLPs; without, attention alone.")
    steps: int = knob(1300, "Steps of the optimiser.", 1, 10**7)
    batch: int = knob(32, "Fresh documents per step.", 1, 10**5)
    lr: float | int = knob(0.005, "Highest learning rate of AdamW.", 0, 1)
    weight_decay: float | int = knob(0.01, "Weight decay of AdamW, on matrices.", 0, 1)
    checkpoints: int = knob(
        10, "Models saved on the way, each after 1.4 times the steps of the one before.", 0, 60
    )
    state_steps: int = knob(
        200, "Steps after which the state is saved, to resume after a kill.", 1, 10**7
    )
    seed: int = knob(0, "Seed of the initial weights and of the documents.")

    def __post_init__(self) -> None:
        check_knobs(self)
        choice("family", self.family, FAMILIES)
        if not isinstance(self.mlps, bool):
            raise InputError(f"mlps is {self.mlps!r}; give True or False.")
        if self.d_model % (2 * self.heads):
            raise InputError(
                f"d_model is {self.d_model}; give a multiple of {2 * self.heads}, as {self.heads} "
                "heads share it and each needs an even width."
            )

    @property
    def saved(self) -> tuple[int, ...]:
        """The steps after which a model is saved besides the last."""
        steps = {round(self.steps * 2 ** (-i / 2)) for i in range(1, self.checkpoints + 1)}
        return tuple(sorted(steps - {0, self.steps}))

    @property
    def log_steps(self) -> int:
        """The steps over which a loss is averaged."""
        return max(self.steps // 50, 1)


@dataclass(frozen=True, slots=True, repr=False)
class TrainedWorld(Shown):
    """The folder of a world with its trained model."""

    folder: Path
    world: World
    recipe: Recipe
    losses: Mapping[int, float]
    """Step -> mean loss of a token since the last entry, in nats."""
    scores: Mapping[str, float]
    """What `hijacklens.world.training.evaluate` returned."""
    seconds: float
    """Time of the training; of the last part if it was interrupted."""

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.folder / MODEL

    @property
    def facts(self) -> Path:
        """The file of the queries, frequent subjects first."""
        return self.folder / FACTS

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Step -> the folder of the model after that many steps; the last is the trained model."""
        return {
            step: self.folder / CHECKPOINTS / f"step-{step:06}" for step in self.recipe.saved
        } | {self.recipe.steps: self.model}

    def glance(self) -> Glance:
        """The world, the model, and how they agree."""
        row = {
            **self.scores,
            "seconds": self.seconds,
            "over": self.scores["loss"] - self.scores["exact_loss"],
        }
        columns = {
            "loss": "{loss:.3f}",
            "over the ideal reader": "{over:.3f}",
            "recall (frequent)": "{recall_frequent:fraction}",
            "recall (all)": "{recall:fraction}",
            "seconds": "{seconds:.0f}",
        }
        return Glance(
            f"pocket world in {self.folder} · {self.world.n_objects} objects, "
            f"{self.world.subjects} subjects, sharing {self.world.sharing:g} · "
            f"{self.recipe.family}, {self.recipe.layers} layers, seed {self.recipe.seed}",
            (Grid.of([row], columns),),
            steps=("model", "facts", "checkpoints"),
        )


def load_world(folder: str | Path) -> TrainedWorld:
    """Read the folder that `train_world` wrote.

    Raises:
        InputError: The folder has no finished world, or its record is damaged.
    """
    path = Path(folder)
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        losses = {int(step): float(loss) for step, loss in record["losses"].items()}
        return TrainedWorld(
            path, World.from_record(record["world"]), Recipe(**record["recipe"]), losses,
            {name: number(name, record["scores"][name]) for name in SCORES},
            number("seconds", record["seconds"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(folder)!r} holds no finished pocket world ({error}). Make one: hijacklens world "
            f"--out {folder}"
        ) from error


def finished_world(folder: str | Path, world: World, recipe: Recipe) -> bool:
    """Return whether a folder holds the finished training of this world by this recipe."""
    try:
        found = load_world(folder)
    except InputError:
        return False
    return (found.world, found.recipe) == (world, recipe)


def check_world_folder(
    out: str | Path, world: World, recipe: Recipe, *, overwrite: bool = False
) -> Path:
    """Refuse a folder that cannot take a world, before anything is computed.

    Raises:
        InputError: It holds another world or a result and `overwrite` is False, or cannot be
            written to.
    """
    path = check_folder(out, overwrite=overwrite)
    if (path / RECORD).exists() and not overwrite and not finished_world(path, world, recipe):
        raise InputError(
            f"{str(out)!r} already contains another pocket world. Choose another folder, or pass "
            "overwrite=True (--overwrite on the command line) to replace it."
        )
    return path
