"""Ways to break an analysis, so that tests can show that each of its checks can fail.

Every family of analyses has a module here with a tuple `SABOTAGES`. A sabotage runs an analysis
with changed settings (as small as the failing allows) under a patch, such as a constructed memory
that is random or labels that are shuffled, and names the claims that must then fail.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from analyses.reproduction.check import Scale


@dataclass(frozen=True)
class Sabotage:
    """One way to break an analysis."""

    analysis: str
    """Id of the analysis."""
    how: str
    """What is broken, in words."""
    claims: tuple[str, ...]
    """Beginnings of the claims that must fail, none of which may be that of a claim that holds."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from those of the scale."""
    patch: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    """Breaks the code for the time of the run."""
    scale: Scale = "quick"
    """`paper` for claims that are open at quick scale; the settings are then small by `changes`."""


def sabotages() -> list[Sabotage]:
    """Those of all families."""
    return [
        sabotage
        for module in pkgutil.iter_modules(__path__)
        for sabotage in importlib.import_module(f"sabotages.{module.name}").SABOTAGES
    ]
