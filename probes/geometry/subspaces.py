"""Subspaces that value matrices read from and write to, and the angles between them (figure C.3).

Matrices here act on row vectors, y = x @ W with W [d_in, d_out] = U S V^T, so

    left  singular vectors, U: directions that W reads,  in the space of its input
    right singular vectors, V: directions that W writes, in the space of its output

The paper's W_V acts on columns and is the transpose of ours: **its left subspace is our right one,
its right our left**. It does not say which one figure C.3 shows; both are reported. They are equal
for a symmetric W, such as the memory of equation 5.1.

Only subspaces are compared, so the scale and sign of a matrix do not matter. The subspace of rank r
is well determined only if the singular values r and r + 1 differ; their ratio is the `gap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import linalg
from torch import Tensor
from transformer_lens import FactoredMatrix

from hijacklens import plots
from hijacklens.errors import InputError, choice
from hijacklens.one_layer import memory
from hijacklens.one_layer.embeddings import gaussian_embedding, seeded_generator
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask, TaskRecord
from hijacklens.renamed import renamed
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from probes import named_models
from probes.named_models import Models

Side: TypeAlias = Literal["left", "right"]
"""`left`: what a matrix reads; `right`: what it writes (row vectors; the paper's are opposite)."""
Reference: TypeAlias = Callable[[OneLayerTransformer, torch.Generator], Tensor]
"""Makes a matrix to compare a model's W_V with."""
SIDES: tuple[Side, ...] = get_args(Side)
WHAT = {"left": "left (what W reads)", "right": "right (what W writes)"}
COLUMNS = ("model", "reference", "draw", "side", "index", "degrees", "gap", "reference_gap")


@dataclass(frozen=True, kw_only=True, eq=False)
class PrincipalAngles(Result):
    """The principal angles between the singular subspaces of two matrices, in degrees."""

    degrees: tuple[float, ...]
    """The largest first, each from 0 to 90."""
    side: Side
    rank: int
    gap: float
    """s_r / s_(r+1) of the first matrix: infinite if its rank is r, 1 if the subspace is not
    determined."""
    other_gap: float
    """The same for the second matrix."""
    provenance: Provenance
    derived: ClassVar = {"angles.csv": "to_dataframe"}

    @property
    def smallest(self) -> float:
        """The smallest angle, as in figure C.3: 0 if the subspaces share a direction."""
        return self.degrees[-1]

    @property
    def largest(self) -> float:
        """The largest angle: 0 only if the subspaces are equal."""
        return self.degrees[0]

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per angle, the smallest first: `index` (from 1), `degrees`, `side`."""
        rows = enumerate(reversed(self.degrees), start=1)
        return pd.DataFrame([{"index": i, "degrees": d, "side": self.side} for i, d in rows])

    def plot(self) -> Figure:
        """Plot the angles, the smallest first."""
        table = self.to_dataframe()
        with plots.canvas(width=4.6, height=3.2) as (figure, (axes,)):
            axes.bar(table["index"], table["degrees"], color=plots.COLOURS[0], width=0.6)
            axes.set(xlabel=f"principal angle, {WHAT[self.side]}", ylabel="degrees", ylim=(0, 92))
            axes.set_xticks(table["index"])
        return figure

    def glance(self) -> Glance:
        """Return the smallest, the mean and the largest angle."""
        mean = sum(self.degrees) / len(self.degrees)
        ends = {"smallest": self.smallest, "mean": mean, "largest": self.largest}
        return Glance(
            f"principal angles, {WHAT[self.side]}, rank {self.rank}; the next singular value is "
            f"{self.gap:.3g} and {self.other_gap:.3g} times smaller",
            (Grid.of([ends], {f"{name} (degrees)": f"{{{name}:.1f}}" for name in ends}),),
            steps=("degrees", "to_dataframe()", "plot()", "save(folder)"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueAngleSettings:
    """The settings of `value_angles`."""

    rank: int
    draws: int
    references: tuple[str, ...]
    task: TaskRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueAngles(Result):
    """Angles between trained value matrices and reference matrices (figure C.3)."""

    table: Annotated[pd.DataFrame, Stored("angles.parquet", columns=COLUMNS)]
    """A row per model, reference, draw, side and angle: `model, reference, draw, side, index`
    (from 1, the smallest first), `degrees`, and `gap` and `reference_gap` (s_r / s_(r+1))."""
    settings: ValueAngleSettings
    provenance: Provenance
    derived: ClassVar = {"summary.csv": "summary"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return a copy of `table`."""
        return self.table.copy()

    def smallest(self) -> pd.DataFrame:
        """Return the smallest angle, averaged over draws: a row per model, reference and side."""
        first = self.table[self.table["index"] == 1]
        keys = ["model", "reference", "side"]
        return first.groupby(keys, sort=False)["degrees"].mean().reset_index()

    def summary(self) -> pd.DataFrame:
        """Return a row per reference and side: mean over models of the smallest and all angles.

        `reference, side, models, smallest, smallest_std` (over models), `mean, largest`, and the
        minimal `gap` and `reference_gap`.
        """
        keys = ["reference", "side"]
        groups = self.table.groupby(keys, sort=False)
        smallest = self.smallest().groupby(keys, sort=False)["degrees"]
        last = self.table[self.table["index"] == self.settings.rank].groupby(keys, sort=False)
        columns = {
            "models": smallest.size(),
            "smallest": smallest.mean(),
            "smallest_std": smallest.std(),
            "mean": groups["degrees"].mean(),
            "largest": last["degrees"].mean(),
            "gap": groups["gap"].min(),
            "reference_gap": groups["reference_gap"].min(),
        }
        return pd.DataFrame(columns).reset_index()

    def plot(self) -> Figure:
        """Plot the smallest angle by reference, a point per model and a panel per side."""
        points = self.smallest()
        names = list(points["reference"].unique())
        with plots.canvas(1, 2, width=3.9, height=3.3, share_y=True) as (figure, axes):
            for ax, side in zip(axes, SIDES, strict=True):
                for i, name in enumerate(names):
                    series = (points["reference"] == name) & (points["side"] == side)
                    y = points.loc[series, "degrees"].to_numpy()
                    x = i + np.linspace(-0.16, 0.16, len(y)) * (len(y) > 1)
                    colour, marker = plots.series(i)
                    ax.plot(x, y, marker, color=colour, ms=5, alpha=0.85, lw=0)
                    ax.hlines(y.mean(), i - 0.28, i + 0.28, color=colour, lw=2)
                ax.set_xticks(range(len(names)), map(plots.escape, names))
                ax.set(title=WHAT[side], ylim=(0, 92), xlim=(-0.6, len(names) - 0.4))
                ax.grid(visible=False, axis="x")
            rank = self.settings.rank
            axes[0].set_ylabel(f"smallest principal angle\nof rank {rank} parts (degrees)")
        return figure

    def glance(self) -> Glance:
        """Return the smallest and the mean angle by reference and side, over the models."""
        columns = {
            "reference": "{reference}",
            "side": "{side}",
            "smallest (degrees)": "{smallest:.1f}",
            "mean (degrees)": "{mean:.1f}",
        }
        return Glance(
            f"W_V of {self.table['model'].nunique()} models · rank {self.settings.rank}",
            (Grid.of(self.summary(), columns),),
        )

    def findings(self) -> dict[str, Any]:
        """Return the summary."""
        return {"summary": self.summary().to_dict("records")}


def principal_angles(
    A: Tensor | FactoredMatrix, B: Tensor | FactoredMatrix, *, rank: int, side: Side
) -> PrincipalAngles:
    """Return all principal angles between the rank-r singular subspaces of two matrices.

    Args:
        A: A matrix that acts on row vectors.
        B: Another, with the same number of rows for the left side, of columns for the right.
        rank: The number of singular vectors that span the subspaces.
        side: See the module for the paper's convention.

    Raises:
        InputError: The rank is above a matrix's rank, or the subspaces lie in different spaces.
    """
    choice("side", side, SIDES, "left is what a matrix reads, right what it writes.")
    first, second = _Subspaces.of(A, rank, name="A"), _Subspaces.of(B, rank, name="B")
    return PrincipalAngles(
        degrees=first.angles(second, side),
        side=side,
        rank=rank,
        gap=first.gap,
        other_gap=second.gap,
        provenance=Provenance.now(),
    )


@renamed(source="model")
def value_angles(
    model: Models,
    task: ConceptTask | None = None,
    *,
    rank: int | None = None,
    references: Mapping[str, Reference] | None = None,
    draws: int = 8,
    seed: int = 0,
) -> ValueAngles:
    """Compare trained value matrices with constructed, random and Gaussian ones (figure C.3).

    The constructed and the random memory are made from the model's own trained embeddings. The
    Gaussian matrix represents the initialisation, but is an independent draw. For the initial
    matrix of the run itself, give
    `{"start": lambda model, draw: OneLayerTransformer(model.config).W_V[0, 0]}`.

    Args:
        model: One-layer models: see `probes.named_models`.
        task: The task; by default the task of the `TrainingResult`.
        rank: Rank of the compared subspaces; by default m, as in the paper.
        references: Name -> function of a model and a generator that makes a matrix to compare
            with. None for `constructed`, `random` and `gaussian`.
        draws: The number of draws of each reference; figure C.3 has one draw per run.
        seed: Seed of the draws; each model, reference and draw has a separate generator.

    Raises:
        InputError: The models are not one-layer models of this task, or their matrices do not
            have this rank.
    """
    task = named_models.task_of(model, task)
    if task is None:
        raise InputError("no task is given; pass the ConceptTask that the models were made for.")
    if draws < 1:
        raise InputError(f"draws is {draws!r}; give at least 1.")
    references = references or standard_references(task)
    models = named_models.named(model)
    for name, item in models.items():
        if not isinstance(item, OneLayerTransformer):
            raise InputError(
                f"value_angles is for one-layer models, and {name!r} is {type(item).__name__}. "
                "Give OneLayerTransformers or a TrainingResult."
            )
    rank = task.bits if rank is None else rank
    rows: list[tuple[Any, ...]] = []
    for number, (name, item) in enumerate(models.items()):
        trained = _Subspaces.of(item.W_V[0, 0], rank, name=name)
        for which, (reference, make) in enumerate(references.items()):
            for draw in range(draws):
                with torch.no_grad():
                    W = make(item, seeded_generator(seed, number, which, draw))
                other = _Subspaces.of(W, rank, name=reference)
                for side in SIDES:
                    rows += [
                        (name, reference, draw, side, i, degrees, trained.gap, other.gap)
                        for i, degrees in enumerate(trained.angles(other, side)[::-1], start=1)
                    ]
    return ValueAngles(
        table=pd.DataFrame(rows, columns=list(COLUMNS)),
        settings=ValueAngleSettings(
            rank=rank, draws=draws, references=tuple(references), task=task
        ),
        provenance=Provenance.now(seed=seed),
    )


def standard_references(task: ConceptTask) -> dict[str, Reference]:
    """Return the references of figure C.3: equation 5.1, a random memory, a Gaussian matrix."""
    return {
        "constructed": lambda model, draw: memory.constructed(model.W_E.detach().cpu(), task),
        "random": lambda model, draw: memory.random(model.W_E.detach().cpu(), task, draw),
        "gaussian": lambda model, draw: gaussian_embedding(
            model.config.d_model, model.config.d_model, draw
        ),
    }


@dataclass(frozen=True, slots=True)
class _Subspaces:
    """The first singular vectors of a matrix on both sides, as columns."""

    left: np.ndarray
    right: np.ndarray
    gap: float

    @classmethod
    def of(cls, item: Any, rank: int, *, name: str) -> _Subspaces:
        W = named_models.matrix(item, name=name)
        U, s, V = np.linalg.svd(W.numpy(), full_matrices=False)
        # Singular vectors of values that are 0 up to rounding are arbitrary.
        full = int((s > s[0] * max(W.shape) * np.finfo(float).eps).sum())
        if not 1 <= rank <= full:
            raise InputError(
                f"rank must lie in 1..{full}, the rank of {name!r} {list(W.shape)}; got {rank!r}."
            )
        gap = float(s[rank - 1] / s[rank]) if rank < full else math.inf
        return cls(U[:, :rank], V[:rank].T, gap)

    def angles(self, other: _Subspaces, side: Side) -> tuple[float, ...]:
        """Return the angles to another subspace in degrees, the largest first."""
        mine, yours = getattr(self, side), getattr(other, side)
        if len(mine) != len(yours):
            raise InputError(
                f"the {side} subspaces lie in spaces of {len(mine)} and {len(yours)} dimensions "
                "and have no angles; give matrices of one shape."
            )
        return tuple(float(d) for d in np.degrees(linalg.subspace_angles(mine, yours)))
