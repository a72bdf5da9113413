"""Geometry of embeddings: inner products by distance, the fit of equation 5.2, spectra.

Figures 3b, C.5 and C.6: after training, the inner product of two embeddings falls with the Hamming
distance of their tokens and jumps at 0 (`hamming_fit`). `fit` measures this, also on any tokens of
a language model with a matrix of distances of your own. `spectrum` gives the singular values of
figures C.9 to C.12 (`probes.geometry.spectra`), and `probes.geometry.subspaces` principal angles.

Embeddings are rows, W_E [vocab, d_model], and inner products are in the units of the model. The
cost is O(vocab^2 d_model) time and [vocab, vocab] of memory for the compared tokens.

>>> from hijacklens.one_layer.embeddings import hamming_geometry
>>> from hijacklens.one_layer.task import ConceptTask, TaskRecord
>>> result = fit(hamming_geometry(5, a=0.1, b=0.5, b0=1.0), ConceptTask(bits=5))
>>> [f"{value:.2f}" for value in result.summary()["mean"][:5]]
['1.00', '0.40', '0.30', '0.20', '0.10']
>>> result.fit_summary().loc[["a", "b", "jump"], "value"].round(3).tolist()
[0.1, 0.5, 0.5]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from hijacklens import plots
from hijacklens.errors import InputError, choice
from hijacklens.one_layer.task import ConceptTask, TaskRecord
from hijacklens.renamed import old_names, renamed
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from probes import named_models
from probes.geometry.hamming_fit import GramFit, fit_gram
from probes.geometry.spectra import Spectra, spectrum
from probes.named_models import Models

__all__ = ["InnerProducts", "Scaling", "Spectra", "fit", "spectrum"]

__getattr__ = old_names(__name__, inner_products="fit")

Scaling: TypeAlias = Literal["raw", "centred", "unit", "centred-unit"]
"""Unchanged embeddings; minus their mean; scaled to length 1; or both, in that order."""

COLUMNS = ("model", "distance", "pairs", "mean", "std")
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerProductSettings:
    """The settings of `fit`."""

    scaling: Scaling
    bits: int | None
    """Bits of the task, if the distances are Hamming distances."""
    tokens: tuple[int, ...] | None
    """The compared tokens; None for all."""
    task: TaskRecord | None


@dataclass(frozen=True, kw_only=True, eq=False)
class InnerProducts(Result):
    """Inner products of embeddings by distance, with the fit of equation 5.2 for each model."""

    table: Annotated[pd.DataFrame, Stored("inner_products.parquet", columns=COLUMNS)]
    """A row per model and distance: `model, distance, pairs` (unordered pairs of different tokens;
    at distance 0 the number of tokens), `mean` inner product and its standard deviation `std`."""
    fits: Annotated[pd.DataFrame, Stored("fits.parquet", columns=("model", "a", "b", "b0"))]
    """A row per model: `model`, the fields of `GramFit`, `jump`; for Hamming distances (NaN for
    others) also whether such embeddings exist (`feasible`) and the eigenvalues that the fit
    predicts for the Gram matrix: `constant` (once), `linear` (m times), `bulk`."""
    settings: InnerProductSettings
    provenance: Provenance
    derived: ClassVar = {"summary.csv": "summary"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return a copy of `table`."""
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """Return a row per distance: the mean over models with its 95% interval.

        `distance, models, pairs` (of one model), `mean, low, high` (Student's t over models; NaN
        for a single one), `std` (mean over models of the spread over pairs).
        """
        groups = self.table.groupby("distance")
        table = pd.DataFrame({distance: _student(of["mean"]) for distance, of in groups}).T
        table = table.rename(columns={"value": "mean"}).rename_axis("distance")
        counts = {"models": groups.size(), "pairs": groups["pairs"].first()}
        table = table.assign(**counts, std=groups["std"].mean()).reset_index()
        return table.loc[:, ["distance", "models", "pairs", "mean", "low", "high", "std"]]

    def fit_summary(self) -> pd.DataFrame:
        """Return a row per fitted number: its mean over models and 95% interval, `low, high`."""
        numbers = self.fits.drop(columns="model").astype(float)
        return pd.DataFrame({name: _student(numbers[name]) for name in numbers}).T

    def plot(self) -> Figure:
        """Plot the mean inner product against distance, equation 5.2 and the plain line.

        Points are means over models with their 95% interval; the band is one standard deviation
        over the pairs of a model.
        """
        with plots.canvas(width=5.6, height=3.9) as (figure, (axes,)):
            summary, fit = self.summary(), self.fit_summary()["value"]
            x, mean = summary["distance"].to_numpy(float), summary["mean"].to_numpy()
            spread = summary["std"].fillna(0.0).to_numpy()
            blue, orange, grey = plots.COLOURS[0], plots.COLOURS[1], "#777777"
            axes.fill_between(x, mean - spread, mean + spread, color=blue, alpha=0.15, lw=0)
            ends = np.nan_to_num([mean - summary["low"], summary["high"] - mean])
            models = summary["models"].max()
            label = "mean" + (f" of {models} models (95%)" if models > 1 else "")
            axes.errorbar(
                x, mean, yerr=ends, fmt="o", ms=5, lw=1.2, color=blue, label=label, zorder=3
            )
            D = np.array([0.0, x[x > 0].min(), x.max()])
            line, plain = fit["b"] - fit["a"] * D, fit["linear_b"] - fit["linear_a"] * D
            label = f"eq. 5.2: {fit['b']:.3g} - {fit['a']:.3g} D, R² {fit['r2']:.2f}"
            axes.plot(D[1:], line[1:], color=orange, lw=1.6, label=label)
            axes.plot(D[:2], line[:2], color=orange, ls="--")
            label = f"line through D = 0 too, R² {fit['linear_r2']:.2f}"
            axes.plot(D, plain, color=grey, lw=1.2, ls=":", label=label)
            arrow = {"arrowstyle": "<->", "color": orange, "lw": 1.2}
            axes.annotate("", xy=(0, fit["b0"]), xytext=(0, fit["b"]), arrowprops=arrow)
            middle = float(fit["b0"] + fit["b"]) / 2
            axes.text(float(0.03 * x.max()), middle, f"jump {fit['jump']:.3g}", color=orange)
            kind = "Hamming distance" if self.settings.bits else "distance"
            product = "inner product" if "unit" not in self.settings.scaling else "cosine"
            axes.set(xlabel=f"{kind} of the tokens", ylabel=f"{product} of embeddings")
            plots.legend_below(figure, [axes], columns=2)
        return figure

    def glance(self) -> Glance:
        """Return the fit of equation 5.2, as means over the models."""
        models, distances = self.fits["model"].nunique(), self.table["distance"].nunique()
        columns = {
            "fit of equation 5.2": "{number}",
            "mean": "{value:.4g}",
            "95% over models": "[{low:.4g}, {high:.4g}]",
        }
        return Glance(
            f"{models} models · embeddings {self.settings.scaling} · {distances} distances",
            (Grid.of(self.fit_summary().rename_axis("number").reset_index(), columns),),
            steps=("summary()", "fit_summary()", "plot()", "save(folder)"),
        )

    def findings(self) -> dict[str, Any]:
        """Return each fitted number with its interval over models."""
        return {"fit": self.fit_summary().to_dict("index")}


@renamed(source="model")
def fit(
    model: Models,
    distances: ConceptTask | Tensor | np.ndarray | None = None,
    *,
    tokens: Sequence[int] | None = None,
    scaling: Scaling = "raw",
) -> InnerProducts:
    """Fit equation 5.2 to inner products of embeddings by distance (figures 3b, C.5, C.6).

    Args:
        model: Embeddings [vocab, d_model], a model (its W_E; for an unembedding give
            `model.W_U.T`), or several: see `probes.named_models`. Intervals are over these.
        distances: A task, for Hamming distances; a matrix [token, token], symmetric, 0 on the
            diagonal and above 0 elsewhere; or None for the task of a `TrainingResult`.
        tokens: The tokens of the matrix, in its order; None for the complete vocabulary.
        scaling: How to scale the embeddings first, over the compared tokens.

    Raises:
        InputError: The distances do not fit the embeddings, are invalid, or are all equal.
    """
    choice("scaling", scaling, get_args(Scaling))
    task = named_models.task_of(model, distances if isinstance(distances, ConceptTask) else None)
    if distances is None or isinstance(distances, ConceptTask):
        if task is None:
            raise InputError(
                "no distances are given: pass the task for Hamming distances, or a matrix "
                "[token, token]."
            )
        distance, bits = task.hamming().numpy(), task.bits
        if tokens is not None:
            raise InputError("tokens= needs a matrix of distances; a task has its own tokens.")
    else:
        distance, bits = np.asarray(distances), None
        _check_distances(distance)
    tables: list[pd.DataFrame] = []
    fits: list[dict[str, Any]] = []
    for name, item in named_models.named(model).items():
        W_E = _of_tokens(named_models.embedding(item, name=name), tokens, len(distance), name=name)
        E = _scaled(W_E, scaling, name=name)
        gram = (E @ E.T).numpy()
        upper = np.triu_indices(len(gram))  # the diagonal is distance 0
        pairs = pd.DataFrame({"distance": distance[upper].astype(float), "inner": gram[upper]})
        by_distance = pairs.groupby("distance")["inner"].agg(pairs="size", mean="mean", std="std")
        tables.append(by_distance.reset_index().assign(model=name))
        fit = fit_gram(gram, distance)
        fits.append({"model": name, **asdict(fit), "jump": fit.jump, **_predicted(fit, bits)})
    return InnerProducts(
        table=pd.concat(tables, ignore_index=True).loc[:, list(COLUMNS)],
        fits=pd.DataFrame(fits),
        settings=InnerProductSettings(
            scaling=scaling,
            bits=bits,
            tokens=None if tokens is None else tuple(int(t) for t in tokens),
            task=task,
        ),
        provenance=Provenance.now(),
    )


def _predicted(fit: GramFit, bits: int | None) -> dict[str, float]:
    levels = ("constant", "linear", "bulk")
    if bits is None:
        return dict.fromkeys(("feasible", *levels), math.nan)
    spectrum = fit.eigenvalues(bits)
    return {"feasible": float(fit.feasible(bits))} | {n: getattr(spectrum, n) for n in levels}


def _student(values: pd.Series) -> dict[str, float]:
    """Return the mean and the ends of its Student's t interval, NaN for a single value."""
    mean, n = float(values.mean()), len(values)
    half = math.nan
    if n > 1:
        half = float(values.std(ddof=1) / math.sqrt(n) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return {"value": mean, "low": mean - half, "high": mean + half}


def _of_tokens(W_E: Tensor, tokens: Sequence[int] | None, size: int, *, name: str) -> Tensor:
    if tokens is None:
        if len(W_E) != size:
            raise InputError(
                f"{name!r} embeds {len(W_E)} tokens, and the distances are those of {size}. Give "
                "distances for all of them, or say which tokens the matrix is about (tokens=)."
            )
        return W_E
    index = [int(token) for token in tokens]
    if len(set(index)) != len(index) or len(index) != size:
        raise InputError(
            f"tokens names {len(set(index))} different tokens in {len(index)} entries, and the "
            f"distances are those of {size}: each row needs a separate token."
        )
    if not 0 <= min(index) <= max(index) < len(W_E):
        raise InputError(
            f"tokens run from {min(index)} to {max(index)}; {name!r} has 0 to {len(W_E) - 1}."
        )
    return W_E[index]


def _scaled(E: Tensor, scaling: Scaling, *, name: str) -> Float64[Tensor, "token d_model"]:
    if scaling.startswith("centred"):
        E = E - E.mean(0)
    if scaling.endswith("unit"):
        length = torch.linalg.vector_norm(E, dim=1, keepdim=True)
        if not bool((length > 0).all()):
            raise InputError(f"{name!r} has an embedding of length 0, which has no direction.")
        E = E / length
    return E


def _check_distances(distance: np.ndarray) -> None:
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1] or not distance.size:
        raise InputError(f"distances must be a square matrix, got {list(distance.shape)}.")
    others = distance[~np.eye(len(distance), dtype=bool)]
    symmetric = np.isfinite(distance).all() and np.array_equal(distance, distance.T)
    if not (symmetric and not distance.diagonal().any() and (others > 0).all()):
        raise InputError(
            "distances must be finite, symmetric, 0 on the diagonal and above 0 elsewhere: "
            "distance 0 is a token to itself. Give every row a separate token."
        )
