"""Theorem 4 (8 in the appendix): equation 5.2 embeddings with the memory of equation 5.1.

With embeddings of equation 5.2 the population logits are G A G p(. | y): Gram matrix, hypercube
adjacency, token distribution. All three are diagonal in the Walsh basis, so the margin is exact
for any (a, b, b0). Two things follow that the checks hold the matrices against:

* b adds the same to all logits, and a scales them by a^2 where (b0 - b) / a stays: nothing but this
  ratio r matters to the argmax (b matters to whether there are such embeddings at all).
* At a = 1 the logit at distance k from y is, up to a constant, with q = exp(-1/beta) and the
  logits c(k) of orthonormal embeddings (reference page, 7.1),

      r^2 c(k)  -  2 k (m - 2) omega pi_1 (r + 2^m / 4),     pi_1 = ((1+q)^(m-1) (1-q) - 1) / Z

  For m >= 3 the first part favours the label. If pi_1 > 0, so does the second, and the margin is
  above 0 for every b0 >= b: beta below 2.08 is enough, more so for more bits. If pi_1 < 0 the
  margin is below 0 at b0 = b, and above 0 once b0 is large: the "large b0" of the theorem. At
  beta = 1 its conditions are thus void; m = 3 at beta = 3 shows what they are about.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analyses.paper.constructed_error import highest_error, lowest_error
from analyses.paper.lemmas import gram_matrix
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, exact, near
from analyses.reproduction.drawing import draw_errors
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.one_layer import evaluation, memory
from hijacklens.one_layer.architecture import OneLayerWeights
from hijacklens.one_layer.embeddings import hamming_geometry
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.statistics import Interval

TIE = 1e-9
"""Logits this close, relative to the largest, are equal: they are the same sum in another order."""
NEGATIVE = 1e-12
"""Eigenvalues of a Gram matrix down to this, relative to the largest and below 0, count as 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometryGrid:
    """Theorem 4: geometries (a, b, b0) and lengths, on several tasks."""

    tasks: tuple[tuple[int, float], ...]
    """Pairs (m, beta)."""
    slopes: tuple[float, ...]
    """a."""
    offsets: tuple[float, ...]
    """b."""
    ratios: tuple[float, ...]
    """(b0 - b) / a, from 0."""
    lengths: tuple[int, ...]
    contexts: int
    omega: float = 1.0
    seed: int = 0


def error_by_geometry(settings: GeometryGrid, bench: Workbench) -> pd.DataFrame:
    """Exact margin and measured error for each task, geometry and length.

    A geometry whose Gram matrix is not positive semidefinite has no embeddings: its rows are there,
    with `feasible` false and without what is measured on embeddings.

    `walsh_gap` is how far the logits of the Walsh formula are from G A G p with the matrices
    written out, and `model_gap` how far those of the model's own matrices are; both are relative
    to the spread of the logits.
    """
    rows = []
    geometries = list(product(settings.slopes, settings.offsets, settings.ratios))
    for bits, beta in settings.tasks:
        task = ConceptTask(bits=bits, omega=settings.omega, beta=beta)
        adjacency = (task.hamming() == 1).double()
        chance = task.token_distribution()[:1]
        for a, b, ratio in geometries:
            b0 = b + ratio * a
            gram = gram_matrix(bits, a=a, b=b, b0=b0)
            written = (chance @ gram @ adjacency @ gram)[0]
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
                "walsh_gap": _gap(by_distance[task.hamming()[0]], written),
            }
            if not feasible:
                rows += [{**row, "length": length} for length in settings.lengths]
                continue
            model = _model(task, a=a, b=b, b0=b0)
            weights = model.weights()
            own = memory.uniform_logits(chance, W_E=weights.W_E, W_V=weights.W_V)[0]
            row["model_gap"] = _gap(own.detach(), written)
            for length in settings.lengths:
                right = evaluation.accuracy(
                    model.last_logits,
                    ConceptTask(bits=bits, omega=settings.omega, beta=beta, length=length),
                    contexts_count=settings.contexts,
                    generator=torch.Generator().manual_seed(settings.seed),
                    tolerance=TIE * float(written.abs().max()),
                )
                ends = {"error_low": 1 - right.high, "error_high": 1 - right.low}
                rows.append({**row, "length": length, "error": 1 - right.value, **ends})
    return pd.DataFrame(rows)


def _model(task: ConceptTask, *, a: float, b: float, b0: float) -> OneLayerTransformer:
    """Embeddings of equation 5.2, the memory of equation 5.1, uniform attention, in float64."""
    W_E = hamming_geometry(task.bits, a=a, b=b, b0=b0, dtype=torch.float64)
    zero = torch.zeros(W_E.shape[1], W_E.shape[1], dtype=W_E.dtype)
    W_V = memory.constructed(W_E, task)
    weights = OneLayerWeights(W_E=W_E, W_Q=zero, W_K=zero.clone(), W_V=W_V)
    return OneLayerTransformer.from_weights(weights)


def _gap(logits: Tensor, written: Tensor) -> float:
    """The largest difference, relative to the spread of the logits."""
    return float((logits - written).abs().max() / (written.max() - written.min()))


def draw_geometry(table: pd.DataFrame, settings: GeometryGrid) -> Figure:
    """Error against (b0 - b) / a, a line per L, a panel per task; grey: margin below 0.

    Of the geometries of a ratio, which have the same error, the first feasible one is drawn. Where
    no context was answered wrongly, an arrow hangs from the upper end of the interval.
    """
    with plots.panels(len(settings.tasks), height=2.4, share_y=True) as (figure, axes):
        for panel, (bits, beta) in zip(axes, settings.tasks, strict=True):
            task: Any = table[(table["bits"] == bits) & (table["beta"] == beta)]
            feasible = task[task["feasible"]]
            drawn = feasible.groupby(["ratio", "length"], as_index=False).first()
            for i, length in enumerate(settings.lengths):
                rows: Any = drawn[drawn["length"] == length]
                # Lengths without an error stand side by side.
                aside = i - (len(settings.lengths) - 1) / 2
                place = rows["ratio"] * (1 + 0.12 * aside) + 0.06 * aside
                draw_errors(panel, place, rows, i=i, label=f"L = {length}")
            for place in task["ratio"][task["margin"] <= 0].unique():
                panel.axvline(
                    place, color="#BBBBBB", linewidth=6, alpha=0.5, zorder=0, label="margin below 0"
                )
            panel.set_xscale("symlog", linthresh=1)
            panel.set_xlim(-0.3, 1.6 * max(settings.ratios))
            panel.set_yscale("log")
            panel.set_ylim(0.3 / settings.contexts, 2)
            panel.set_title(f"m = {bits}, $\\beta$ = {beta:g}", fontsize=9)
        plots.label_outer(axes, x="$(b_0 - b)$ / a (linear up to 1)", y="error")
        plots.legend_below(
            figure, axes, bars="95% Wilson intervals; arrows: no error seen", columns=4
        )
        return figure


def _last(table: Any) -> Any:
    """The feasible rows of the longest L."""
    return table[(table.length == table.length.max()) & table.feasible]


def _largest_b0(table: Any) -> Any:
    """Of the tasks with a margin below 0, the rows with the largest b0."""
    least = table.groupby(["bits", "beta"]).margin.transform("min")
    return table[(least < 0) & (table.ratio == table.ratio.max())]


def _spread(table: Any, column: str, by: list[str]) -> Interval:
    """Of rows that should have the same number, the largest gap relative to the largest number."""
    of = table.groupby(by)[column]
    gap = of.max() - of.min()
    return exact((gap / of.agg(lambda values: values.abs().max()).clip(lower=1e-300)).max())


def _anchored(table: Any, bits: int) -> Interval:
    """The margin at (a, b, b0) = (.1, .5, 1), beta = 1."""
    rows = table.query("bits == @bits and beta == 1 and a == 0.1 and b == 0.5 and ratio == 5")
    return exact(rows.margin.min())


ANALYSES = (
    Analysis(
        id="theorem4",
        settings={
            "quick": GeometryGrid(
                tasks=((5, 1.0), (7, 1.0), (3, 3.0)),
                slopes=(0.05, 0.1),
                offsets=(0.2, 0.5),
                ratios=(0.0, 1.0, 5.0, 20.0, 100.0),
                lengths=(64, 512),
                contexts=2048,
            ),
            "paper": GeometryGrid(
                tasks=((5, 1.0), (6, 1.0), (7, 1.0), (8, 1.0), (3, 3.0)),
                slopes=(0.02, 0.1),
                offsets=(0.2, 0.5),
                ratios=(0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
                lengths=(64, 256, 1024),
                contexts=16384,
            ),
        },
        ours=("tasks", "slopes", "offsets", "ratios", "lengths", "contexts", "seed"),
        run=error_by_geometry,
        draw=draw_geometry,
        checks=(
            below(
                "the logits of the model's own matrices are G A G p with the matrices written out",
                lambda t: exact(t.model_gap.max()),
                1e-9,
            ),
            below(
                "the logits of the Walsh formula are G A G p, whether there are embeddings or not",
                lambda t: exact(t.walsh_gap.max()),
                1e-9,
            ),
            near(
                "margin of the Walsh formula at m = 7 and (.1, .5, 1) (anchor 7.4)",
                lambda t: _anchored(t, 7),
                1.515,
                0.001,
            ),
            near(
                "margin of the Walsh formula at m = 5 and (.1, .5, 1) (anchor 7.4)",
                lambda t: _anchored(t, 5),
                0.3354,
                0.0005,
            ),
            below(
                "the margin over a^2 depends on (b0 - b) / a alone (largest relative gap)",
                lambda t: _spread(t, "scaled_margin", ["bits", "beta", "ratio"]),
                1e-9,
            ),
            below(
                "the measured error depends on (b0 - b) / a alone (largest relative gap)",
                lambda t: _spread(t, "error", ["bits", "beta", "ratio", "length"]),
                1e-9,
            ),
            above(
                "at beta = 1 every geometry has a margin above 0 (the least, over a^2)",
                lambda t: exact(t[t.beta == 1].scaled_margin.min()),
                0.0,
            ),
            below(
                "at beta = 1 and the longest L the error is below .01 for every geometry",
                lambda t: highest_error(_last(t[t.beta == 1])),
                0.01,
            ),
            above(
                "where the margin is below 0 the error at the longest L is above one half",
                lambda t: lowest_error(_last(t[t.margin < 0])),
                0.5,
            ),
            below(
                "where a small b0 has a margin below 0, a large one brings the error below .01",
                lambda t: highest_error(_last(_largest_b0(t))),
                0.01,
            ),
        ),
    ),
)
