"""Theorems and lemmas of the paper as numbers: Lemma 5 and more.

Every one compares the exact quantity of its statement with what a model or a matrix does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from analyses.check import above, below, exact
from analyses.registry import Analysis
from analyses.workbench import Workbench
from hijacklens import plots
from hijacklens.concepts.embeddings import hamming_geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """Lemma 5: embeddings of equation 5.2 with b = b0."""

    bits: tuple[int, ...]
    slopes: tuple[float, ...]
    """a of equation 5.2."""
    offset: float
    """b0 - b of the control, in which the lemma's condition does not hold."""


def rank_of_geometry(settings: RankSettings, bench: Workbench) -> pd.DataFrame:
    """Numerical rank of W_E under equation 5.2, with b = b0 and with b below b0."""
    rows = []
    for bits in settings.bits:
        for slope in settings.slopes:
            b = slope * bits / 2 + 1.0
            for condition, offset in (("b = b0", 0.0), ("b < b0", settings.offset)):
                embedding = hamming_geometry(bits, a=slope, b=b, b0=b + offset, dtype=torch.float64)
                values = torch.linalg.svdvals(embedding).numpy()
                rank = int((values > values[0] * 1e-9).sum())
                rows.append(
                    {
                        "bits": bits,
                        "a": slope,
                        "condition": condition,
                        "rank": rank,
                        "bound": bits + 2,
                        "excess": rank - (bits + 2),
                    }
                )
    return pd.DataFrame(rows)


def draw_rank(table: pd.DataFrame, settings: RankSettings) -> Figure:
    """Rank against m, with the bound of the lemma."""
    with plots.canvas() as (figure, (axes,)):
        for i, (condition, rows) in enumerate(table.groupby("condition", sort=True)):
            colour, marker = plots.series(i)
            ranks: Any = rows.groupby("bits")["rank"].max()
            axes.plot(ranks.index, ranks, color=colour, marker=marker, label=str(condition))
        bits = np.array(settings.bits)
        axes.plot(bits, bits + 2, color="black", linestyle="--", label="m + 2 (Lemma 5)")
        axes.set_yscale("log", base=2)
        axes.set_xticks(bits)
        axes.set_xlabel("bits m")
        axes.set_ylabel("rank of W_E")
        axes.legend()
        return figure


ANALYSES = (
    Analysis(
        id="lemma5",
        title="Rank of embeddings under equation 5.2",
        source="Lemma 5",
        question="Do embeddings of equation 5.2 with b = b0 have rank at most m + 2?",
        settings={
            "quick": RankSettings(bits=(3, 5, 7), slopes=(0.1, 1.0), offset=0.5),
            "paper": RankSettings(bits=(3, 4, 5, 6, 7, 8), slopes=(0.01, 0.1, 1.0), offset=0.5),
        },
        ours=("bits", "slopes", "offset"),
        cost={"quick": "1 s", "paper": "1 s"},
        run=rank_of_geometry,
        draw=draw_rank,
        checks=(
            below(
                "with b = b0 no rank is above m + 2",
                lambda t: exact(t.loc[t.condition == "b = b0", "excess"].max()),
                0.5,
            ),
            above(
                "with b < b0 the rank is above m + 2, so the condition matters",
                lambda t: exact(t.loc[t.condition == "b < b0", "excess"].min()),
                0.5,
            ),
        ),
    ),
)
