"""The trie against sets of prefixes, and packs against sums by hand and by brute force."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planned import leaf_reads

from hijacklens.engine import trie as module
from hijacklens.engine.packs import Costs, Limits, Pack, apart, cut, separate, trunk
from hijacklens.engine.rows import PackedRows
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


def written(trie, rows):
    """Packs as the engine writes them: a namespace of lists for each row, without padding."""
    batch = PackedRows.of(trie, rows, torch.device("cpu"))
    reads = [*zip(batch.reads.tolist(), batch.ids.tolist(), strict=True)]
    past = torch.stack([batch.past_from, batch.past_to], dim=-1)
    for i, real in enumerate(batch.real):
        yield SimpleNamespace(
            path=batch.path[i][: sum(pack.past for pack in rows[i])].tolist(),
            symbols=batch.symbols[i][real].tolist(),
            positions=batch.positions[i][real].tolist(),
            ends=batch.ends[i][real].tolist(),
            past=[*map(tuple, past[i][real].tolist())],
            reads=[(place, read) for (row, place), read in reads if row == i],
        )


def test_a_pack_by_hand():
    trie = trie_of(PREFIXES)
    pack = Pack(0, 3, 1, 5)
    (row,) = written(trie, [[pack]])
    assert row.path == [1]
    assert row.symbols == [2, 3, 4, 5, 6]
    assert row.positions == [1, 2, 2, 3, 3]
    assert row.ends == [5, 2, 5, 4, 5]
    # The prefixes that are read, in order: 1 2, 1 2 3, 1 2 4 5, 1 2 4 6.
    assert row.reads == [(0, 0), (1, 1), (3, 2), (4, 3)]
    parts = [*written(trie, [[part] for part in apart(trie, pack)])]
    assert [part.symbols for part in parts] == [[2, 3], [2, 4, 5], [2, 4, 6]]
    assert [part.reads for part in parts] == [[(0, 0), (1, 1)], [(2, 2)], [(2, 3)]]


def test_packs_in_a_row_by_hand():
    trie = trie_of(PREFIXES)
    first, second = written(trie, [[Pack(1, 3, 2, 3), Pack(3, 4, 0, 1)], [Pack(0, 1, 1, 2)]])
    assert (first.path, first.symbols) == ([1, 2], [4, 5, 6, 7])
    assert (first.positions, first.ends) == ([2, 3, 3, 0], [3, 2, 3, 4])
    assert first.past == [(0, 2), (0, 2), (0, 2), (2, 2)]  # 7 sees no key of the past
    assert first.reads == [(1, 2), (2, 3), (3, 4)]
    assert (second.path, second.symbols, second.reads) == ([1], [2, 3], [(0, 0), (1, 1)])


@given(sets, st.booleans(), st.integers(1, 4))
def test_packs_cover_the_leaves_and_see_their_ancestors(prefixes, cached, in_row):
    trie = trie_of(prefixes)
    costs = Costs(pair=0.01, past=0.02, row=0.1, forward_pass=0.0)
    packs = cut(trie, costs, Limits(pack_tokens=12), cached=cached)
    assert [pack.first for pack in packs] == [0, *(pack.stop for pack in packs[:-1])]
    assert packs[-1].stop == len(trie.leaves)
    below = trunk(trie, packs)
    assert cached or not below.leaves
    for pack in packs:
        path = pack.path(trie)
        assert not path or any(leaf.startswith(path) for leaf in below.leaves)
    ordered = sorted(set(prefixes))
    read = below.reads[:, 1].tolist()
    rows = [packs[i : i + in_row] for i in range(0, len(packs), in_row)]
    for row, packs_of_row in zip(written(trie, rows), rows, strict=True):
        assert len(row.symbols) == sum(pack.computed for pack in packs_of_row)
        read += [i for _, i in row.reads]
        for place, i in row.reads:
            past = row.path[slice(*row.past[place])]
            ancestors = [k for k in range(place + 1) if place < row.ends[k]]
            assert (*past, *(row.symbols[k] for k in ancestors)) == ordered[i]
            assert [row.positions[k] for k in ancestors] == [*range(len(past), len(ordered[i]))]
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
