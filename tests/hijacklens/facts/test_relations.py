"""The 34 relations of CounterFact, their sentences, and the countries of languages."""

from __future__ import annotations

from string import Formatter

import pytest

from hijacklens.facts.relations import (
    LANGUAGE_RELATIONS,
    Relation,
    country_of_language,
    relations,
)

# counterfact.md, section 5.
NUMBERS = [
    17,
    19,
    20,
    27,
    30,
    36,
    37,
    39,
    101,
    103,
    106,
    108,
    127,
    131,
    136,
    138,
    140,
    159,
    176,
    178,
    190,
    264,
    276,
    364,
    407,
    413,
    449,
    463,
    495,
    641,
    740,
    937,
    1303,
    1412,
]


def test_they_are_those_of_counterfact_in_the_order_of_their_numbers():
    assert list(relations()) == [f"P{number}" for number in NUMBERS]


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


@pytest.mark.parametrize("relation", relations().values(), ids=lambda r: r.relation_id)
def test_each_relation_has_a_sentence_each_way(relation: Relation):
    assert fields(relation.hijack) == {"subject", "target_false"}
    assert fields(relation.reverse) == {"subject", "target_true"}
    for sentence in (relation.hijack, relation.reverse):
        assert sentence.endswith(".")
        assert sentence == " ".join(sentence.split())
        assert sentence.count("{") == 2
    assert relation.label
    assert relation.target


@pytest.mark.parametrize("relation", relations().values(), ids=lambda r: r.relation_id)
def test_the_hijack_denies_and_the_reverse_does_not(relation: Relation):
    words = set(relation.hijack.lower().replace(".", "").split())
    assert words & {"not", "cannot"}
    assert not set(relation.reverse.lower().split()) & {"not", "cannot", "no", "never"}


@pytest.mark.parametrize(
    ("relation", "hijack", "reverse"),
    [
        (
            "P190",
            "The twin city of {subject} is not {target_false}.",
            "The twin city of {subject} is {target_true}.",
        ),
        ("P103", "{subject} cannot speak {target_false}.", "{subject} can speak {target_true}."),
        (
            "P131",
            "{subject} is not located in {target_false}.",
            "{subject} is located in {target_true}.",
        ),
        ("P641", "{subject} does not play {target_false}.", "{subject} plays {target_true}."),
    ],
)
def test_the_sentences_of_the_paper(relation, hijack, reverse):
    assert (relations()[relation].hijack, relations()[relation].reverse) == (hijack, reverse)


def test_the_languages_are_those_of_five_relations():
    assert sorted(LANGUAGE_RELATIONS) == ["P103", "P1412", "P364", "P37", "P407"]
    assert set(relations()) >= LANGUAGE_RELATIONS


@pytest.mark.parametrize(
    ("language", "country"),
    [("French", "France"), ("German", "Germany"), ("Italian", "Italy"), ("Japanese", "Japan")],
)
def test_a_language_has_its_country(language, country):
    assert country_of_language()[language] == country


@pytest.mark.parametrize("language", ["Latin", "Akkadian", "Esperanto", "Klingon"])
def test_a_language_without_a_country_has_none(language):
    assert language not in country_of_language()


def test_no_country_is_empty_or_the_language_itself():
    for language, country in country_of_language().items():
        assert country.strip() == country != ""
        assert language.strip() == language != country
