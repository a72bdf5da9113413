"""Random sets of heads: distinct, without the chosen heads, and evenly drawn."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hijacklens.errors import InputError
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


def test_neighbours_of_a_full_layer_provide_heads():
    chosen = [(3, 0), (3, 1)]  # all heads of layer 3
    for drawn in draw(chosen, layers=7, heads=2, count=6, matched=True, seed=0):
        assert {layer for layer, _ in drawn} <= {2, 4}


def test_a_small_model_has_few_sets():
    drawn = draw([(0, 0)], layers=1, heads=3, count=50, matched=True, seed=0)
    assert sorted(drawn) == [((0, 1),), ((0, 2),)]
    with pytest.raises(InputError, match="random set of 2 heads cannot be drawn from the 1"):
        draw([(0, 0), (0, 1)], layers=1, heads=3, count=1, matched=False, seed=0)


def test_all_heads_are_drawn_equally_often():
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
