"""Alias tables: the probabilities they stand for, and the draws made with them."""

from __future__ import annotations

import pytest
import torch
from draws import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hijacklens.one_layer.sampling import AliasTable


def implied(table: AliasTable) -> torch.Tensor:
    """The probabilities [row, vocab] that a table draws with, rounding included."""
    vocab = 1 << table.bits
    keep = (table.thresholds.double() / 2.0 ** (32 - table.bits) + 0.5).view(-1, vocab) / vocab
    alias = table.jumps.view(-1, vocab).long() ^ torch.arange(vocab)
    return keep.scatter_add(1, alias, 1 / vocab - keep)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    zeros=st.floats(0, 0.9),
    steepness=st.floats(0, 30),
    seed=st.integers(0, 2**32),
)
def test_tables_stand_for_the_probabilities(bits, rows, zeros, steepness, seed):
    generator = seeded(seed)
    vocab = 1 << bits
    score = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * steepness
    score[torch.rand(rows, vocab, generator=generator) < zeros] = -torch.inf
    score[:, 0] = 0.0
    probabilities = score.softmax(1)
    drawn = implied(AliasTable.build(probabilities))
    # Each of the cells that feed an outcome rounds by at most 2^-33 of all mass.
    assert (drawn - probabilities).abs().max() <= vocab * 2.0**-33 + 1e-15
    assert (drawn[probabilities == 0] == 0).all()


@pytest.mark.parametrize("bits", [1, 5, 12])
@pytest.mark.parametrize("kind", ["uniform", "one", "two"])
def test_edges(bits, kind):
    vocab = 1 << bits
    p = torch.zeros(1, vocab, dtype=torch.float64)
    if kind == "uniform":
        p[:] = 1 / vocab
    elif kind == "one":
        p[0, vocab // 2] = 1
    else:
        p[0, 0], p[0, -1] = 1 / 3, 2 / 3
    table = AliasTable.build(p)
    torch.testing.assert_close(implied(table), p, atol=1e-9, rtol=0)
    draws = table.draw((20, 50), seeded(), row=torch.zeros(1, 1, dtype=torch.int64))
    assert (p[0, draws.flatten().long()] > 0).all()


def test_draws_follow_the_row_that_is_asked_for():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.0, 0.3, 0.0]], dtype=torch.float64)
    table = AliasTable.build(p)
    assert table.rows == 2
    row = torch.tensor([[0], [1]])
    draws = table.draw((2, 100_000), seeded(), row=row)
    for i in range(2):
        counts = torch.bincount(draws[i], minlength=4)
        assert (counts[p[i] == 0] == 0).all()
        possible = p[i] > 0
        assert stats.chisquare(counts[possible], 100_000 * p[i][possible]).pvalue > 1e-3
    # rows given position by position
    mixed = table.draw((50_000, 2), seeded(), row=torch.tensor([[0, 1]]))
    assert set(mixed[:, 0].tolist()) == {0, 1, 2, 3}
    assert set(mixed[:, 1].tolist()) == {0, 2}


def test_an_odd_number_of_draws():
    table = AliasTable.build(torch.full((1, 2), 0.5, dtype=torch.float64))
    zero = torch.zeros(1, 1, dtype=torch.int64)
    assert table.draw((1, 1), seeded(), row=zero).shape == (1, 1)
    assert table.draw((3, 5), seeded(), row=zero).shape == (3, 5)
