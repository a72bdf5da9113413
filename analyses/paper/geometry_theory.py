"""Theorem 4 (8 in the appendix): embeddings of equation 5.2 with the memory of equation 5.1.

With embeddings of equation 5.2 the population logits are G A G p(. | y): Gram matrix, hypercube
adjacency, token distribution. All three are diagonal in the Walsh basis, so the margin is exact
for any (a, b, b0). Two consequences are checked against the matrices:

* b adds the same to all logits, and for fixed r = (b0 - b) / a the slope a scales them by a^2. So
  the answers depend on r alone (b only matters to whether such embeddings exist).
* At a = 1 the logit at distance k from y is, up to a constant, with q = exp(-1/beta) and the
  logits c(k) of orthonormal embeddings (reference page, 7.1),

      r^2 c(k)  -  2 k (m - 2) omega pi_1 (r + 2^m / 4),     pi_1 = ((1+q)^(m-1) (1-q) - 1) / Z

  For m >= 3 the first term favours the label. If pi_1 > 0, so does the second, and the margin is
  above 0 for every b0 >= b: a beta below 2.08 suffices, and more bits allow a larger one. If
  pi_1 < 0 the margin is below 0 at b0 = b and above 0 for large b0: the "large b0" of the theorem.
  So at beta = 1 its conditions are void; m = 3 at beta = 3 shows a case in which they matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from analyses.paper.constructed_error import highest_error, lowest_error, measured_error
from analyses.paper.lemmas import gram_matrix
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, exact, lowest, near
from analyses.reproduction.drawing import WILSON, draw_errors, draw_panels, sideways
from analyses.reproduction.settings import scales
from analyses.reproduction.workbench import Workbench
from hijacklens.errors import InputError
from hijacklens.one_layer import memory
from hijacklens.one_layer.architecture import OneLayerWeights
from hijacklens.one_layer.embeddings import hamming_geometry
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.statistics import Interval

TIE = 1e-9
"""Logits this close, relative to the largest, count as equal: rounding alone can separate them."""
NEGATIVE = 1e-12
"""Eigenvalues of a Gram matrix below 0 by at most this, relative to the largest, count as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometryGrid:
    """Theorem 4: geometries (a, b, b0) and lengths, on several tasks."""

    tasks: tuple[tuple[int, float], ...]
    """Pairs (m, beta)."""
    slopes: tuple[float, ...]
    """a."""
    offsets: tuple[float, ...] = (0.2, 0.5)
    """b."""
    ratios: tuple[float, ...]
    """(b0 - b) / a, from 0."""
    lengths: tuple[int, ...]
    contexts: int
    omega: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.slopes) <= 0 or min(self.ratios) < 0:
            raise InputError(
                f"slopes are {self.slopes} and ratios {self.ratios}; equation 5.2 has slopes above "
                "0 and ratios of at least 0."
            )


def error_by_geometry(settings: GeometryGrid, bench: Workbench) -> pd.DataFrame:
    """Return the exact margin and the measured error for each task, geometry and length.

    A geometry whose Gram matrix is not positive semidefinite has no embeddings. Its rows have
    `feasible` false and lack the values that are measured on embeddings.

    `walsh_gap` compares the logits of the Walsh formula with the matrix product G A G p;
    `model_gap` compares those of the model's matrices with it. Both are the largest difference,
    relative to the spread of the logits.

    Raises:
        InputError: No geometry has embeddings.
    """
    rows = []
    geometries = product(settings.tasks, settings.slopes, settings.offsets, settings.ratios)
    for (bits, beta), a, b, ratio in geometries:
        task = ConceptTask(bits=bits, omega=settings.omega, beta=beta)
        adjacency = (task.hamming() == 1).double()
        chance = task.token_distribution()[:1]
        b0 = b + ratio * a
        gram = gram_matrix(bits, a=a, b=b, b0=b0)
        exact_logits = (chance @ gram @ adjacency @ gram)[0]
        by_distance = memory.geometry_logits(task, a=a, b=b, b0=b0)
        values = torch.linalg.eigvalsh(gram)
        feasible = bool(values[0] > -NEGATIVE * values[-1])
        row = {
            "bits": bits,
            "beta": beta,
            "a": a,
            "b": b,
            "b0": b0,
            "ratio": ratio,
            "feasible": feasible,
            "margin": memory.margin(by_distance),
            "scaled_margin": memory.margin(by_distance) / a**2,
            "walsh_gap": _gap(by_distance[task.hamming()[0]], exact_logits),
        }
        if not feasible:
            rows += [{**row, "length": length} for length in settings.lengths]
            continue
        model = _model(task, a=a, b=b, b0=b0)
        weights = model.weights()
        logits = memory.uniform_logits(chance, W_E=weights.W_E, W_V=weights.W_V)[0]
        row["model_gap"] = _gap(logits.detach(), exact_logits)
        tolerance = TIE * float(exact_logits.abs().max())
        for length in settings.lengths:
            sized = ConceptTask(bits=bits, omega=settings.omega, beta=beta, length=length)
            error = measured_error(model, sized, settings, tolerance=tolerance)
            rows.append({**row, "length": length, **error})
    if not any(row["feasible"] for row in rows):
        raise InputError("none of these geometries has embeddings; give larger offsets.")
    return pd.DataFrame(rows)


def _model(task: ConceptTask, *, a: float, b: float, b0: float) -> OneLayerTransformer:
    """Return the model with equations 5.2 and 5.1 and uniform attention, in float64."""
    W_E = hamming_geometry(task.bits, a=a, b=b, b0=b0, dtype=torch.float64)
    zero = torch.zeros(W_E.shape[1], W_E.shape[1], dtype=W_E.dtype)
    W_V = memory.constructed(W_E, task)
    weights = OneLayerWeights(W_E=W_E, W_Q=zero, W_K=zero.clone(), W_V=W_V)
    return OneLayerTransformer.from_weights(weights)


def _gap(logits: Tensor, reference: Tensor) -> float:
    """Return the largest difference relative to the spread of the reference."""
    return float((logits - reference).abs().max() / (reference.max() - reference.min()))


def draw_geometry(table: pd.DataFrame, settings: GeometryGrid) -> Figure:
    """Draw error against (b0 - b) / a, a curve per L, a panel per task; grey: margin below 0.

    Geometries with the same ratio have the same error, and the first feasible one is drawn. A
    measurement without any error is an arrow that hangs from the upper end of its interval.
    """

    def draw(panel: Axes, table: Any, task: tuple[int, float]) -> None:
        feasible = table[table["feasible"]].groupby(["ratio", "length"], as_index=False).first()
        for i, length in enumerate(settings.lengths):
            rows: Any = feasible[feasible["length"] == length]
            # The shift keeps lengths without an error visible side by side.
            shift = sideways(i, len(settings.lengths))
            x = rows["ratio"] * (1 + 0.12 * shift) + 0.06 * shift
            draw_errors(panel, x, rows, i, label=f"L = {length}")
        band = {"color": "#BBBBBB", "linewidth": 6, "alpha": 0.5, "zorder": 0}
        for ratio in table["ratio"][table["margin"] <= 0].unique():
            panel.axvline(ratio, label="margin below 0", **band)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlim(-0.3, 1.6 * max(settings.ratios))
        panel.set_yscale("log")
        panel.set_ylim(0.3 / settings.contexts, 2)

    return draw_panels(
        table,
        draw,
        x="$(b_0 - b)$ / a (linear up to 1)",
        y="error",
        legend={"bars": f"{WILSON}; arrows: no error seen", "columns": 4},
        by=["bits", "beta"],
        title="m = {}, $\\beta$ = {:g}",
        height=2.4,
    )


def _last(table: Any) -> Any:
    """Return the feasible rows of the longest L."""
    return table[(table.length == table.length.max()) & table.feasible]


def _largest_b0(table: Any) -> Any:
    """Return the rows with the largest b0 of the tasks that have a margin below 0."""
    least = table.groupby(["bits", "beta"]).margin.transform("min")
    return table[(least < 0) & (table.ratio == table.ratio.max())]


def _spread(table: Any, column: str, by: list[str]) -> Interval:
    """Return the largest gap within a group, relative to the group's largest absolute value."""
    values = table.groupby(by)[column]
    size = table[column].abs().groupby([table[name] for name in by]).max()
    return exact(((values.max() - values.min()) / size.clip(lower=1e-300)).max())


def _anchored(table: Any, bits: int) -> Interval:
    """Return the margin at (a, b, b0) = (.1, .5, 1), beta = 1."""
    rows = table.query("bits == @bits and beta == 1 and a == 0.1 and b == 0.5 and ratio == 5")
    return lowest(list(map(exact, rows.margin)))


ANALYSES = (
    Analysis(
        id="theorem4",
        settings=scales(
            GeometryGrid(
                tasks=((5, 1.0), (6, 1.0), (7, 1.0), (8, 1.0), (3, 3.0)),
                slopes=(0.02, 0.1),
                ratios=(0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
                lengths=(64, 256, 1024),
                contexts=16384,
            ),
            tasks=((5, 1.0), (7, 1.0), (3, 3.0)),
            slopes=(0.05, 0.1),
            ratios=(0.0, 1.0, 5.0, 20.0, 100.0),
            lengths=(64, 512),
            contexts=2048,
        ),
        ours=("tasks", "slopes", "offsets", "ratios", "lengths", "contexts", "seed"),
        run=error_by_geometry,
        draw=draw_geometry,
        checks=(
            below(
                "the logits of the model's matrices equal the matrix product G A G p",
                lambda t: exact(t.model_gap.max()),
                1e-9,
            ),
            below(
                "the logits of the Walsh formula equal G A G p, with or without embeddings",
                lambda t: exact(t.walsh_gap.max()),
                1e-9,
            ),
            *(
                near(
                    f"margin of the Walsh formula at m = {bits} and (.1, .5, 1) (anchor 7.4)",
                    lambda t, bits=bits: _anchored(t, bits),
                    margin,
                    tolerance,
                    known_at={"omega": 1.0},
                )
                for bits, margin, tolerance in ((7, 1.515, 0.001), (5, 0.3354, 0.0005))
            ),
            below(
                "margin / a^2 depends on (b0 - b) / a alone (largest relative gap)",
                lambda t: _spread(t, "scaled_margin", ["bits", "beta", "ratio"]),
                1e-9,
            ),
            below(
                "the measured error depends on (b0 - b) / a alone (largest relative gap)",
                lambda t: _spread(t, "error", ["bits", "beta", "ratio", "length"]),
                1e-9,
            ),
            above(
                "at beta = 1 every geometry has a margin above 0 (smallest margin / a^2)",
                lambda t: lowest(list(map(exact, t[t.beta == 1].scaled_margin))),
                0.0,
            ),
            below(
                "at beta = 1 and the longest L the error is below .01 for every geometry",
                lambda t: highest_error(_last(t[t.beta == 1])),
                0.01,
                origin="paper",
            ),
            above(
                "if the margin is below 0, the error at the longest L is above one half",
                lambda t: lowest_error(_last(t[t.margin < 0])),
                0.5,
                origin="paper",
            ),
            below(
                "if a small b0 has a margin below 0, a large b0 brings the error below .01",
                lambda t: highest_error(_last(_largest_b0(t))),
                0.01,
                origin="paper",
            ),
        ),
    ),
)
