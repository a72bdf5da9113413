"""The table of a held-out test, from items whose every number can be counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hijacklens.statistics import USUAL_ICC, clustered_change
from probes.heads.contrasts import contrasts, side_effects

# Margins score(o_) - score(o*) of six facts: on the bare query, and hijacked.
BARE = {"none": [-3, -2, -2, -1, -1, 1], "chosen": [-2, -2, -2, -1, 1, 1]}
HIJACKED = {
    "none": [2, 1, 1, 3, -1, 2],  # the hijack wins five of six, from one
    "chosen": [-1, -2, -1, 2, 2, 2],  # undone on three, new on one
    "layers-0": [2, 1, 1, 3, -1, 2],
    "layers-1": [-1, 1, 1, 3, -1, 2],
    "layers-2": [-1, -1, -1, -1, -1, 2],
    "harm-0": [2, 1, 1, 3, 3, 2],
}
KINDS = {"layers-0": "layers", "layers-1": "layers", "layers-2": "layers", "harm-0": "harm"}
RELATIONS = ["P1", "P1", "P1", "P2", "P2", "P2"]


def items(scheme="do-not-think", dose=1) -> pd.DataFrame:
    rows = []
    for ablation, hijacked in HIJACKED.items():
        bare = BARE.get(ablation, BARE["none"])
        for at_dose, margins in ((0, bare), (dose, hijacked)):
            rows += [
                {
                    "ablation": ablation,
                    "scheme": scheme,
                    "dose": at_dose,
                    "case_id": case,
                    "relation_id": RELATIONS[case],
                    "first_true": -4.0 - (ablation == "chosen"),
                    "first_false": -4.0 - (ablation == "chosen") + margin,
                    "top_token": " Rome" if ablation == "chosen" and case < 2 else " Paris",
                }
                for case, margin in enumerate(margins)
            ]
    return pd.DataFrame(rows)


def table(frame, **options):
    settings = {"rule": "first", "seen_relations": ["P1"], "seen_scheme": "do-not-think"}
    found = contrasts(frame, KINDS, **{**settings, **options})
    return found.set_index(["scheme", "dose", "relations", "measure"])


def test_shares_by_hand():
    row = table(items()).loc["do-not-think", 1, "all", "efficacy"]
    assert row["n"] == 6
    assert (row["bare"], row["none"], row["chosen"]) == pytest.approx((1 / 6, 5 / 6, 3 / 6))
    assert row["change"] == pytest.approx(-2 / 6)
    # The relations change by -1 and 1/3: Student's t of two means.
    test = stats.ttest_1samp([-1, 1 / 3], 0)
    assert row["p"] == pytest.approx(test.pvalue)
    assert [row["change_low"], row["change_high"]] == [-1, 1]  # t of two means leaves this range
    assert (row["estimand"], row["clusters"]) == ("relations like these", 2)
    # Up by four facts, down by two again.
    assert row["recovered"] == pytest.approx(2 / 4)
    assert row["layers_mean"] == pytest.approx((5 + 4 + 1) / 18)
    assert (row["layers_low"], row["layers_high"]) == pytest.approx((1 / 6, 5 / 6))
    # One of three random sets brings efficacy as low.
    assert (row["layers_p"], row["layers_least_p"]) == ((1 + 1) / (3 + 1), 1 / 4)
    assert (row["harm_p"], row["harm_least_p"]) == (1 / 2, 1 / 2)
    # Of the six facts, three win without the heads and six without the set of equal harm; by
    # relation the difference is -1 and 0.
    assert row["beyond_harm"] == pytest.approx(-3 / 6)
    assert -0.5 < row["beyond_harm_high"] < 1
    retention = table(items()).loc["do-not-think", 1, "all", "retention"]
    assert (retention["none"], retention["chosen"]) == pytest.approx((1 / 6, 3 / 6))
    assert (retention["recovered"], retention["layers_p"]) == (0.5, 0.5)


def test_heads_that_change_no_verdict_are_not_certain_to_change_none():
    frame = items().assign(first_true=0.0, first_false=-1.0)
    found = side_effects(frame, KINDS, rule="first", seen_relations=["P1"])
    row = found.set_index(["relations", "measure"]).loc["all", "retention"]
    none = clustered_change(np.zeros(6), np.repeat([0, 1], 3), least_icc=USUAL_ICC)
    for name in ("change", "beyond_harm"):
        assert row[name] == 0
        assert (row[f"{name}_low"], row[f"{name}_high"]) == (none.low, none.high)


def test_the_shift_is_against_the_bare_query_under_the_same_ablation():
    row = table(items()).loc["do-not-think", 1, "all", "shift"]
    without = np.array([5, 3, 3, 4, 0, 1.0])
    with_set = np.array([1, 0, 1, 3, 1, 1.0])
    assert (row["bare"], row["none"], row["chosen"]) == pytest.approx(
        (0, without.mean(), with_set.mean())
    )
    assert row["p"] == 1  # only one of two relations changed
    means = stats.ttest_1samp([-3, 0], 0).confidence_interval()
    assert (row["change_low"], row["change_high"]) == pytest.approx((means.low, means.high))
    assert row["recovered"] == pytest.approx(1 - with_set.sum() / without.sum())


def test_groups_by_relation():
    found = table(items())
    seen = found.loc["do-not-think", 1, "seen", "efficacy"]
    # All have one relation, so that each fact counts.
    assert (seen["n"], seen["clusters"]) == (3, 3)
    assert seen["estimand"] == "these facts (one relation)"
    assert found.loc["do-not-think", 1, "seen", "efficacy"]["chosen"] == 0
    assert found.loc["do-not-think", 1, "new", "efficacy"]["chosen"] == 1
    unseen = table(items(), seen_relations=["P9"])
    assert set(unseen.index.get_level_values("relations")) == {"all", "new"}


def test_p_values_are_corrected_over_schemes_and_doses_of_a_measure():
    second = items("think", 2).assign(first_false=lambda rows: rows["first_false"] + 0.5)
    third = items("mention", 1)
    found = table(pd.concat([items(), second, third], ignore_index=True)).reset_index()
    assert found["scheme_seen"].tolist() == (found["scheme"] == "do-not-think").tolist()
    shift = found[(found["relations"] == "all") & (found["measure"] == "shift")]
    p = shift["p"].to_numpy()
    assert p.tolist() == [p[0]] * 3
    assert shift["p_holm"].tolist() == pytest.approx([min(1, 3 * p[0])] * 3)
    assert shift["p_bh"].tolist() == pytest.approx([p[0]] * 3)


def test_a_reverse_scheme_is_undone_the_other_way():
    frame = items("do-not-think-true")
    flipped = frame.assign(first_true=frame["first_false"], first_false=frame["first_true"])
    row = table(flipped, reverse=["do-not-think-true"]).loc[
        "do-not-think-true", 1, "all", "efficacy"
    ]
    assert (row["bare"], row["none"], row["chosen"]) == pytest.approx((5 / 6, 1 / 6, 3 / 6))
    assert (row["recovered"], row["layers_p"], row["harm_p"]) == pytest.approx((0.5, 0.5, 0.5))


def test_side_effects_by_hand():
    # A second scheme has the same bare queries, which count once.
    frame = pd.concat([items(), items("think")], ignore_index=True)
    found = side_effects(frame, KINDS, rule="first", seen_relations=["P1"])
    found = found.set_index(["relations", "measure"])
    retention = found.loc["all", "retention"]
    assert retention["n"] == 6
    assert (retention["none"], retention["chosen"]) == pytest.approx((5 / 6, 4 / 6))
    assert retention["p"] == 1  # one fact lost
    # No random set keeps as little.
    assert (retention["layers_p"], retention["harm_p"]) == (1 / 4, 1 / 2)
    logprob = found.loc["all", "logprob_true"]
    assert (logprob["none"], logprob["chosen"], logprob["change"]) == (-4, -5, -1)
    tops = found.loc["all", "top_token"]
    assert (tops["none"], tops["chosen"]) == pytest.approx((1, 4 / 6))
    assert found.loc[("seen", "top_token"), "chosen"] == pytest.approx(1 / 3)
    assert "recovered" not in found
