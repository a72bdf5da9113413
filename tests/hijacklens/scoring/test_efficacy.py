"""Efficacy on items whose every number can be worked out by hand."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from hijacklens.scoring import efficacy


def item(case, dose, first, total, tokens=(1, 1), relation="P1", scheme="s", model="m"):
    return {
        "model": model,
        "case_id": case,
        "relation_id": relation,
        "scheme": scheme,
        "dose": dose,
        "first_true": first[0],
        "first_false": first[1],
        "sum_true": total[0],
        "sum_false": total[1],
        "n_tokens_true": tokens[0],
        "n_tokens_false": tokens[1],
    }


@pytest.fixture
def items():
    """Four facts, two relations, doses 0 and 1.

    case 0: true wins bare, false wins hijacked, whatever the rule.
    case 1: false wins both times.
    case 2: a tie of first tokens both times; by sum false wins bare, true hijacked.
    case 3: by first and sum true wins, by mean false does (three tokens against one), both times.
    """
    return pd.DataFrame(
        [
            item(0, 0, (-1, -3), (-1, -3)),
            item(0, 1, (-3, -1), (-3, -1)),
            item(1, 0, (-5, -2), (-5, -2)),
            item(1, 1, (-5, -1), (-5, -1)),
            item(2, 0, (-2, -2), (-4, -3), (2, 2), relation="P2"),
            item(2, 1, (-1, -1), (-2, -5), (2, 2), relation="P2"),
            item(3, 0, (-1, -4), (-3, -6), (1, 3), relation="P2"),
            item(3, 1, (-1, -4), (-3, -6), (1, 3), relation="P2"),
        ]
    )


def row(table, **where):
    for name, value in {"relation": "all", "facts": "all", **where}.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


@pytest.mark.parametrize(
    ("rule", "dose", "efficacy_", "retention", "ties", "shift"),
    [
        ("first", 0, 1 / 4, 2 / 4, 1, 0.0),
        ("first", 1, 2 / 4, 1 / 4, 1, (4 + 1 + 0 + 0) / 4),
        ("sum", 0, 2 / 4, 2 / 4, 0, 0.0),
        ("sum", 1, 2 / 4, 2 / 4, 0, (4 + 1 - 4 + 0) / 4),
        ("mean", 0, 3 / 4 - 1 / 4, 1 / 4 + 0.0, 1, 0.0),
        ("mean", 1, 2 / 4, 1 / 4, 1, (4 + 1 - 2 + 0) / 4),
    ],
)
def test_shares_by_hand(items, rule, dose, efficacy_, retention, ties, shift):
    # By mean, case 3 ties: -3 / 1 for three... its true target has one token and -3, its false
    # one three tokens and -6, so -3 against -2: the false target wins.
    if rule == "mean":
        items.loc[items["case_id"] == 3, "sum_false"] = -9.0  # -3 against -3: a tie
    found = row(efficacy.summarise(items), rule=rule, dose=dose)
    assert found["n"] == 4
    assert found["efficacy"] == pytest.approx(efficacy_)
    assert found["retention"] == pytest.approx(retention)
    assert found["ties"] == ties
    assert found["mean_shift"] == pytest.approx(shift)


def test_mean_divides_by_the_number_of_tokens(items):
    case = items[items["case_id"] == 3]
    assert efficacy.score(case, "mean", "true").tolist() == [-3, -3]
    assert efficacy.score(case, "mean", "false").tolist() == [-2, -2]
    assert (efficacy.margin(case, "mean") > 0).all()
    assert (efficacy.margin(case, "sum") < 0).all()


def test_wilson_interval_by_its_formula(items):
    found = row(efficacy.summarise(items), rule="first", dose=0)
    p, n, z = 1 / 4, 4, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert found["efficacy_low"] == pytest.approx(centre - half)
    assert found["efficacy_high"] == pytest.approx(centre + half)


def test_relations_and_known_facts(items):
    table = efficacy.summarise(items)
    assert row(table, rule="first", dose=1, relation="P1")["efficacy"] == 1.0
    assert row(table, rule="first", dose=1, relation="P2")["efficacy"] == 0.0
    known = row(table, rule="first", dose=1, facts="known")
    assert known["n"] == 2  # cases 0 and 3
    assert known["efficacy"] == 0.5
    assert row(table, rule="first", dose=0, facts="known")["retention"] == 1.0
    assert row(table, rule="sum", dose=0, facts="known")["n"] == 2
    assert list(table.columns) == list(efficacy.SUMMARY_COLUMNS)


def test_a_relation_that_is_called_all_is_counted_once(items):
    """`all` is also the name of the rows over every relation."""
    named = items.assign(relation_id=["all"] * 4 + ["relation all"] * 4)
    table, usual = efficacy.summarise(named), efficacy.summarise(items)
    names = {"P1": "relation all", "P2": "relation relation all"}
    expected = usual.assign(relation=usual["relation"].replace(names))
    pd.testing.assert_frame_equal(table, expected)


def test_known_facts_are_each_models_and_schemes_own(items):
    other = items.assign(model="other")
    other.loc[:, ["first_true", "first_false"]] = [-9.0, -1.0]
    table = efficacy.summarise(pd.concat([items, other], ignore_index=True))
    assert row(table, model="m", rule="first", dose=0, facts="known")["n"] == 2
    assert table[(table["model"] == "other") & (table["facts"] == "known")][
        "rule"
    ].unique().tolist() == [
        "sum",
        "mean",
    ]


def test_disagreement_by_hand(items):
    table = efficacy.disagreement(items).set_index("dose")
    # dose 0: case 2 first ties, sum and mean false; case 3 first and sum true, mean false.
    assert table.loc[0, "any"] == pytest.approx(2 / 4)
    assert table.loc[0, "first_sum"] == pytest.approx(1 / 4)
    assert table.loc[0, "first_mean"] == pytest.approx(2 / 4)
    assert table.loc[0, "sum_mean"] == pytest.approx(1 / 4)
    assert table.loc[0, "n"] == 4
