"""Every figure, theorem and lemma of the paper by its id, each an `Analysis`.

A family is a module with a tuple `ANALYSES`. An analysis says, before it is run, what it asks,
with which settings at which scale, what would answer it (its checks), and how it is drawn.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.check import Check, Scale
from analyses.workbench import Workbench
from hijacklens.errors import unknown

FAMILIES = (
    "hijack_curves",
    "bridge",
    "value_matrix",
    "embedding_geometry",
    "attention_selection",
    "context_mixing",
    "sensitivity",
    "constructed_error",
    "identity_law",
    "geometry_theory",
    "theory",
)
"""Modules of this package, in the order in which their analyses are listed and run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """One figure or statement of the paper as something that can be run."""

    id: str
    """What it is called on the command line, e.g. `fig3a` or `theorem1`."""
    title: str
    """One line."""
    source: str
    """Where it stands in the paper, e.g. `Figure 3a`."""
    question: str
    settings: Mapping[Scale, Any]
    """A frozen dataclass for each scale."""
    ours: tuple[str, ...]
    """Settings that the paper does not state, or that are only recalled: they are our choice."""
    cost: Mapping[Scale, str]
    """Time on two CPU cores, as measured, e.g. `40 s`."""
    run: Callable[[Any, Workbench], pd.DataFrame]
    """(settings, workbench) -> a tidy table."""
    draw: Callable[[pd.DataFrame, Any], Figure]
    """(table, settings) -> the figure in the paper's arrangement."""
    checks: tuple[Check, ...]
    uses_models: bool = False
    """Whether it runs language models, so that --model and --facts say something."""


@cache
def analyses() -> dict[str, Analysis]:
    """All analyses by id, in the order of the families."""
    found: dict[str, Analysis] = {}
    for family in FAMILIES:
        for analysis in importlib.import_module(f"analyses.{family}").ANALYSES:
            if analysis.id in found:
                raise ValueError(f"two analyses have the id {analysis.id!r}")
            found[analysis.id] = analysis
    return found


def get_analysis(name: str) -> Analysis:
    """The analysis of an id.

    Raises:
        InputError: There is none of that id.
    """
    if name not in analyses():
        raise unknown("analysis", name, analyses(), "`hijacklens reproduce --list` explains them.")
    return analyses()[name]
