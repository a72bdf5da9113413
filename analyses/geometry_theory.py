"""Theorem 4 (8 in the appendix): equation 5.2 embeddings with the memory of equation 5.1.

With embeddings of equation 5.2 the population logits are G A G p(. | y): Gram matrix, hypercube
adjacency, token distribution. All three are diagonal in the Walsh basis, so the margin is exact
for any (a, b, b0), and says where the error must vanish as L grows and where it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from analyses.check import below, exact, near
from analyses.constructed_error import intervals
from analyses.registry import Analysis
from analyses.workbench import Workbench
from hijacklens import plots
from hijacklens.concepts import bayes, memory, population
from hijacklens.concepts.embeddings import gram_eigenvalues, hamming_geometry
from hijacklens.concepts.memory import OneLayerWeights
from hijacklens.concepts.model import OneLayerTransformer
from hijacklens.concepts.task import ConceptTask
from hijacklens.statistics import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometrySettings:
    """Theorem 4: a grid of geometries (a, b, b0), and lengths."""

    bits: tuple[int, ...]
    slopes: tuple[float, ...]
    """a; the geometries are scaled so that only a, and b0 beside it, matter much."""
    offsets: tuple[float, ...]
    """b0 - b."""
    b: float
    lengths: tuple[int, ...]
    contexts: int
    omega: float = 1.0
    beta: float = 1.0
    seed: int = 0


def error_by_geometry(settings: GeometrySettings, bench: Workbench) -> pd.DataFrame:
    """Exact margin and measured error for each feasible geometry and length."""
    rows = []
    for bits in settings.bits:
        task = ConceptTask(bits=bits, omega=settings.omega, beta=settings.beta)
        for a in settings.slopes:
            for offset in settings.offsets:
                b, b0 = settings.b, settings.b + offset
                if gram_eigenvalues(bits, a=a, b=b, b0=b0).constant < 0:
                    continue  # not positive semidefinite: no embeddings have this geometry
                W_E = hamming_geometry(bits, a=a, b=b, b0=b0, dtype=torch.float64)
                zero = torch.zeros(W_E.shape[1], W_E.shape[1], dtype=W_E.dtype)
                W_V = memory.constructed(W_E, task)
                model = OneLayerTransformer.from_weights(
                    OneLayerWeights(W_E=W_E, W_Q=zero, W_K=zero.clone(), W_V=W_V)
                )
                exact_logits = population.geometry_logits(task, a=a, b=b, b0=b0)
                own = memory.uniform_logits(task.token_distribution()[:1], W_E=W_E, W_V=W_V)[0]
                by_distance = exact_logits[task.hamming()[0]]
                for length in settings.lengths:
                    sized = ConceptTask(
                        bits=bits, omega=settings.omega, beta=settings.beta, length=length
                    )
                    right = bayes.accuracy(
                        model.last_logits,
                        sized,
                        contexts_count=settings.contexts,
                        generator=torch.Generator().manual_seed(settings.seed),
                    )
                    rows.append(
                        {
                            "bits": bits,
                            "a": a,
                            "b": b,
                            "b0": b0,
                            "length": length,
                            "margin": population.margin(exact_logits),
                            "relative_gap": float(
                                (own - by_distance).abs().max() / by_distance.abs().max()
                            ),
                            "error": 1 - right.value,
                            "error_low": 1 - right.high,
                            "error_high": 1 - right.low,
                        }
                    )
    return pd.DataFrame(rows)


def draw_geometry(table: pd.DataFrame, settings: GeometrySettings) -> Figure:
    """Error against b0 - b, a line per L, a panel per m and a; grey: margin of 0 or below.

    Where no context was answered wrongly, an arrow hangs from the upper end of the interval.
    """
    slopes = sorted(table["a"].unique())
    size: Any = {"width": plots.PAGE / len(slopes) if len(slopes) > 1 else 5.2, "height": 1.9}
    with plots.canvas(len(settings.bits), len(slopes), **size, share_y=True) as (figure, axes):
        panels = [(bits, a) for bits in settings.bits for a in slopes]
        for panel, (bits, a) in zip(axes, panels, strict=True):
            rows: Any = table[(table["bits"] == bits) & (table["a"] == a)]
            offset = rows["b0"] - rows["b"]
            for i, length in enumerate(settings.lengths):
                colour, marker = plots.series(i)
                # Lengths without an error stand side by side.
                place = offset * (1 + 0.12 * (i - (len(settings.lengths) - 1) / 2))
                chosen = (rows["length"] == length) & (rows["error"] > 0)
                panel.errorbar(
                    place[chosen],
                    rows["error"][chosen],
                    yerr=plots.whiskers(intervals(rows[chosen])),
                    color=colour,
                    marker=marker,
                    markersize=3.5,
                    linewidth=1.2,
                    capsize=2,
                    label=f"L = {length}",
                )
                none = (rows["length"] == length) & (rows["error"] == 0)
                upper = rows["error_high"][none]
                panel.errorbar(
                    place[none], upper, yerr=upper / 2, uplims=True, color=colour, linestyle="none"
                )
            for place in offset[rows["margin"] <= 0].unique():
                panel.axvline(place, color="#BBBBBB", linewidth=6, alpha=0.5, zorder=0)
            panel.set_xscale("symlog", linthresh=0.1)
            panel.set_yscale("log")
            panel.set_ylim(0.3 / settings.contexts, 1)
            panel.set_title(f"m = {bits}, a = {a:g}", fontsize=9)
        below = f"$b_0 - b$ (b = {settings.b:g}; the axis is linear up to 0.1)"
        figure.supxlabel(below, fontsize=10)
        figure.supylabel("error", fontsize=10)
        bars = "95% Wilson intervals; arrows: no error seen"
        plots.legend_below(figure, axes, bars=bars)
        return figure


def _anchor(bits: int) -> float:
    """The exact margin at (a, b, b0) = (.1, .5, 1), omega = beta = 1, by the Walsh formula."""
    task = ConceptTask(bits=bits, omega=1.0)
    return population.margin(population.geometry_logits(task, a=0.1, b=0.5, b0=1.0))


def _longest(table: Any, sign: int) -> Any:
    return table[(table.length == table.length.max()) & (sign * table.margin > 0)]


def _surely_right(table: Any) -> Any:
    """At the longest L, the geometries with a tenth of the largest margin of their m, or more."""
    rows = _longest(table, 1)
    largest = rows.groupby("bits").margin.transform("max")
    return rows[rows.margin >= 0.1 * largest]


def _worst(rows: Any) -> Interval:
    row = rows.loc[rows.error.idxmax()]
    return Interval(row.error, row.error_low, row.error_high)


ANALYSES = (
    Analysis(
        id="theorem4",
        settings={
            "quick": GeometrySettings(
                bits=(5, 7),
                slopes=(0.1,),
                offsets=(0.0, 0.1, 0.5, 2.0),
                b=0.5,
                lengths=(64, 512),
                contexts=2048,
            ),
            "paper": GeometrySettings(
                bits=(5, 6, 7, 8),
                slopes=(0.02, 0.05, 0.1),
                offsets=(0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
                b=0.5,
                lengths=(64, 256, 1024),
                contexts=16384,
            ),
        },
        ours=("bits", "slopes", "offsets", "b", "lengths", "contexts", "beta"),
        run=error_by_geometry,
        draw=draw_geometry,
        checks=(
            below(
                "the logits of the model's own matrices are those of the Walsh formula",
                lambda t: exact(t.relative_gap.max()),
                1e-9,
            ),
            near(
                "margin of the Walsh formula at m = 7 and (.1, .5, 1) (anchor 7.4)",
                lambda t: exact(t.query("bits == 7 and a == 0.1 and b0 == 1.0").margin.iloc[0]),
                1.515,
                0.001,
            ),
            near(
                "margin of the Walsh formula at m = 5 and (.1, .5, 1) (anchor 7.4)",
                lambda t: exact(t.query("bits == 5 and a == 0.1 and b0 == 1.0").margin.iloc[0]),
                0.3354,
                0.0005,
            ),
            below(
                "at the longest L the error is below .01 for every clear margin",
                lambda t: _worst(_surely_right(t)),
                0.01,
            ),
        ),
    ),
)
