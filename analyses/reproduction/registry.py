"""Every figure, theorem and lemma of the paper by its id, each an `Analysis`.

A family is a module with a tuple `ANALYSES`, imported when one of them is asked for. An analysis
says, before it is run, with which settings at which scale it runs, what would answer its question
(its checks), and how it is drawn. What it asks and costs is in `analyses.reproduction.catalogue`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.reproduction.catalogue import CATALOGUE, FAMILIES, Entry, entry_of
from analyses.reproduction.check import Check, Scale
from analyses.reproduction.workbench import Workbench


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """One figure or statement of the paper as something that can be run."""

    id: str
    """An id of the catalogue."""
    settings: Mapping[Scale, Any]
    """A frozen dataclass for each scale."""
    ours: tuple[str, ...]
    """Settings that the paper does not state, or that are only recalled: they are our choice."""
    run: Callable[[Any, Workbench], pd.DataFrame]
    """(settings, workbench) -> a tidy table."""
    draw: Callable[[pd.DataFrame, Any], Figure]
    """(table, settings) -> the figure in the paper's arrangement."""
    checks: tuple[Check, ...]

    @property
    def entry(self) -> Entry:
        """Source, title, question and cost."""
        return CATALOGUE[self.id]


@cache
def _family(name: str) -> dict[str, Analysis]:
    """The analyses of a family by id, which are those that the catalogue has of it."""
    found = {each.id: each for each in importlib.import_module(f"analyses.{name}").ANALYSES}
    listed = [entry.id for entry in FAMILIES[name]]
    if list(found) != listed:
        raise ValueError(f"analyses.{name} has {list(found)}, the catalogue {listed}")
    return found


def analyses() -> dict[str, Analysis]:
    """All analyses by id, in the order of the families; imports them all, which takes seconds."""
    return {key: each for name in FAMILIES for key, each in _family(name).items()}


def get_analysis(name: str) -> Analysis:
    """The analysis of an id.

    Raises:
        InputError: There is none of that id.
    """
    entry = entry_of(name)
    (family,) = (key for key, entries in FAMILIES.items() if entry in entries)
    return _family(family)[name]
