"""Settings shared by all analyses that train one-layer models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from analyses.reproduction.check import Scale
from hijacklens.one_layer.recipe import Recipe
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult

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


def scales(paper: Any, **quick: Any) -> dict[Scale, Any]:
    """Return the settings of both scales.

    Args:
        paper: Those of the paper.
        **quick: The settings that differ at quick scale, where models are trained at one learning
            rate.
    """
    if isinstance(paper, RecipeSettings):
        quick["learning_rates"] = (0.01,)
    return {"quick": replace(paper, **quick), "paper": paper}


def identity_value(frozen: bool) -> dict[str, Any]:
    """Return the recipe changes that freeze W_V at the identity, or none."""
    return {"freeze": ("W_V",), "value_init": "identity"} if frozen else {}


def best_rows(result: TrainingResult) -> list[dict[str, Any]]:
    """Return the summary rows of the better learning rate, one per seed."""
    table = result.summary()
    best: Any = table[table["lr"] == result.best_learning_rate]
    names = ["seed", "lr", "accuracy", "bayes_accuracy", "constructed_accuracy"]
    return [{str(k): v for k, v in row.items()} for row in best[names].to_dict("records")]
