"""The atlas: an embedded set of facts (`atlas.csv`), so that everything works without a download.

It was written for this project from common knowledge: famous, stable facts over relations of
CounterFact. Each has a false target of the right type and a near word for both targets (a
language's country, a city's country, ...).
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

from hijacklens.facts.fact import FactSet
from hijacklens.facts.layouts import facts_from_records


@cache
def atlas() -> FactSet:
    """Return all embedded facts.

    >>> atlas().where(relation="P36")[0].template.count("{}")
    1
    """
    text = resources.files("hijacklens.facts").joinpath("atlas.csv").read_text(encoding="utf-8")
    return facts_from_records(csv.DictReader(text.splitlines()), name="atlas")
