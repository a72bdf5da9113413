"""Look up analyses by id, importing the module of an analysis on first use.

The modules are those of `analyses.paper` and `analyses.bridge` named in the catalogue; each has a
tuple `ANALYSES`.
"""

from __future__ import annotations

import importlib
from functools import cache

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.catalogue import CATALOGUE, entry_of


@cache
def _analyses_of(module: str) -> dict[str, Analysis]:
    """Import a module; return its analyses by id, which must be those the catalogue lists."""
    defined = {each.id: each for each in importlib.import_module(f"analyses.{module}").ANALYSES}
    listed = [entry.id for entry in CATALOGUE.values() if entry.module == module]
    if list(defined) != listed:
        raise ValueError(f"analyses.{module} defines {list(defined)}, the catalogue lists {listed}")
    return defined


def analyses() -> dict[str, Analysis]:
    """Return all analyses by id, in catalogue order. Importing them takes seconds."""
    return {name: get_analysis(name) for name in CATALOGUE}


def get_analysis(name: str) -> Analysis:
    """Return the analysis of an id.

    Raises:
        InputError: No analysis has that id.
    """
    return _analyses_of(entry_of(name).module)[name]
