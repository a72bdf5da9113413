"""Wilson intervals against the formula worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hijacklens.statistics import Interval, share

Z = 1.959963984540054


def wilson(count: int, total: int, z: float = Z) -> tuple[float, float]:
    """Wilson (1927), equation for the roots of (p - q)^2 = z^2 q (1 - q) / n."""
    p = count / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return centre - half, centre + half


@pytest.mark.parametrize(
    ("count", "total", "value", "low", "high"),
    [
        (40, 50, 0.8, 0.6696, 0.8876),
        (0, 10, 0.0, 0.0, 0.2775),
        (10, 10, 1.0, 0.7225, 1.0),
        (1, 2, 0.5, 0.0945, 0.9055),
        (99, 412, 0.24029, 0.20155, 0.28383),
    ],
)
def test_known_values(count, total, value, low, high):
    found = share(count, total)
    assert found.value == pytest.approx(value, abs=5e-5)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@given(data=st.data(), total=st.integers(1, 100_000))
def test_the_interval_is_wilsons_and_lies_in_range(data, total):
    count = data.draw(st.integers(0, total))
    found = share(count, total)
    assert (found.low, found.high) == pytest.approx(wilson(count, total), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1
    mirrored = share(total - count, total)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-9)


def test_a_higher_confidence_is_a_wider_interval():
    z99 = 2.5758293035489004
    found = share(30, 80, confidence=0.99)
    assert (found.low, found.high) == pytest.approx(wilson(30, 80, z99), abs=1e-9)


def test_nothing_counted_gives_no_share_and_the_whole_range():
    found = share(0, 0)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(("count", "total"), [(-1, 5), (6, 5), (1, 0)])
def test_an_impossible_count_is_refused(count, total):
    with pytest.raises(ValueError, match="count must lie in"):
        share(count, total)


def test_an_interval_prints_with_three_decimals():
    assert str(Interval(0.6684, 0.6206, 0.7123)) == "0.668 [0.621, 0.712]"
