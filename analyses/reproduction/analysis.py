"""An analysis: one figure or statement of the paper as something that can be run.

It states, before it is run, its settings at each scale, the checks that would answer its question,
and how its table is drawn. Its question and cost are in `analyses.reproduction.catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.reproduction.catalogue import CATALOGUE, Entry
from analyses.reproduction.check import Check, Scale
from analyses.reproduction.workbench import Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """One figure or statement of the paper."""

    id: str
    """Its id in the catalogue."""
    settings: Mapping[Scale, Any]
    """A frozen dataclass for each scale."""
    ours: tuple[str, ...]
    """Settings that we chose, since the paper does not state them or we only recall them."""
    run: Callable[[Any, Workbench], pd.DataFrame]
    """(settings, workbench) -> a tidy table."""
    draw: Callable[[pd.DataFrame, Any], Figure]
    """(table, settings) -> the figure in the paper's arrangement."""
    checks: tuple[Check, ...]

    @property
    def entry(self) -> Entry:
        """Reference, title, question and cost."""
        return CATALOGUE[self.id]
