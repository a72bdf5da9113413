"""How one-layer models are trained, and which of these settings the paper does not state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, TypeAlias

from hijacklens.errors import InputError, choice, is_whole, number, several, whole_number
from hijacklens.one_layer.architecture import ModelSettings, OneLayerConfig
from hijacklens.one_layer.task import ConceptTask

MOST_SEEDS = 10_000

Seeds: TypeAlias = Any
"""A count or several seeds; any such type is accepted, and a recipe holds a tuple of ints."""

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1.0 - done,
}
"""Schedule -> factor of the learning rate, given the fraction of the steps that are done."""

RENAMED = {"dim": "d_model"}
"""Old name of a setting -> its name now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One model to train: its task, its start, its optimiser."""

    task: ConceptTask
    model: OneLayerConfig
    """Its `seed` gives the start and the contexts, its `freeze` the matrices that stay fixed."""
    lr: float
    """Learning rate of AdamW."""
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.model.vocab != self.task.vocab:
            raise InputError(
                f"a model over {self.model.vocab} tokens cannot train on a task of "
                f"{self.task.vocab}; give OneLayerConfig(vocab={self.task.vocab}, ...)."
            )
        number("weight_decay", self.weight_decay, least=0)
        if number("lr", self.lr) <= 0:
            raise InputError(f"lr is {self.lr!r}; give a finite number above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(ModelSettings):
    """All settings of a training: shape and initial values of the models, and how they are trained.

    `OUR_DEFAULTS` lists what the paper does not state.

    Raises:
        InputError: A setting is outside its range.
    """

    seeds: Seeds = (0, 1, 2, 3, 4)
    """One model is trained per seed and learning rate. A count n means the seeds 0 to n - 1."""
    steps: int = 4000
    """Steps of each run."""
    batch: int = 128
    """Fresh contexts per step."""
    learning_rates: Sequence[float] = (0.01, 0.001)
    """The grid; a result names the rate with the highest mean accuracy over the seeds. The paper's
    grid is .01 and .001, chosen for each dimension."""
    schedule: str = "constant"
    """How the learning rate changes during training, a key of `SCHEDULES`; the paper's is not
    known. `cosine` and `linear` end at 0, which removes most of the noise of the last steps."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on every matrix that is trained."""
    evaluation: int = 8192
    """Fresh contexts that each model is evaluated on."""

    def __post_init__(self) -> None:
        ModelSettings.__post_init__(self)
        seeds, rates = self.seeds, several("learning_rates", self.learning_rates, "[0.01, 0.001]")
        if is_whole(seeds) or isinstance(seeds, bool):
            seeds = range(whole_number("seeds", seeds, least=1, most=MOST_SEEDS))
        seeds = several("seeds", seeds, "5 or [0, 1]")
        settings = {
            "seeds": tuple(whole_number("one of the seeds", seed) for seed in seeds),
            "learning_rates": tuple(number("one of learning_rates", rate) for rate in rates),
            "weight_decay": number("weight_decay", self.weight_decay),
            "schedule": choice("schedule", self.schedule, tuple(SCHEDULES)),
        }
        for name in ("seeds", "learning_rates"):
            values = settings[name]
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} are {values!r}; give at least one, each once.")
        for name in ("steps", "batch", "evaluation"):
            settings[name] = whole_number(name, getattr(self, name), least=1, most=2**31 - 1)
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def runs(self, task: ConceptTask) -> list[Run]:
        """Return one run per learning rate and seed: first all seeds of the first learning rate."""
        shape: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(ModelSettings)}
        shape |= {"vocab": task.vocab, "length": task.length}
        models = [OneLayerConfig(**shape, seed=seed) for seed in self.seeds]
        return [
            Run(task=task, model=model, lr=lr, weight_decay=self.weight_decay)
            for lr, model in product(self.learning_rates, models)
        ]


_DEFAULT = Recipe(d_model=1)

OUR_DEFAULTS = {
    "d_attn": "d_model",
    "steps": _DEFAULT.steps,
    "batch": _DEFAULT.batch,
    "data": "fresh contexts each step",
    "optimizer": "AdamW, betas (0.9, 0.999)",
    "schedule": _DEFAULT.schedule,
    "weight_decay": _DEFAULT.weight_decay,
    "init_scale": "Gaussian of standard deviation 1 / sqrt(d_model) for every matrix",
    "evaluation": _DEFAULT.evaluation,
    "seeds": len(_DEFAULT.seeds),
    "choice of learning rate": "highest mean accuracy over the seeds",
}
"""What the paper does not state, with our default; saved with every result."""
