"""The atlas: the embedded set of facts, so that everything works without a download.

Written for this project from common knowledge; famous, stable facts over relations of
CounterFact, each with a false target of the right type that is really false, and a near word for
both targets (a language's country, a city's country, ...). The file is `atlas.csv`.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

from hijacklens.facts.fact import FactSet
from hijacklens.facts.layouts import facts_from_records


@cache
def atlas() -> FactSet:
    """All embedded facts.

    >>> atlas().where(relation="P36")[0].template.count("{}")
    1
    """
    text = resources.files("hijacklens.facts").joinpath("atlas.csv").read_text(encoding="utf-8")
    return facts_from_records(csv.DictReader(text.splitlines()), name="atlas")
