"""Spectra: singular values of embeddings, value matrices or OV circuits, and the gap in them.

Figures C.9 to C.12: the singular values of trained embeddings form two groups, a few large ones
and a bulk. Equation 5.2 predicts them: its Gram matrix has the eigenvalues of
`hijacklens.one_layer.embeddings.gram_eigenvalues`, and singular values of W_E are their square
roots (reference page, 7.3). m of them, one per bit, are above the bulk; whether the one of the
constant direction is depends on b. So the gap is measured below both m and m + 1 values.

With d_model < vocab the fitted equation cannot hold exactly: its bulk has vocab - m - 1 directions
and only d_model - m - 1 exist. There are two predictions: `predicted` follows the equation, and
`squeezed` divides the sum of the bulk's eigenvalues (which the trace of the Gram matrix fixes)
among the directions that exist. The second is ours, not the paper's.

The cost is one singular value decomposition per matrix, O(vocab d_model min(vocab, d_model)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import special
from torch import Tensor

from hijacklens import plots
from hijacklens.errors import InputError, choice
from hijacklens.one_layer import hypercube
from hijacklens.one_layer.task import ConceptTask, TaskRecord
from hijacklens.renamed import renamed
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from probes import named_models
from probes.geometry.hamming_fit import fit_gram
from probes.named_models import Models

Weight: TypeAlias = Literal["W_E", "W_V"]
COLUMNS = ("model", "index", "value", "predicted", "squeezed")
MOST_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumSettings:
    """The settings of `spectrum`; `matrix` may be the label that was given."""

    matrix: str
    top: tuple[int | None, ...]
    task: TaskRecord | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectra(Result):
    """Singular values of one or several matrices, with the gap below the `top` largest."""

    table: Annotated[pd.DataFrame, Stored("spectrum.parquet", columns=COLUMNS)]
    """A row per model and singular value, the largest first: `model, index` (from 1), `value`, and
    the `predicted` and `squeezed` values of equation 5.2 (NaN for other matrices than W_E)."""
    gaps: Annotated[pd.DataFrame, Stored("gaps.parquet", columns=("model", "top", "ratio"))]
    """The table that `summary` returns."""
    settings: SpectrumSettings
    provenance: Provenance
    derived: ClassVar = {"summary.csv": "gaps"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return a copy of `table`."""
        return self.table.copy()

    def summary(self) -> pd.DataFrame:
        """Return a row per model and k.

        - `top`: k, the number of values above the gap: m and m + 1 for a task, otherwise the
          argument `top` of `spectrum` or the position of the largest drop.
        - `ratio`: s_k / s_(k+1), infinite if s_(k+1) is 0; `gap`: s_k - s_(k+1).
        - `over_bulk`: s_k over the mean of all smaller values; `top_share`: fraction of the
          squared Frobenius norm in the k largest.
        - `largest_drop`: the k with the largest ratio s_k / s_(k+1), to compare with `top`,
          without values that are 0 up to rounding.
        - `stable_rank`: |W|_F^2 / |W|_2^2; `effective_rank`: the exponential of the entropy of
          s / sum s (Roy and Vetterli 2007).
        - `bit_share`: for W_E with a task, the fraction of the k left singular vectors in the
          span of the constant function of a token and of its single bits: 1 if the large
          directions are those of equation 5.2. NaN otherwise.
        - `predicted_ratio`, `predicted_ratio_squeezed`: the ratio by equation 5.2, fitted to this
          model, and with its bulk squeezed into d_model.
        """
        return self.gaps.copy()

    def plot(self) -> Figure:
        """Plot singular values by index, a line per model; dashed: equation 5.2."""
        with plots.canvas(width=5.6, height=3.8) as (figure, (axes,)):
            groups = self.table.groupby("model", sort=False)
            few = groups.ngroups <= MOST_COLOURS
            for i, (name, rows) in enumerate(groups):
                colour, marker = plots.series(i) if few else (plots.COLOURS[0], ".")
                style = {"color": colour, "marker": marker, "alpha": 1 if few else 0.35}
                style["label"] = plots.escape(str(name)) if few else None
                axes.plot(rows["index"], rows["value"], ms=3.5, lw=1, **style)
            styles = {
                "predicted": ("--", "eq. 5.2 as fitted"),
                "squeezed": (":", "eq. 5.2, bulk in d"),
            }
            mean = self.table.loc[:, ["index", *styles]].groupby("index").mean()
            for column, (style, label) in styles.items():
                if mean[column].notna().any():
                    axes.plot(mean.index, mean[column], style, color="black", lw=1.3, label=label)
            for top in self.settings.top:
                if top is not None:
                    axes.axvline(top + 0.5, color="#888888", lw=0.9)
                    look = {"ha": "center", "va": "bottom", "fontsize": 8, "color": "#555555"}
                    at = axes.get_xaxis_transform()
                    axes.text(top + 0.5, 1.0, f"{top}", transform=at, **look)
            ylabel = f"singular value of {self.settings.matrix}"
            axes.set(xlabel="index", ylabel=ylabel, ylim=(0, None))
            plots.legend_below(figure, [axes])
        return figure

    def glance(self) -> Glance:
        """Return the gap of each model below its largest singular values."""
        columns = {
            "model": "{model}",
            "k largest": "{top:d}",
            "s_k / s_(k+1)": "{ratio:.3g}",
            "fraction of |W|²": "{top_share:.0%}",
            "effective rank": "{effective_rank:.1f}",
        }
        return Glance(
            f"{self.settings.matrix} of {self.table['model'].nunique()} models",
            (Grid.of(self.gaps, columns),),
        )

    def findings(self) -> dict[str, Any]:
        """Return the numbers of the summary as means over models, for each k."""
        means = self.gaps.drop(columns="model").astype(float).groupby("top").mean().reset_index()
        return {"means": means.to_dict("records")}


@renamed(source="model")
def spectrum(
    model: Models,
    *,
    matrix: Weight = "W_E",
    task: ConceptTask | None = None,
    top: int | None = None,
    label: str | None = None,
) -> Spectra:
    """Return singular values of a matrix of each model, and the gap in them (C.9 to C.12).

    Args:
        model: Models, or matrices of any kind (also a FactoredMatrix, such as the OV circuits of
            `probes.anatomy.matrices.ov_circuit`): see `probes.named_models`.
        matrix: The matrix of a model: `"W_E"`, or the `"W_V"` of a one-layer model. Given matrices
            are treated as this one.
        task: For W_E, the task of its tokens: equation 5.2 is then fitted for the predictions. A
            `TrainingResult` has its own task.
        top: k, the number of values above the gap; by default both m and m + 1 with a task, and
            the position of the largest drop otherwise.
        label: The name of the matrix in the plot, if not `matrix`.

    Raises:
        InputError: A model has no such matrix, `top` is not below the number of singular values,
            or the embeddings are not those of the task.
    """
    choice("matrix", matrix, get_args(Weight), "Or give matrices instead of models.")
    task = named_models.task_of(model, task)
    tops: list[int | None] = [top]
    if task is not None and top is None:
        tops = [task.bits, task.bits + 1]
    frames: list[pd.DataFrame] = []
    rows: list[dict[str, Any]] = []
    for name, item in named_models.named(model).items():
        if matrix == "W_E":
            W = named_models.embedding(item, name=name)
        else:
            W = named_models.matrix(item, _only_value_matrix, name=name)
        frame, gaps = _spectrum_of(W, tops, task if matrix == "W_E" else None, name=name)
        frames.append(frame)
        rows.extend(gaps)
    return Spectra(
        table=pd.concat(frames, ignore_index=True),
        gaps=pd.DataFrame(rows),
        settings=SpectrumSettings(matrix=label or matrix, top=tuple(tops), task=task),
        provenance=Provenance.now(),
    )


def _spectrum_of(
    W: Tensor, tops: list[int | None], task: ConceptTask | None, *, name: str
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    if task is not None and len(W) != task.vocab:
        raise InputError(
            f"{name!r} has {len(W)} rows, and the task with bits={task.bits} has {task.vocab} "
            "tokens. Give the embeddings of this task, or no task."
        )
    left, values, _ = torch.linalg.svd(W, full_matrices=False)
    s = values.numpy()
    if not s[0] > 0:
        raise InputError(f"the matrix of {name!r} is zero; it has no spectrum.")
    predicted = squeezed = np.full(len(s), math.nan)
    if task is not None:
        predicted, squeezed = _predictions(W, task, len(s))
    drop, share = _largest_drop(s), s / s.sum()
    rows = []
    for top in tops:
        k = drop if top is None else top
        if not 1 <= k < max(len(s), 2):
            raise InputError(
                f"there is no gap below the {k} largest of {len(s)} singular values of {name!r}: "
                f"top must lie in 1..{len(s) - 1}."
            )
        rest = s[k:]
        rows.append(
            {
                "model": name,
                "top": k,
                "ratio": _ratio(s, k),
                "gap": float(s[k - 1] - (rest[0] if len(rest) else 0.0)),
                "over_bulk": float(s[k - 1] / rest.mean()) if rest.any() else math.inf,
                "top_share": float((s[:k] ** 2).sum() / (s**2).sum()),
                "largest_drop": drop,
                "stable_rank": float((s**2).sum() / s[0] ** 2),
                "effective_rank": float(np.exp(-special.xlogy(share, share).sum())),
                "bit_share": math.nan if task is None else _bit_share(left[:, :k], task),
                "predicted_ratio": _ratio(predicted, k),
                "predicted_ratio_squeezed": _ratio(squeezed, k),
            }
        )
    index = np.arange(1, len(s) + 1)
    columns = (name, index, s, predicted, squeezed)
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True))), rows


def _bit_share(left: Tensor, task: ConceptTask) -> float:
    """Return the fraction of the vectors in the span of the constant and the single bits."""
    tokens = torch.arange(task.vocab)
    functions = tokens[hypercube.weight(tokens, task.bits) <= 1]
    basis = hypercube.signs(functions, task.bits) / task.vocab**0.5
    return float((basis.T @ left).square().sum()) / min(left.shape[1], basis.shape[1])


def _predictions(W: Tensor, task: ConceptTask, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return singular values of the fitted equation 5.2, and with its bulk squeezed in `count`."""
    fitted = fit_gram((W @ W.T).numpy(), task.hamming().numpy()).eigenvalues(task.bits)
    large = [fitted.constant] + [fitted.linear] * task.bits
    _, _, times = fitted.multiplicities
    room = max(count - len(large), 0)
    bulk = fitted.bulk * times / room if room else 0.0
    return _roots(large + [fitted.bulk] * times, count), _roots(large + [bulk] * room, count)


def _roots(eigenvalues: list[float], count: int) -> np.ndarray:
    # A negative eigenvalue of the fit has no singular value; the nearest is 0.
    roots = np.sqrt(np.clip(np.sort(np.array(eigenvalues))[::-1][:count], 0, None))
    return np.pad(roots, (0, count - len(roots)))


def _ratio(s: np.ndarray, k: int) -> float:
    if not math.isfinite(s[0]):
        return math.nan
    below = float(s[k]) if k < len(s) else 0.0
    return float(s[k - 1]) / below if below > 0 else math.inf


def _largest_drop(s: np.ndarray) -> int:
    """Return the k with the largest s_k / s_(k+1) among values above rounding."""
    above = s[s > s[0] * max(len(s), 2) * np.finfo(float).eps * 10]
    return 1 if len(above) < 2 else int(np.argmax(above[:-1] / above[1:])) + 1


def _only_value_matrix(model: Any) -> Any:
    weights = getattr(model, "W_V", None)
    if not isinstance(weights, Tensor) or weights.shape[:2] != (1, 1):
        raise InputError(
            f"{type(model).__name__} does not have exactly one W_V. Give the matrices themselves "
            "under names: {'8.3': probes.anatomy.matrices.value_matrix(model, 8, 3), ...}."
        )
    return weights[0, 0]
