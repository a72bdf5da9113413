"""hijacklens: measure, probe and explain context hijacking in language models.

The public names below are imported when they are first used, so that `import hijacklens` is
fast; torch and TransformerLens take seconds.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

_WHERE = {
    "Fact": "hijacklens.facts.fact",
    "FactSet": "hijacklens.facts.fact",
    "HijackResult": "hijacklens.scoring.result",
    "InputError": "hijacklens.errors",
    "Scheme": "hijacklens.schemes",
    "add_scheme": "hijacklens.schemes",
    "atlas": "hijacklens.facts.atlas",
    "counterfact": "hijacklens.facts.counterfact",
    "hijack": "hijacklens.scoring.hijack",
    "load_model": "hijacklens.models",
    "load_result": "hijacklens.results",
    "schemes": "hijacklens.schemes",
}
"""Public name -> the module that defines it."""

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("hijacklens")
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hijacklens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
