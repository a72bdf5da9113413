"""Settings shared by all analyses that train one-layer models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from analyses.reproduction.check import Scale
from analyses.reproduction.workbench import Workbench
from hijacklens.errors import InputError, shown, unknown
from hijacklens.one_layer.recipe import Recipe
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult
from hijacklens.renamed import with_new_names

RECIPE_OURS = ("seeds", "steps", "batch", "evaluation", "omega", "beta")
"""Recipe settings that the paper does not state, or that are only recalled. The paper does state
`bits` and `learning_rates`."""

RENAMED = {"dim": "d_model", "dims": "d_models"}
"""Former name of a setting -> its present name, for saved records and for `changes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeSettings:
    """Settings of tasks and recipes. Each analysis adds its own sizes."""

    seeds: int = 5
    """The number of runs; their seeds count up from 0."""
    steps: int = 4000
    learning_rates: tuple[float, ...] = (0.01, 0.001)
    """The rate with the higher mean accuracy over the seeds is reported."""
    batch: int = 128
    evaluation: int = 4096
    """The number of fresh contexts on which each model is evaluated."""
    omega: float = 0.5
    beta: float = 1.0

    def task(self, bits: int, length: int, *, support: str = "all") -> ConceptTask:
        """Return the task with m = `bits` and L = `length`."""
        return ConceptTask(
            bits=bits, omega=self.omega, beta=self.beta, length=length, support=support
        )

    def recipe(self, d_model: int, **changes: Any) -> Recipe:
        """Return the recipe at width d, with the changes an analysis makes, such as `freeze`."""
        return Recipe(
            d_model=d_model,
            seeds=tuple(range(self.seeds)),
            steps=self.steps,
            batch=self.batch,
            learning_rates=self.learning_rates,
            evaluation=self.evaluation,
            **changes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings(RecipeSettings):
    """Tasks of several sizes. Each figure adds the axis that it draws."""

    bits: tuple[int, ...] = (5, 6, 7, 8)
    """m of each task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSettings(TrainingSettings):
    """Tasks of several sizes and lengths at one width, as for figures 3a, C.1 and C.14."""

    lengths: tuple[int, ...]
    d_model: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthSettings(TrainingSettings):
    """Tasks of several sizes at one length and several widths, as for figures C.2 to C.4."""

    d_models: tuple[int, ...]
    length: int = 256


def scales(full: Any, **quick: Any) -> dict[Scale, Any]:
    """Return the settings of both scales.

    Args:
        full: The paper's sizes and seeds where they are known.
        **quick: The settings that differ at quick scale, where models are trained at one learning
            rate.
    """
    if isinstance(full, RecipeSettings):
        quick["learning_rates"] = (0.01,)
    return {"quick": replace(full, **quick), "full": full}


def names_of(settings: Any) -> tuple[str, ...]:
    """Return the names of all settings of a class, for analyses whose settings are all ours."""
    return tuple(item.name for item in fields(settings))


def identity_value(frozen: bool) -> dict[str, Any]:
    """Return the recipe changes that freeze W_V at the identity, or none."""
    return {"freeze": ("W_V",), "value_init": "identity"} if frozen else {}


def trained_by_size(
    settings: Any, bench: Workbench, sizes: Iterable[tuple[int, int]], **changes: Any
) -> Iterator[tuple[TrainingResult, dict[str, Any]]]:
    """Yield the trained models of each size, with the columns that identify them.

    Args:
        settings: Settings with a `length`.
        bench: The workbench.
        sizes: Pairs (m, d).
        **changes: Changes of the recipe.
    """
    for bits, d_model in sizes:
        task = settings.task(bits, settings.length)
        result = bench.trained(task, settings.recipe(d_model, **changes))
        yield result, {"bits": bits, "dim": d_model, "lr": result.best_learning_rate}


def best_rows(result: TrainingResult) -> list[dict[str, Any]]:
    """Return the summary rows of the better learning rate, one per seed."""
    table = result.summary()
    best: Any = table[table["lr"] == result.best_learning_rate]
    names = ["seed", "lr", "accuracy", "bayes_accuracy", "constructed_accuracy"]
    return [{str(k): v for k, v in row.items()} for row in best[names].to_dict("records")]


def change(settings: Any, changes: Mapping[str, Any]) -> Any:
    """Return settings with some of them changed, by their present or former names.

    Lists become tuples.

    Raises:
        InputError: There is no such setting, or a value is of another type than the setting's, an
            empty list, or no seed.
    """
    changes = with_new_names(changes, RENAMED)
    types = get_type_hints(type(settings))
    names = {item.name for item in fields(settings)}
    values = {}
    for name, value in changes.items():
        if name not in names:
            raise unknown("setting", name, names)
        try:
            values[name] = TypeAdapter(types[name]).validate_python(_tuple(value), strict=True)
            usable = values[name] != () and (name != "seeds" or values[name] >= 1)
        except ValidationError:
            usable = False
        if not usable:
            default = json.dumps(getattr(settings, name))
            raise InputError(f"{name} is {shown(value)}; give a value such as {default}.")
    return replace(settings, **values)


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value
