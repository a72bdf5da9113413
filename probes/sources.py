"""Sources: what geometry and memory fits can be asked about, by name.

A source is a matrix, a hooked model, or a result of training; several come as a list or under
names of your own. Everything is computed in float64 on the CPU, from copies.

>>> import torch
>>> list(named({"mine": torch.eye(2), "yours": torch.eye(3)}))
['mine', 'yours']
>>> list(named([torch.eye(2), torch.eye(3)]))
['matrix 0', 'matrix 1']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor
from transformer_lens import FactoredMatrix

from hijacklens.errors import InputError
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.trained import TrainingResult

Source: TypeAlias = Any
"""A matrix (a tensor or a FactoredMatrix), a hooked model, or a `TrainingResult`; a list of
matrices or models; or a mapping from names to them. A `TrainingResult` stands for its models of
the best learning rate, a seed each."""


def named(source: Source) -> dict[str, Any]:
    """The matrices and models of a source under their names.

    Raises:
        InputError: The source holds nothing.
    """
    if isinstance(source, TrainingResult):
        rates = source.table["lr"] == source.best_learning_rate
        seeds = source.table.loc[rates, "seed"]
        return {f"seed {s}": m for s, m in zip(seeds, source.best(), strict=True)}
    if isinstance(source, Mapping):
        found = {str(name): item for name, item in source.items()}
    elif isinstance(source, Sequence) and not isinstance(source, (str, bytes)):
        names = [_name(item) for item in source]
        twice = {name for name, times in Counter(names).items() if times > 1}
        found = {
            f"{name} {i}" if name in twice else name: item
            for i, (name, item) in enumerate(zip(names, source, strict=True))
        }
    else:
        found = {_name(source): source}
    if not found:
        raise InputError("no model or matrix is given; give at least one.")
    return found


def task_of(source: Source, task: ConceptTask | None) -> ConceptTask | None:
    """The task that is given, or else that of a `TrainingResult`."""
    return source.task if task is None and isinstance(source, TrainingResult) else task


def one_layer_models(source: Source, *, operation: str) -> dict[str, OneLayerTransformer]:
    """The one-layer models of a source.

    Raises:
        InputError: It holds something else.
    """
    models = named(source)
    for name, model in models.items():
        if not isinstance(model, OneLayerTransformer):
            raise InputError(
                f"{operation} is for one-layer models, and {name!r} is {type(model).__name__}. "
                "Give OneLayerTransformers or a TrainingResult."
            )
    return models


def matrix(item: Any, read: Callable[[Any], Any], *, name: str) -> Float64[Tensor, "rows columns"]:
    """A matrix, or what `read` finds in a model, as a copy in float64 on the CPU.

    Raises:
        InputError: There is no matrix, or one with numbers that are not finite.
    """
    found = item if isinstance(item, (Tensor, FactoredMatrix)) else read(item)
    if isinstance(found, FactoredMatrix):
        found = found.A.detach().cpu().double() @ found.B.detach().cpu().double()
    if not isinstance(found, Tensor) or found.ndim != 2 or 0 in found.shape:
        what = f"{type(found).__name__} {list(getattr(found, 'shape', []))}"
        raise InputError(
            f"{name!r} gives no matrix (it gives {what}); give a tensor [rows, columns], or a "
            "hooked model."
        )
    found = found.detach().cpu().double().clone()
    if not torch.isfinite(found).all():
        raise InputError(f"the matrix of {name!r} has entries that are not finite.")
    return found


def embedding(item: Any, *, name: str) -> Float64[Tensor, "vocab d_model"]:
    """The embeddings of a model, W_E, a row per token; or a matrix itself.

    Raises:
        InputError: As for `matrix`.
    """
    return matrix(item, lambda model: getattr(model, "W_E", None), name=name)


def write_table(table: pd.DataFrame) -> Callable[[Path], None]:
    """What writes a table of a result to a file."""
    return lambda path: table.to_parquet(path, index=False)


def read_table(folder: Path, name: str, *, columns: Sequence[str]) -> pd.DataFrame:
    """A table of a saved result.

    Raises:
        InputError: The file is missing, cannot be read or lacks columns.
    """
    try:
        table = pd.read_parquet(folder / name)
    except (OSError, ValueError) as error:
        raise InputError(f"the result in {str(folder)!r} is not whole: {error}") from error
    missing = sorted(set(columns) - set(table.columns))
    if missing:
        raise InputError(f"{folder / name} lacks columns: {missing}.")
    return table


def _name(item: Any) -> str:
    if isinstance(item, OneLayerTransformer):
        return f"seed {item.config.seed}"
    if isinstance(item, (Tensor, FactoredMatrix)):
        return "matrix"
    return str(getattr(getattr(item, "cfg", None), "model_name", type(item).__name__))
