"""The trie against sets of prefixes, and packs against sums by hand and by brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned import leaf_reads

from hijacklens.engine import trie as module
from hijacklens.engine.packs import Costs, Limits, Pack, cut, separate, trunk
from hijacklens.engine.rows import apart, write_out
from hijacklens.engine.trie import Trie
from hijacklens.prompts.prefixes import common, prefix_of, symbols_of

CHEAP = Costs(pair=0.0, past=0.0, row=0.0, forward_pass=0.0)
PREFIXES = [(1, 2, 3), (1, 2), (1, 2, 4, 5), (7,), (1, 2, 4, 6), (7,)]


def trie_of(prefixes, reads=None):
    ids = None if reads is None else {prefix_of(prefix): i for i, prefix in enumerate(reads)}
    return Trie.of(map(prefix_of, prefixes), ids)


def leaves_of(trie):
    return [symbols_of(leaf) for leaf in trie.leaves]


words = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
sets = st.lists(words, min_size=1, max_size=10)


def test_a_trie_by_hand():
    trie = trie_of(PREFIXES)
    assert leaves_of(trie) == [(1, 2, 3), (1, 2, 4, 5), (1, 2, 4, 6), (7,)]
    assert trie.shared.tolist() == [0, 2, 3, 0]
    assert leaf_reads(trie) == [((1, 2), (1, 2, 3)), ((1, 2, 4, 5),), ((1, 2, 4, 6),), ((7,),)]
    assert (trie.tokens, trie.nodes) == (12, 7)
    assert Trie.of([]).nodes == 0


def test_only_some_prefixes_are_read():
    trie = trie_of([(1, 2, 3), (4,)], reads=[(1, 2)])
    assert leaves_of(trie) == [(1, 2, 3), (4,)]
    assert leaf_reads(trie) == [((1, 2),), ()]


@given(sets, st.sampled_from([1, 10, 2**18]))
def test_a_trie_has_a_node_for_every_distinct_beginning(prefixes, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_ONCE", at_once)
        trie = trie_of(prefixes)
    beginnings = {prefix[:n] for prefix in prefixes for n in range(1, len(prefix) + 1)}
    assert trie.nodes == len(beginnings)
    read = [prefix for reads in leaf_reads(trie) for prefix in reads]
    assert read == sorted(set(prefixes)) and trie.reads[:, 1].tolist() == [*range(len(read))]
    for shared, pair in zip(trie.shared[1:], itertools.pairwise(trie.leaves), strict=True):
        left, right = map(symbols_of, pair)
        assert shared == common(*pair) < min(len(left), len(right))
        assert left[:shared] == right[:shared] and left[shared] != right[shared]


def test_a_pack_by_hand():
    trie = trie_of(PREFIXES)
    branch = write_out(trie, Pack(0, 3, 1, 5))
    assert symbols_of(branch.path) == (1,)
    assert list(branch.symbols) == [2, 3, 4, 5, 6]
    assert list(branch.positions) == [1, 2, 2, 3, 3]
    assert list(branch.ends) == [5, 2, 5, 4, 5]
    # The prefixes that are read, in order: 1 2, 1 2 3, 1 2 4 5, 1 2 4 6.
    assert list(branch.reads) == [(0, 0), (1, 1), (3, 2), (4, 3)]
    parts = list(apart(branch))
    assert [list(part.symbols) for part in parts] == [[2, 3], [2, 4, 5], [2, 4, 6]]
    assert [list(part.reads) for part in parts] == [
        [(0, 0), (1, 1)],
        [(2, 2)],
        [(2, 3)],
    ]


@given(sets, st.booleans())
def test_packs_cover_the_leaves_and_see_their_ancestors(prefixes, cached):
    trie = trie_of(prefixes)
    costs = Costs(pair=0.01, past=0.02, row=0.1, forward_pass=0.0)
    packs = cut(trie, costs, Limits(pack_tokens=12), cached=cached)
    assert [pack.first for pack in packs] == [0, *(pack.stop for pack in packs[:-1])]
    assert packs[-1].stop == len(trie.leaves)
    below = trunk(trie, packs)
    assert cached or not below.leaves
    ordered = sorted(set(prefixes))
    read = below.reads[:, 1].tolist()
    for pack in packs:
        branch = write_out(trie, pack)
        assert len(branch.symbols) == pack.computed > 0
        assert not pack.past or any(leaf.startswith(branch.path) for leaf in below.leaves)
        read += [i for _, i in branch.reads]
        for place, i in branch.reads:
            prefix, path = ordered[i], symbols_of(branch.path)
            ancestors = [k for k in range(place + 1) if place < branch.ends[k]]
            assert path + tuple(branch.symbols[k] for k in ancestors) == prefix
            assert [branch.positions[k] for k in ancestors] == [*range(pack.past, len(prefix))]
    assert sorted(read) == [*range(len(ordered))]


def row_cost(trie, costs, first, stop):
    """The cost of a pack without a past, from its definition."""
    own = len({leaf[:n] for leaf in leaves_of(trie)[first:stop] for n in range(1, len(leaf) + 1)})
    return own + costs.pair * own**2 + costs.row


@given(sets)
def test_cuts_without_a_cache_are_the_cheapest(prefixes):
    trie = trie_of(prefixes)
    costs = Costs(pair=0.05, past=0.0, row=0.3, forward_pass=0.0)
    n = len(trie.leaves)
    cheapest = min(
        sum(row_cost(trie, costs, a, b) for a, b in itertools.pairwise([0, *places, n]))
        for count in range(n)
        for places in itertools.combinations(range(1, n), count)
    )
    packs = cut(trie, costs, Limits(), cached=False)
    assert sum(costs.rows(pack.computed, pack.past) for pack in packs) == pytest.approx(cheapest)
    alone = sum(row_cost(trie, costs, i, i + 1) for i in range(n))
    assert sum(costs.rows(pack.computed, 0) for pack in separate(trie)) == pytest.approx(alone)


def test_free_attention_makes_one_pack_and_dear_attention_many():
    trie = trie_of([(1, 2, 3, i) for i in range(10)])
    assert cut(trie, CHEAP, Limits(), cached=False) == [Pack(0, 10, 0, 13)]
    dear = Costs(pair=10.0, past=0.0, row=0.0, forward_pass=0.0)
    cached = cut(trie, dear, Limits(), cached=True)
    assert [(pack.past, pack.computed) for pack in cached] == [(3, 1)] * 10


def test_limits_on_packs():
    trie = trie_of([(1, 2, 3, i) for i in range(10)])

    def packs(**limits):
        return cut(trie, CHEAP, Limits(**limits), cached=False)

    assert all(pack.computed <= 6 for pack in packs(pack_tokens=6))
    assert all(pack.computed <= 6 for pack in packs(batch_tokens=6))
    assert max(pack.stop - pack.first for pack in packs(pack_reads=2)) == 2
    assert len(packs(pack_tokens=1)) == 10
