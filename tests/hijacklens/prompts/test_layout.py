"""Layouts: from symbols to masks, with and without cached tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe
from hijacklens.prompts.layout import ID_BITS, MOST_SPANS, Layout, mark
from hijacklens.scoring.hijack import hijack

LARGEST_ID = (1 << ID_BITS) - 1


@pytest.fixture
def layout() -> Layout:
    rows = [mark((5, 6, 7, 5), [(0, 1), (3,)]), mark((5, 8, 0, 0), [(), (1,)])]
    return Layout.of_symbols(torch.tensor(rows), ("hijack", "last"))


def rows(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def test_masks_of_spans(layout):
    assert layout.tokens.tolist() == [[5, 6, 7, 5], [5, 8, 0, 0]]
    assert rows(layout.query("hijack")) == [[0, 1], []]
    assert rows(layout.query("last")) == [[3], [1]]
    assert rows(layout.query("hijack+last")) == [[0, 1, 3], [1]]
    assert rows(layout.query("token:5")) == [[0, 3], [0]]
    assert rows(layout.query("token:6+last")) == [[1, 3], [1]]
    assert rows(layout.query("token:9")) == [[], []]
    assert rows(layout.query("all")) == [[0, 1, 2, 3]] * 2
    assert torch.equal(layout.key("last+token:7"), layout.query("last+token:7"))


def test_pairs_are_queries_by_keys(layout):
    pairs = layout.pairs("last", "hijack")
    assert pairs.shape == (2, 1, 4, 4)
    assert pairs.nonzero().tolist() == [[0, 0, 3, 0], [0, 0, 3, 1]]


def test_cached_tokens_are_keys_and_no_queries():
    symbols = torch.tensor([mark((7, 8), [(1,), ()])])
    past = torch.tensor([mark((5, 7, 6), [(0, 2), (1,)])])
    layout = Layout.of_symbols(symbols, ("hijack", "subject"), past)
    assert layout.past_tokens.tolist() == [[5, 7, 6]]
    assert rows(layout.query("hijack")) == [[1]]
    assert rows(layout.key("hijack")) == [[0, 2, 4]]
    assert rows(layout.key("token:7")) == [[1, 3]]
    assert rows(layout.key("all")) == [[0, 1, 2, 3, 4]]
    assert layout.pairs("all", "subject").shape == (1, 1, 2, 5)
    assert layout.pairs("all", "subject").nonzero().tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]


def test_a_name_that_is_not_known(layout):
    with pytest.raises(InputError, match=r"unknown span 'hijak'; did you mean 'hijack'\? Allowed"):
        layout.query("hijak")
    with pytest.raises(InputError, match="Allowed: all, hijack, last"):
        layout.pairs("last", "text:Guam")
    with pytest.raises(InputError, match="cannot read the span"):
        layout.key("at:x")


def test_positions_behind_the_end_are_left_out():
    assert mark((5, 6), [(1, 2, 9)]) == (5, 6 | 1 << ID_BITS)
    assert mark((), [(0,)]) == ()


@given(st.data())
def test_symbols_can_be_taken_apart(data):
    ids = data.draw(st.lists(st.integers(0, LARGEST_ID), min_size=1, max_size=8))
    place = st.sets(st.integers(0, len(ids) - 1))
    count = data.draw(st.integers(0, MOST_SPANS))
    places = [sorted(data.draw(place)) for _ in range(count)]
    names = [f"span{i}" for i in range(count)]
    layout = Layout.of_symbols(torch.tensor([mark(ids, places)]), names)
    assert layout.tokens.tolist() == [ids]
    assert [rows(layout.query(name)) for name in names] == [[held] for held in places]


def test_prefixes_share_symbols_as_far_as_they_agree():
    one = mark((5, 6, 7), [(0, 1)])
    other = mark((5, 6, 8), [(0, 1, 2)])
    assert one[:2] == other[:2]
    assert mark((5, 6), [(0,)]) != one[:2]


def test_more_spans_than_a_symbol_has_bits_for():
    places = [()] * (MOST_SPANS + 1)
    with pytest.raises(InputError, match="can name 31 spans, not 32"):
        mark((5,), places)
    with pytest.raises(InputError, match="can name 31 spans, not 32"):
        Layout.of_symbols(torch.tensor([[5]]), [f"span{i}" for i in range(MOST_SPANS + 1)])


def test_a_run_with_too_many_spans_says_so():
    model = load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    many = HookProbe("many", [], spans=[f"at:{i}" for i in range(MOST_SPANS + 1)], packs=True)
    with pytest.raises(InputError, match="can name 31 spans, not 32"):
        hijack(model, sample_facts()[:1], doses=[0], probes=[many], quiet=True)
    most = HookProbe("most", [], spans=many.spans[1:], packs=True)
    assert len(hijack(model, sample_facts()[:1], doses=[0], probes=[most], quiet=True).items) == 1
