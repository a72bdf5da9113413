"""Random sets of heads, and the split of facts into those to search and those to test on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_facts import sample_facts
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import FactSet
from hijacklens.facts.halves import halves, shared
from probes.heads.sets import draw, label


@settings(max_examples=30, deadline=None)
@given(data=st.data(), matched=st.booleans(), seed=st.integers(0, 1000))
def test_random_sets_are_distinct_and_hold_no_chosen_head(data, matched, seed):
    layers, heads = 5, 16  # enough sets in a layer, even if all chosen heads are in one
    everything = [(layer, head) for layer in range(layers) for head in range(heads)]
    chosen = data.draw(st.lists(st.sampled_from(everything), min_size=2, max_size=6, unique=True))
    found = draw(chosen, layers=layers, heads=heads, count=5, matched=matched, seed=seed)
    assert len(found) == len(set(found)) == 5
    for drawn in found:
        assert len(set(drawn)) == len(chosen)
        assert set(drawn) <= set(everything) - set(chosen)
        if matched and max(Counter(layer for layer, _ in chosen).values()) <= heads // 2:
            assert sorted(at for at, _ in drawn) == sorted(at for at, _ in chosen)
    assert found == draw(chosen, layers=layers, heads=heads, count=5, matched=matched, seed=seed)
    assert found != draw(
        chosen, layers=layers, heads=heads, count=5, matched=matched, seed=seed + 1
    )


def test_a_full_layer_is_helped_out_by_its_neighbours():
    chosen = [(3, 0), (3, 1)]  # all heads of layer 3
    for drawn in draw(chosen, layers=7, heads=2, count=6, matched=True, seed=0):
        assert {layer for layer, _ in drawn} <= {2, 4}


def test_a_small_model_has_few_sets():
    assert draw([(0, 0)], layers=1, heads=3, count=50, matched=True, seed=0) == (
        ((0, 2),),
        ((0, 1),),
    ) or draw([(0, 0)], layers=1, heads=3, count=50, matched=True, seed=0) == (
        ((0, 1),),
        ((0, 2),),
    )
    with pytest.raises(InputError, match="random set of 2 heads cannot be drawn from the 1"):
        draw([(0, 0), (0, 1)], layers=1, heads=3, count=1, matched=False, seed=0)


def test_all_heads_are_drawn_alike():
    found = draw([(0, 0)], layers=2, heads=3, count=5, matched=False, seed=1)
    assert {drawn[0] for drawn in found} == {(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}
    first = Counter(
        draw([(0, 0)], layers=2, heads=3, count=1, matched=False, seed=seed)[0][0]
        for seed in range(500)
    )
    assert all(70 <= first[head] <= 130 for head in first)


def test_labels_are_sorted():
    assert label([(11, 0), (2, 3)]) == "2.3+11.0"
    assert label([]) == ""


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


def test_facts_without_a_relation_are_told_apart_by_their_template():
    facts = sample_facts()[:2]
    bare = FactSet(tuple(replace(fact, relation_id="") for fact in facts), name="bare")
    assert shared(bare, bare) == (0, 1)
    assert shared(bare, facts) == ()
    other = replace(bare[0], template="{} stands in")
    assert shared(FactSet((other,), name="other"), bare) == ()


def test_what_cannot_be_split_is_refused():
    with pytest.raises(InputError, match="1 relations among its 3 facts"):
        halves(sample_facts().where(relation="P131"), by="relation")
    with pytest.raises(InputError, match="1 facts among its 1 facts"):
        halves(sample_facts()[:1])
    with unchecked(), pytest.raises(InputError, match="unknown split 'subject'"):
        halves(sample_facts(), by="subject")
