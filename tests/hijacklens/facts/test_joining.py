"""How a target joins its prompt: by the end of the prompt, or as the user says."""

from __future__ import annotations

import json

import pytest
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.fact import FactsRecord
from hijacklens.facts.joining import joined
from hijacklens.facts.loading import counterfact
from hijacklens.facts.records import facts_from_records

SPACED = (
    "The capital of France is",
    "The capital is, in short,",
    "Capital:",
    "“Where?” he asked. “In",
    'He said "yes"',
    "the dogs'",
    "l\u2019équipe de France\u2019",
    "»Berlin«",
    "the city (of light)",
    "fish & chips cost £5,",
    "프랑스의 수도는",
    "Столица Франции —",
    "🗼",
)
OPEN = (
    "It is ",
    "<|im_start|>assistant\n",
    "Answer:\t",
    "The answer is (",
    "The list [",
    'They call it "',
    "They call it '",
    "They call it “",
    "Man nennt es „",
    "On l'appelle «",
    '{"country": "France", "capital": "',
    'capital="',
    "It is in ('",
    "La capital es ¿",
    "日本の首都は",
    "中国的首都是",
    "首都是“",
    "「東京」は、",
    "首都\uff1a",
    "日本の都市\uff08",
    "เมืองหลวงของฝรั่งเศสคือ",
    "ບໍ່",
    "全角　",
)


@pytest.mark.parametrize("prompt", SPACED)
def test_words_are_separated(prompt):
    assert joined(prompt, "Paris") == f"{prompt} Paris"


@pytest.mark.parametrize("prompt", OPEN)
def test_an_open_end_or_a_script_without_spaces_takes_none(prompt):
    assert joined(prompt, "Paris") == f"{prompt}Paris"
    assert joined(prompt, "Paris", "space") == f"{prompt} Paris"


def test_white_space_of_the_target_counts():
    assert joined("It is", " Paris") == "It is Paris"
    assert joined("It is", "Paris", "none") == "It isParis"


RECORD = {
    "case_id": 3,
    "relation_id": "P36",
    "subject": "Wales",
    "template": "The capital of {} is",
    "target_true": "Cardiff",
    "target_false": "Leeds",
}


@pytest.mark.parametrize(
    ("changes", "joining", "noted"),
    [
        ({}, "auto", False),
        ({"target_true": " Cardiff", "target_false": " Leeds"}, "auto", False),
        ({"target_true": " Cardiff"}, "none", True),
        ({"target_true": "Cardiff "}, "auto", True),
        ({"subject": " Wales"}, "auto", True),
        ({"template": "The capital of {} is\n"}, "auto", False),
        ({"template": "The capital of {} is\n", "target_true": " Cardiff"}, "auto", True),
        ({"near_true": " Welsh "}, "auto", True),
    ],
)
def test_white_space_is_dropped_with_a_note_unless_scoring_puts_it_back(changes, joining, noted):
    facts = facts_from_records([RECORD | changes], name="toy", joining=joining)
    (fact,) = facts
    template = changes.get("template", RECORD["template"])
    assert fact.prompt == template.replace("{}", "Wales")
    assert (fact.target_true, fact.target_false) == ("Cardiff", "Leeds")
    assert ("white space" in facts.note) is noted
    assert not noted or ("in 1 records" in facts.note and "case 3" in facts.note)


def test_a_set_keeps_its_joining(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([RECORD]))
    facts = counterfact(path, joining="none").where(relation="P36")
    assert facts.joining == facts.record().joining == "none"
    assert FactsRecord(name="old", n=1, hash="").joining == "space"  # of earlier versions
    with (
        unchecked(),
        pytest.raises(InputError, match="did you mean 'space'"),
    ):
        counterfact(path, joining="spaces")
