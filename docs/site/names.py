"""The public names, one line each: `python docs/site/names.py` writes them into the API page.

The names of a public module (a "door") are those in its `__all__` or, if it has none, the functions
and classes that it defines. Names that begin with an underscore are private.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "reference" / "api" / "index.md"
START = "<!-- names: python docs/site/names.py writes what follows -->"
DOORS = {
    "hijacklens": "import hijacklens as hl",
    "hijacklens.views": "from hijacklens import views",
    "hijacklens.report": "from hijacklens import report",
    "hijacklens.models.packaged": "from hijacklens.models.packaged import PACKAGED",
    "hijacklens.scoring.efficacy": "from hijacklens.scoring import efficacy",
    "hijacklens.scoring.forecast": "from hijacklens.scoring.forecast import forecast",
    "hijacklens.one_layer.memory": "from hijacklens.one_layer import memory",
    "hijacklens.world.circuits": "from hijacklens.world import circuits",
    "hijacklens.statistics": "from hijacklens import statistics",
    "hijacklens.plots": "from hijacklens import plots",
    "probes.attention": "from probes import attention",
    "probes.values": "from probes import values",
    "probes.ablation": "from probes import ablation",
    "probes.activations": "from probes import activations",
    "probes.logit_shift": "from probes import logit_shift",
    "probes.logit_lens": "from probes import logit_lens",
    "probes.account": "from probes import account",
    "probes.patching": "from probes import patching",
    "probes.heads": "from probes import heads",
    "probes.geometry": "from probes import geometry",
    "probes.geometry.subspaces": "from probes.geometry import subspaces",
    "probes.memory_fit": "from probes import memory_fit",
    "probes.memory_fit.associations": "from probes.memory_fit import associations",
    "probes.specification": "from probes import specification",
    "analyses": "import analyses",
    "analyses.law": "from analyses import law",
    "analyses.defence": "from analyses import defence",
}
"""Public module -> how to import it."""
ONLY = {
    "hijacklens.models.packaged": ["PACKAGED"],
    "hijacklens.scoring.forecast": ["forecast"],
}
"""Public module -> its public names, if the other names in it are private."""
CONSTANTS = {
    "LAWS": "The eight laws, in the order of the tables.",
    "LEAST_WHOLE": "A ratio is undefined if its denominator is smaller.",
    "METHODS": "Name -> registered method.",
    "PACKAGED": "Short name -> packaged model.",
    "PREDICTORS": "The columns that the laws may read.",
    "Scaling": "How vectors are scaled before the fit: the type of an argument of `fit`.",
    "TITLE": "The default title of a report.",
}
"""Descriptions of names without a docstring; other constants are types of arguments."""


def names(door: str) -> list[str]:
    """Return the public names of a door, in alphabetical order."""
    module = importlib.import_module(door)
    listed = ONLY.get(door) or getattr(module, "__all__", None) or _defined(module)
    return sorted(listed, key=str.lower)


def _defined(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def text() -> str:
    """Return the lists of all doors, as Markdown."""
    parts = []
    for door, statement in DOORS.items():
        module = importlib.import_module(door)
        rows = [f"| `{name}` | {_line(name, getattr(module, name))} |" for name in names(door)]
        parts.append(
            "\n".join([f"### `{statement}`\n", "| name | what it is |", "|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def _line(name: str, value: Any) -> str:
    """Return the first sentence of a docstring."""
    value = inspect.unwrap(value) if callable(value) else value
    documented = inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value)
    doc = (inspect.getdoc(value) if documented else None) or CONSTANTS.get(name, "A type.")
    first = re.sub(r"\s+", " ", doc.split("\n\n")[0])
    return re.split(r"(?<=[.]) (?=[A-Z`])", first)[0].replace("|", "\\|")


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[3]))
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{head}{START}\n\n{text()}", encoding="utf-8")
