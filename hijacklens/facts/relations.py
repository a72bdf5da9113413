"""The 34 relations of CounterFact: meaning, type of target, and a sentence in each direction.

The sentences are in `relations.csv`. Those of P103, P131, P190 and P641 follow the formats of the
paper's appendix (section 2, Figures 2b, B.2, B.3); all are our wording, as the results say.
`near_words.csv` has the country of each language, for the near-word schemes of Figure B.4, or the
reason why a language has no single country; `aliases.csv` has other common names of targets.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Container
from dataclasses import dataclass
from functools import cache
from importlib import resources

from hijacklens.errors import unknown

LANGUAGE_RELATIONS = frozenset({"P37", "P103", "P364", "P407", "P1412"})
"""Relations whose targets are languages; the near word is their country."""


@dataclass(frozen=True, slots=True)
class Relation:
    """A Wikidata property with its wording."""

    relation_id: str
    label: str
    target: str
    """The type of the target: city, language, country, ..."""
    hijack: str
    """A sentence that denies the false target; placeholders {subject} and {target_false}."""
    reverse: str
    """A sentence that states the true target; placeholders {subject} and {target_true}."""


@cache
def relations() -> dict[str, Relation]:
    """Return relation id -> relation, in the order of the property numbers."""
    return {row["relation_id"]: Relation(**row) for row in embedded("relations.csv")}


def relation_id(name: str, known: Container[str] = ()) -> str:
    """Return the id of a relation given by id or by name; an id in `known` is itself.

    >>> relation_id("Capital"), relation_id("p36"), relation_id("father")
    ('P36', 'P36', 'father')
    """
    if name in known:
        return name
    text = name.strip().lower()
    return text.upper() if re.fullmatch("p[0-9]+", text) else _ids().get(text, name)


def known_relation(name: str, known: Collection[str], what: str = "relation") -> str:
    """Return the id of a relation among the known ids, given by id or by name.

    Raises:
        InputError: It is not known; the message lists ids to who gave an id, otherwise names.
    """
    if (found := relation_id(name, known)) in known:
        return found
    if re.fullmatch(r"P\d+", found):
        raise unknown(what, name, known, "Names work too.")
    names = [relations()[each].label if each in relations() else each for each in known]
    raise unknown(what, name, names, "Ids work too.")


@cache
def _ids() -> dict[str, str]:
    return {relation.label.lower(): key for key, relation in relations().items()}


def relation_title(relation: str) -> str:
    """Return the id of a relation with its name, as tables show it: `P36 capital`."""
    known = relations().get(relation)
    return f"{relation} {known.label}" if known else relation


@cache
def known_aliases() -> dict[str, tuple[str, ...]]:
    """Return target -> its other common names, from `aliases.csv`."""
    return {row["target"]: tuple(row["aliases"].split("|")) for row in embedded("aliases.csv")}


@cache
def country_of_language() -> dict[str, str]:
    """Return language -> its country; languages without a single country are left out."""
    return {row["language"]: row["country"] for row in embedded("near_words.csv") if row["country"]}


def embedded(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file of this package."""
    text = resources.files("hijacklens.facts").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
