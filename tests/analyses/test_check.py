"""Checks: when a claim passes, fails, and stays open."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest

from analyses.reproduction.check import (
    FEW,
    above,
    below,
    exact,
    highest,
    lowest,
    mean,
    near,
    paired,
)
from hijacklens.statistics import Interval

TABLE = pd.DataFrame({"x": [1.0, 2.0, 3.0]})


def fixed(value, low, high):
    return lambda table: Interval(float(value), float(low), float(high))


CASES = {
    "interval above": (above("c", fixed(1, 0.1, 2), 0.0), "pass"),
    "estimate above, interval not": (above("c", fixed(1, -0.1, 2), 0.0), "fail"),
    "interval touches the bound": (above("c", fixed(1, 0.0, 2), 0.0), "fail"),
    "interval below": (below("c", fixed(-1, -2, -0.1), 0.0), "pass"),
    "estimate below, interval not": (below("c", fixed(-1, -2, 0.1), 0.0), "fail"),
    "near": (near("c", fixed(0.26, 0, 1), 0.25, 0.02), "pass"),
    "not near, though the interval holds it": (near("c", fixed(0.3, 0, 1), 0.25, 0.02), "fail"),
    "no number": (above("c", fixed(math.nan, 1, 2), 0.0), "fail"),
    "no interval": (above("c", fixed(1, -math.inf, math.inf), 0.0), "fail"),
    "near, of a single m": (near("c", fixed(0.26, -math.inf, math.inf), 0.25, 0.02), "pass"),
    "near no number": (near("c", fixed(math.nan, 0, 1), 0.25, 0.02), "fail"),
    "few facts, undecided": (above("c", fixed(1, -1, 3), 0.0, **FEW), "open"),
    "few facts, decided for": (above("c", fixed(1, 0.1, 3), 0.0, **FEW), "pass"),
    "few facts, decided against": (above("c", fixed(-1, -2, -0.1), 0.0, **FEW), "fail"),
    "few facts, nothing changed": (below("c", fixed(0, 0, 0), 0.0, **FEW), "open"),
    "not decided": (above("c", fixed(-1, -2, -1), 0.0, scales=("full",), remark="small"), "open"),
}


@pytest.mark.parametrize("name", CASES)
def test_states(name):
    check, state = CASES[name]
    outcome = check.judge(TABLE, "quick")
    assert outcome.state == state
    assert outcome.remark == (check.remark if state == "open" else "")


def test_the_mean_has_students_interval():
    found = mean(TABLE["x"])  # mean 2, standard error 1/sqrt(3), t(2) = 4.302653
    assert found.value == 2.0
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


def test_a_mean_over_cells_counts_each_cell_once():
    """Two seeds of a cell are alike: the interval is Student's over the means 1, 2 and 3."""
    seeds = pd.Series([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], index=pd.Index(list("aabbcc"), name="cell"))
    found, cells = mean(seeds, "cell"), mean(TABLE["x"])
    assert (found.low, found.high) == pytest.approx((cells.low, cells.high))


def test_a_single_value_cannot_decide_a_direction():
    assert above("c", lambda t: mean([5.0]), 0.0).judge(TABLE, "quick").state == "fail"


def test_a_claim_about_nothing_is_open():
    """Rows that own settings leave out decide nothing; a number that is not finite fails, and so
    does a table of ours without what it is made for."""
    none = paired(TABLE.assign(run=[0, 1, 2], way="a"), "x", ["run"], way=("a", "b"))
    equal = paired(TABLE.assign(run=[0, 1, 2], way="a"), "x", ["run"], way=("a", "a"))
    for measured in (mean([]), lowest([]), highest([]), mean(none), *map(mean, [equal])):
        check = above("c", lambda t, measured=measured: measured, 0.0)
        assert check.judge(TABLE, "full").state == "fail"
        outcome = check.judge(TABLE, "full", own=True)
        assert outcome.state == "open"
        assert "nothing that the claim is about" in outcome.remark
    broken = [exact(1.0), exact(math.nan), exact(2.0)]
    for measured in (lowest(broken), highest(broken), mean([math.nan, 1.0])):
        assert above("c", lambda t, m=measured: m, 0.0).judge(TABLE, "full").state == "fail"


def test_an_anchor_is_open_where_it_is_not_known():
    check = near("c", fixed(0.3, 0.3, 0.3), 0.25, 0.02, known_at={"beta": 1.0})
    assert check.judge(TABLE, "full", SimpleNamespace(beta=1.0)).state == "fail"
    elsewhere = check.judge(TABLE, "full", SimpleNamespace(beta=2.0))
    assert (elsewhere.state, elsewhere.remark) == (
        "open",
        "the anchor is known for beta = 1.0 only",
    )


def test_equal_values_are_their_own_interval():
    assert mean([2.0, 2.0, 2.0]) == exact(2.0) == Interval(2.0, 2.0, 2.0)


def test_the_allowed_values_as_text():
    assert above("c", fixed(1, 1, 1), 0.0).judge(TABLE, "quick").allowed == "> 0"
    assert below("c", fixed(1, 1, 1), 0.05).judge(TABLE, "quick").allowed == "< 0.05"
    assert near("c", fixed(1, 1, 1), 0.252, 0.001).judge(TABLE, "quick").allowed == "0.252 ± 0.001"
