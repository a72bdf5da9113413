"""The models or matrices that geometry and memory fits are computed for, by name.

Everything is computed in float64 on the CPU, from copies.

>>> import torch
>>> list(named([torch.eye(2), torch.eye(3)]))
['matrix 0', 'matrix 1']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor
from transformer_lens import FactoredMatrix

from hijacklens.errors import InputError
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult

Models: TypeAlias = Any
"""A matrix (a tensor or a FactoredMatrix), a hooked model, or a `TrainingResult`; a list of
matrices or models; or a mapping from names to them. A `TrainingResult` means its models of the
best learning rate, one per seed."""


def named(model: Models) -> dict[str, Any]:
    """Return the models and matrices under their names.

    Raises:
        InputError: No model or matrix is given.
    """
    if isinstance(model, TrainingResult):
        rates = model.table["lr"] == model.best_learning_rate
        seeds = model.table.loc[rates, "seed"]
        return {f"seed {seed}": m for seed, m in zip(seeds, model.best(), strict=True)}
    if isinstance(model, Mapping):
        items = {str(name): item for name, item in model.items()}
    else:
        several = isinstance(model, Sequence) and not isinstance(model, (str, bytes))
        listed = list(model) if several else [model]
        names = [_name(item) for item in listed]
        times = Counter(names)
        items = {
            f"{name} {i}" if times[name] > 1 else name: item
            for i, (name, item) in enumerate(zip(names, listed, strict=True))
        }
    if not items:
        raise InputError("no model or matrix is given; give at least one.")
    return items


def task_of(model: Models, task: ConceptTask | None) -> ConceptTask | None:
    """Return `task`, or else the task of a `TrainingResult`."""
    return model.task if task is None and isinstance(model, TrainingResult) else task


def matrix(
    item: Any, read: Callable[[Any], Any] = lambda model: None, *, name: str
) -> Float64[Tensor, "rows columns"]:
    """Return a matrix, or the matrix that `read` finds in a model, in float64 on the CPU.

    Raises:
        InputError: The item has no matrix, or the matrix has entries that are not finite.
    """
    values = item if isinstance(item, (Tensor, FactoredMatrix)) else read(item)
    if isinstance(values, FactoredMatrix):
        values = values.A.detach().cpu().double() @ values.B.detach().cpu().double()
    if not isinstance(values, Tensor) or values.ndim != 2 or 0 in values.shape:
        what = f"{type(values).__name__} {list(getattr(values, 'shape', []))}"
        raise InputError(
            f"{name!r} does not give a matrix (it gives {what}); give a tensor "
            "[rows, columns], or a hooked model."
        )
    values = values.detach().cpu().double().clone()
    if not torch.isfinite(values).all():
        raise InputError(f"the matrix of {name!r} has entries that are not finite.")
    return values


def embedding(item: Any, *, name: str) -> Float64[Tensor, "vocab d_model"]:
    """Return a matrix itself, or the embeddings W_E of a model, one row per token."""
    return matrix(item, lambda model: getattr(model, "W_E", None), name=name)


def _name(item: Any) -> str:
    if isinstance(item, OneLayerTransformer):
        return f"seed {item.config.seed}"
    if isinstance(item, (Tensor, FactoredMatrix)):
        return "matrix"
    return str(getattr(getattr(item, "cfg", None), "model_name", type(item).__name__))
