"""The catalogue: every figure, theorem and lemma by its id, as described in `catalogue.csv`.

Reading it imports nothing heavy, so that listing and completing ids is fast. The module of an
analysis, named in the catalogue, is only imported to run it (`analyses.reproduction.analysis`).

>>> CATALOGUE["fig3a"].reference
'Figure 3a'
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hijacklens.errors import unknown


@dataclass(frozen=True, slots=True)
class Entry:
    """The description of one figure or statement of the paper."""

    id: str
    """Its name on the command line, e.g. `fig3a` or `theorem1`."""
    module: str
    """The module of `analyses` that defines it, e.g. `paper.lemmas`."""
    reference: str
    """Its place in the paper, e.g. `Figure 3a`."""
    title: str
    """One line."""
    question: str
    quick: str
    """Time at quick scale on two CPU cores, as measured, e.g. `40 s`. `+ 40 s` excludes models that
    other analyses have trained; with `shared` there is nothing more to train."""
    full: str
    """Time at full scale on one core. `depends` means that it depends on the models and
    facts; `~` marks a sum of parts that were run at different times."""
    origin: Any
    """Where its claims come from, unless a check says otherwise (`check.Origin`)."""
    objection: str
    """What a reader of the paper may object to in our version, one sentence."""
    uses_models: bool
    """Whether it runs language models, so that --model has an effect."""
    uses_facts: bool
    """Whether it scores language models on facts, so that --facts has an effect."""

    @property
    def cost(self) -> Mapping[str, str]:
        """Time by scale."""
        return {"quick": self.quick, "full": self.full}


def _read() -> dict[str, Entry]:
    text = resources.files("analyses.reproduction").joinpath("catalogue.csv").read_text("utf-8")
    entries: dict[str, Entry] = {}
    for row in csv.DictReader(text.splitlines()):
        uses = row.pop("uses").split("+")
        entries[row["id"]] = Entry(**row, uses_models="models" in uses, uses_facts="facts" in uses)
    return entries


CATALOGUE: Mapping[str, Entry] = _read()
"""All entries by id, in the order in which they are listed and run."""


def entry_of(name: str) -> Entry:
    """Return the entry of an id.

    Raises:
        InputError: No analysis has that id.
    """
    if name not in CATALOGUE:
        raise unknown("analysis", name, CATALOGUE, "`hijacklens reproduce --list` explains them.")
    return CATALOGUE[name]
