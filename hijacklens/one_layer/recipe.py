"""How one-layer models are trained, and which of it the paper does not state.

>>> from hijacklens.one_layer.task import ConceptTask
>>> recipe = Recipe(dim=16, seeds=(0, 1), learning_rates=(0.01, 0.001))
>>> [(run.lr, run.model.seed) for run in recipe.runs(ConceptTask(bits=4))]
[(0.01, 0), (0.01, 1), (0.001, 0), (0.001, 1)]
"""

from __future__ import annotations

from dataclasses import dataclass

from hijacklens.errors import InputError, number, several, whole_number
from hijacklens.one_layer.architecture import OneLayerConfig
from hijacklens.one_layer.stacked_runs import Run
from hijacklens.one_layer.task import ConceptTask

EXAMPLES = {"seeds": "[0, 1]", "learning_rates": "[0.01, 0.001]", "freeze": "['W_V']"}
OUR_DEFAULTS = {
    "d_attn": "d_model",
    "steps": 4000,
    "batch": 128,
    "data": "fresh contexts each step",
    "optimizer": "AdamW, betas (0.9, 0.999), constant learning rate",
    "weight_decay": 0.01,
    "init_scale": "Gaussian of standard deviation 1 / sqrt(d_model) for every matrix",
    "evaluation": 8192,
    "seeds": 5,
    "choice of learning rate": "highest mean accuracy over the seeds",
}
"""What the paper does not state, with our default; saved with every result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the models of a result were trained. `OUR_DEFAULTS` says what is not the paper's."""

    dim: int
    """Width of the embeddings, d."""
    d_attn: int | None = None
    """Width of queries and keys, d_a; None for `dim`."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 4000
    batch: int = 128
    learning_rates: tuple[float, ...] = (0.01, 0.001)
    freeze: tuple[str, ...] = ()
    """What is not trained: any of `"W_E"`, `"W_V"`, `"W_QK"`."""
    value_init: str = "gaussian"
    """W_V starts `"gaussian"` or as the `"identity"`."""
    init_scale: float | None = None
    """Standard deviation of the Gaussian start; None for 1 / sqrt(dim)."""
    weight_decay: float = 0.01
    evaluation: int = 8192
    """Fresh contexts that each model is evaluated on."""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("seeds", "learning_rates", "freeze"):
            object.__setattr__(self, name, several(name, getattr(self, name), EXAMPLES[name]))
        seeds = tuple(whole_number("one of the seeds", seed) for seed in self.seeds)
        rates = tuple(number("one of learning_rates", rate) for rate in self.learning_rates)
        object.__setattr__(self, "seeds", seeds)
        object.__setattr__(self, "learning_rates", rates)
        object.__setattr__(self, "weight_decay", number("weight_decay", self.weight_decay))
        for name in ("seeds", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} are {values!r}; give at least one, each once.")
        for name in ("steps", "batch", "evaluation"):
            value = whole_number(name, getattr(self, name), least=1, most=2**31 - 1)
            object.__setattr__(self, name, value)

    def runs(self, task: ConceptTask) -> list[Run]:
        """One run per learning rate and seed: all seeds of the first learning rate first."""
        return [
            Run(task=task, model=self._model(task, seed), lr=lr, weight_decay=self.weight_decay)
            for lr in self.learning_rates
            for seed in self.seeds
        ]

    def _model(self, task: ConceptTask, seed: int) -> OneLayerConfig:
        return OneLayerConfig(
            vocab=task.vocab,
            d_model=self.dim,
            d_attn=self.d_attn,
            length=task.length,
            init_scale=self.init_scale,
            value_init=self.value_init,
            freeze=self.freeze,
            dtype=self.dtype,
            seed=seed,
        )
