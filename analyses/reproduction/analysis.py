"""An analysis: one figure or statement of the paper as something that can be run.

It states, before it is run, its settings at each scale, the checks that would answer its question,
and how its table is drawn. Its question and cost are in `analyses.reproduction.catalogue`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.reproduction.catalogue import CATALOGUE, Entry, entry_of
from analyses.reproduction.check import Check, Outcome, Scale
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

    def judge(
        self, table: pd.DataFrame, scale: Scale, settings: Any, *, own: bool = False
    ) -> tuple[Outcome, ...]:
        """Judge all checks, as `Check.judge`."""
        return tuple(
            replace(
                check.judge(table, scale, settings, own=own),
                origin=check.origin or self.entry.origin,
            )
            for check in self.checks
        )

    def digest(self, settings: Any) -> str:
        """Return the SHA-256 of the checks and of settings as text, to be taken before a run."""
        names = ("claim", "kind", "bound", "tolerance", "scales", "origin")
        checks = [[getattr(check, name) for name in names] for check in self.checks]
        text = json.dumps([self.id, checks, asdict(settings)])
        return hashlib.sha256(text.encode()).hexdigest()


@cache
def _analyses_of(module: str) -> dict[str, Analysis]:
    """Import a module; return its tuple `ANALYSES` by id, as the catalogue must list them."""
    defined = {each.id: each for each in importlib.import_module(f"analyses.{module}").ANALYSES}
    listed = [entry.id for entry in CATALOGUE.values() if entry.module == module]
    if list(defined) != listed:
        raise ValueError(f"analyses.{module} has {list(defined)}, the catalogue {listed}")
    return defined


def analyses() -> dict[str, Analysis]:
    """Return all analyses by id, in catalogue order. Importing them takes seconds."""
    return {name: get_analysis(name) for name in CATALOGUE}


def get_analysis(name: str) -> Analysis:
    """Return the analysis of an id, importing its module on first use.

    Raises:
        InputError: No analysis has that id.
    """
    return _analyses_of(entry_of(name).module)[name]
