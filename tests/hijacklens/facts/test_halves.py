"""Halves of a set of facts: they share no fact and lose none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sample_facts import sample_facts
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import FactSet
from hijacklens.facts.halves import halves, shared


@pytest.mark.parametrize("by", ["fact", "relation"])
@pytest.mark.parametrize("seed", [0, 1])
def test_halves_share_nothing_and_lose_nothing(by, seed):
    facts = atlas()
    first, second = halves(facts, by=by, seed=seed)
    assert sorted(f.case_id for f in (*first, *second)) == sorted(f.case_id for f in facts)
    assert shared(first, second) == ()
    assert abs(len(first) - len(second)) <= (2 if by == "fact" else max(facts.relations().values()))
    common = first.relations().keys() & second.relations().keys()
    assert bool(common) == (by == "fact")
    for half in (first, second):
        order = [fact.case_id for fact in half]
        assert order == [fact.case_id for fact in facts if fact.case_id in set(order)]
    assert halves(facts, by=by, seed=seed) == (first, second)
    assert halves(facts, by=by, seed=seed + 7) != (first, second)


def test_the_same_fact_under_two_case_ids_stays_in_one_half():
    facts = sample_facts()
    twins = [replace(fact, case_id=fact.case_id + 100, template="Tell of {}.") for fact in facts]
    both = FactSet((*facts, *twins), name="twins")
    for seed in range(5):
        first, second = halves(both, seed=seed)
        assert shared(first, second) == ()
        assert {fact.case_id % 100 for fact in first}.isdisjoint(
            fact.case_id % 100 for fact in second
        )


def test_facts_without_a_relation_are_distinguished_by_their_template():
    facts = sample_facts()[:2]
    bare = FactSet(tuple(replace(fact, relation_id="") for fact in facts), name="bare")
    assert shared(bare, bare) == (0, 1)
    assert shared(bare, facts) == ()
    other = replace(bare[0], template="{} stands in")
    assert shared(FactSet((other,), name="other"), bare) == ()


def test_sets_that_cannot_be_split_are_refused():
    with pytest.raises(InputError, match="1 relations among its 3 facts"):
        halves(sample_facts().where(relation="P131"), by="relation")
    with pytest.raises(InputError, match="1 facts among its 1 facts"):
        halves(sample_facts()[:1])
    with unchecked(), pytest.raises(InputError, match="unknown split 'subject'"):
        halves(sample_facts(), by="subject")
