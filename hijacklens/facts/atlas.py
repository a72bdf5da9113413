"""The atlas: an embedded set of facts (`atlas.csv`), so that everything works without a download.

It was written for this project from common knowledge: famous, stable facts over relations of
CounterFact. Each has a false target of the right type and a near word for both targets (a
language's country, a city's country, ...).
"""

from __future__ import annotations

from functools import cache

from hijacklens.facts.fact import FactSet
from hijacklens.facts.records import facts_from_records
from hijacklens.facts.relations import embedded


@cache
def atlas() -> FactSet:
    """Return all embedded facts."""
    return facts_from_records(embedded("atlas.csv"), name="atlas")
