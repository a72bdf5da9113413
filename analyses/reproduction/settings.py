"""What the settings of all analyses that train one-layer models have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hijacklens.one_layer.recipe import Recipe
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult

RECIPE_OURS = ("seeds", "steps", "batch", "evaluation", "omega", "beta")
"""Settings of every recipe that the paper does not state, or that are only recalled; `bits` and
`learning_rates` are stated."""

RENAMED = {"dim": "d_model", "dims": "d_models"}
"""Former name of a setting, in records and changes -> its name now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeSettings:
    """What tasks and recipes share; sizes are those of an analysis."""

    seeds: int
    """How many runs, from seed 0 on."""
    steps: int
    learning_rates: tuple[float, ...] = (0.01, 0.001)
    """The better one counts, by mean accuracy over the seeds."""
    batch: int = 128
    evaluation: int = 4096
    """Fresh contexts that each model is evaluated on."""
    omega: float = 0.5
    beta: float = 1.0

    def task(self, bits: int, length: int, *, support: str = "all") -> ConceptTask:
        """The task of m bits and context length L."""
        return ConceptTask(
            bits=bits, omega=self.omega, beta=self.beta, length=length, support=support
        )

    def recipe(self, d_model: int, **changes: Any) -> Recipe:
        """The recipe at width d, with what an analysis changes, such as `freeze`."""
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
    """Tasks of several sizes; a figure adds the axis that it draws."""

    bits: tuple[int, ...]


def identity_value(frozen: bool) -> dict[str, Any]:
    """The changes of a recipe that freeze W_V at the identity, or none."""
    return {"freeze": ("W_V",), "value_init": "identity"} if frozen else {}


def best_rows(result: TrainingResult) -> list[dict[str, Any]]:
    """The summary rows of the better learning rate, one per seed."""
    table = result.summary()
    chosen: Any = table[table["lr"] == result.best_learning_rate]
    names = ["seed", "lr", "accuracy", "bayes_accuracy", "constructed_accuracy"]
    return [{str(k): v for k, v in row.items()} for row in chosen[names].to_dict("records")]
