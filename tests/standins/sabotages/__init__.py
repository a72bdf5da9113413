"""Ways to break an analysis, so that tests can show that each of its checks can fail.

Every family of analyses has a module here with a tuple `SABOTAGES`. A sabotage runs an analysis
under a patch, such as a random memory in place of the constructed one or shuffled labels, and names
the claims that must then fail. Its settings are as small as possible for the claims to fail.
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
    """Description of what is broken."""
    claims: tuple[str, ...]
    """Beginnings of the claims that must fail; each must match one claim only."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from those of the scale."""
    patch: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    """Breaks the code during the run."""
    scale: Scale = "quick"
    """`full` for claims that are open at quick scale; `changes` then makes the settings small."""


def sabotages() -> list[Sabotage]:
    """Return the sabotages of all families."""
    return [
        sabotage
        for module in pkgutil.iter_modules(__path__)
        for sabotage in importlib.import_module(f"sabotages.{module.name}").SABOTAGES
    ]
