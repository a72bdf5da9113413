"""The embedded facts are mechanically sound. Rules, not counts: the file may grow."""

from __future__ import annotations

from collections import defaultdict

import pytest

from hijacklens.facts.atlas import atlas
from hijacklens.facts.relations import relations

FACTS = list(atlas())


def offenders(rule) -> list[str]:
    """The facts that break a rule, in words; empty when all keep it."""
    return [f"case {fact.case_id}: {fact}" for fact in FACTS if not rule(fact)]


def test_it_is_large_enough():
    assert len(FACTS) >= 400
    assert len(atlas().relations()) >= 10


def test_no_record_of_the_file_was_left_out():
    assert atlas().skipped == ()
    assert (atlas().name, atlas().note) == ("atlas", "")


def test_it_is_read_once():
    assert atlas() is atlas()


TRUTHS: dict[tuple[str, str], set[str]] = defaultdict(set)
TRUE_OF_RELATION: dict[str, set[str]] = defaultdict(set)
FALSE_OF_RELATION: dict[str, set[str]] = defaultdict(set)
NEAR: dict[tuple[str, str], set[str | None]] = defaultdict(set)
for _fact in FACTS:
    TRUTHS[_fact.relation_id, _fact.subject.casefold()].add(_fact.target_true)
    TRUE_OF_RELATION[_fact.relation_id].add(_fact.target_true)
    FALSE_OF_RELATION[_fact.relation_id].add(_fact.target_false)
    NEAR[_fact.relation_id, _fact.target_true].add(_fact.near_true)
    NEAR[_fact.relation_id, _fact.target_false].add(_fact.near_false)


def texts(fact) -> list[str]:
    return [
        fact.subject,
        fact.template,
        fact.target_true,
        fact.target_false,
        fact.near_true or "",
        fact.near_false or "",
    ]


RULES = {
    "its relation is one of CounterFact's": lambda f: f.relation_id in relations(),
    "both targets have a near word": lambda f: bool(f.near_true and f.near_false),
    "a near word is not a target": lambda f: (
        not {f.near_true, f.near_false} & {f.target_true, f.target_false}
    ),
    "the near words differ": lambda f: f.near_true != f.near_false,
    "a target has one near word in its relation": lambda f: (
        len(NEAR[f.relation_id, f.target_true]) == len(NEAR[f.relation_id, f.target_false]) == 1
    ),
    "no text has spaces around it or in a row": lambda f: all(
        text == " ".join(text.split()) for text in texts(f)
    ),
    "the prompt does not end a sentence": lambda f: f.prompt[-1] not in ".!?:;",
    "the prompt names neither target": lambda f: (
        f.target_true.casefold() not in f.prompt.casefold()
        and f.target_false.casefold() not in f.prompt.casefold()
    ),
    "a subject has one true target per relation": lambda f: (
        len(TRUTHS[f.relation_id, f.subject.casefold()]) == 1
    ),
    "the false target is not true of the subject": lambda f: (
        f.target_false not in TRUTHS[f.relation_id, f.subject.casefold()]
    ),
    "neither target holds the other": lambda f: (
        f.target_true.casefold() not in f.target_false.casefold()
        and f.target_false.casefold() not in f.target_true.casefold()
    ),
    "the prompt names neither near word": lambda f: (
        f.near_true.casefold() not in f.prompt.casefold()
        and f.near_false.casefold() not in f.prompt.casefold()
    ),
    "targets begin alike, upper or lower case": lambda f: (
        f.target_true[0].isupper() == f.target_false[0].isupper()
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_every_fact_keeps_the_rule(rule):
    assert not offenders(rule)


def test_case_ids_are_unique_and_prompts_too():
    assert len({fact.case_id for fact in FACTS}) == len(FACTS)
    assert len({fact.prompt for fact in FACTS}) == len(FACTS)


@pytest.mark.parametrize("relation", atlas().relations())
def test_false_targets_are_of_the_type_of_the_true_ones(relation):
    # A false target that is true of another subject is of the right type; a few may be new.
    strangers = FALSE_OF_RELATION[relation] - TRUE_OF_RELATION[relation]
    assert len(strangers) <= max(2, len(FALSE_OF_RELATION[relation]) // 10), strangers


@pytest.mark.parametrize("relation", atlas().relations())
def test_a_relation_has_enough_facts_and_other_false_targets(relation):
    facts = atlas().where(relation=relation)
    assert len(facts) >= 10
    for fact in facts:  # do-not-think-other must have something to draw
        assert FALSE_OF_RELATION[relation] - {fact.target_true, fact.target_false}
