"""Intervals and tests against formulas worked out by hand, and against scipy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from type_checks import unchecked

from hijacklens import statistics
from hijacklens.statistics import (
    USUAL_ICC,
    Interval,
    McNemar,
    adjust,
    clustered,
    clustered_change,
    clustered_fraction,
    clustered_ratio,
    detection,
    fraction,
    half_effect,
    judge,
    mcnemar,
    needed,
    rank_p,
)

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
    found = fraction(count, total)
    assert found.value == pytest.approx(value, abs=5e-5)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@given(data=st.data(), total=st.integers(1, 100_000))
def test_the_interval_is_wilsons_and_lies_in_range(data, total):
    count = data.draw(st.integers(0, total))
    found = fraction(count, total)
    assert (found.low, found.high) == pytest.approx(wilson(count, total), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1
    mirrored = fraction(total - count, total)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-9)


def test_a_higher_confidence_is_a_wider_interval():
    z99 = 2.5758293035489004
    found = fraction(30, 80, confidence=0.99)
    assert (found.low, found.high) == pytest.approx(wilson(30, 80, z99), abs=1e-9)


def test_the_old_name_of_fraction_still_works():
    with pytest.warns(FutureWarning, match="share is now called fraction"):
        assert statistics.share is fraction


def test_a_total_of_zero_gives_nan_and_the_complete_range():
    found = fraction(0, 0)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(("count", "total"), [(-1, 5), (6, 5), (1, 0)])
def test_an_impossible_count_is_refused(count, total):
    with pytest.raises(ValueError, match="count must lie in"):
        fraction(count, total)


def test_an_interval_prints_with_three_decimals():
    assert str(Interval(0.6684, 0.6206, 0.7123)) == "0.668 [0.621, 0.712]"


def verdicts(text: str) -> np.ndarray:
    """Verdicts written as `+` and `-`."""
    return np.array([sign == "+" for sign in text])


MCNEMAR = {
    # p = 2 * (fraction of the binomial tail at 1/2), at most 1.
    "no change": ("++--", "++--", McNemar(0, 0, 1.0)),
    "one way": ("+++++-", "------", McNemar(5, 0, 2 / 2**5)),
    "the other way": ("----", "++++", McNemar(0, 4, 2 / 2**4)),
    "even": ("+-", "-+", McNemar(1, 1, 1.0)),
    "four to one": ("++++-+-", "----++-", McNemar(4, 1, 2 * (1 + 5) / 2**5)),
}


@pytest.mark.parametrize("name", MCNEMAR)
def test_mcnemar_by_hand(name):
    first, second, wanted = MCNEMAR[name]
    found = mcnemar(verdicts(first), verdicts(second))
    assert (found.lost, found.gained) == (wanted.lost, wanted.gained)
    assert found.p == pytest.approx(wanted.p, abs=1e-12)


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_that_of_the_whole_table_and_of_the_binomial(pairs):
    first, second = np.array(pairs).T
    found = mcnemar(first, second)
    table = [
        [int((first & second).sum()), found.lost],
        [found.gained, int((~first & ~second).sum())],
    ]
    assert found.p == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue, abs=1e-12)
    if found.lost + found.gained:
        plain = stats.binomtest(found.lost, found.lost + found.gained).pvalue
        assert found.p == pytest.approx(plain, abs=1e-9)
    assert mcnemar(second, first).p == pytest.approx(found.p, abs=1e-12)


def test_runs_of_different_length_are_not_paired():
    with unchecked(), pytest.raises(ValueError, match="3 verdicts cannot be paired with 2"):
        mcnemar(verdicts("++-"), verdicts("++"))


def test_corrections_by_hand():
    p = np.array([0.01, 0.04, 0.03])
    # Holm: smallest times 3, next times 2, largest times 1, never falling.
    assert adjust(p, correction="holm") == pytest.approx([0.03, 0.06, 0.06])
    # Benjamini-Hochberg: p times 3 over its rank, never rising from the largest down.
    assert adjust(p, correction="benjamini-hochberg") == pytest.approx([0.03, 0.04, 0.04])
    # Seven more tests that found nothing.
    assert adjust(p, correction="holm", tests=10) == pytest.approx([0.1, 0.32, 0.27])
    assert adjust(p, correction="benjamini-hochberg", tests=10) == pytest.approx(
        [0.1, 0.4 / 3, 0.4 / 3]
    )
    assert len(adjust(np.zeros(0), correction="holm", tests=4)) == 0
    with pytest.raises(ValueError, match="3 p-values cannot come from 2 tests"):
        adjust(p, correction="holm", tests=2)


@settings(max_examples=10, deadline=None)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=30), more=st.integers(0, 20))
def test_corrections_only_raise_and_keep_the_order(p, more):
    values = np.array(p)
    holm = adjust(values, correction="holm", tests=len(p) + more)
    hochberg = adjust(values, correction="benjamini-hochberg", tests=len(p) + more)
    padded = np.concatenate([values, np.ones(more)])
    for found, method in ((holm, "holm"), (hochberg, "fdr_bh")):
        theirs = multipletests(padded, method=method)[1][: len(p)]
        np.testing.assert_allclose(found, theirs, atol=1e-12)
    assert np.all(holm >= hochberg - 1e-12)
    assert np.all(hochberg >= values - 1e-12)
    assert np.all(holm <= 1)
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(holm[order]) >= -1e-12)


def test_rank_among_controls():
    controls = np.array([0.1, 0.2, 0.3, 0.4])
    assert rank_p(0.5, controls) == 1 / 5
    assert rank_p(0.3, controls) == 3 / 5
    assert rank_p(0.0, controls) == 1.0
    assert rank_p(0.5, np.zeros(0)) == 1.0


def drawn_clusters(sizes, seed=0):
    """Values with a part that their cluster shares, and the clusters."""
    random = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    return random.normal(size=len(clusters)) + random.normal(size=len(sizes))[clusters], clusters


def test_clusters_of_one_size_are_a_t_test_of_their_means():
    values, clusters = drawn_clusters([6] * 10)
    means = values.reshape(10, 6).mean(axis=1)
    found = clustered(values, clusters)
    theirs = stats.ttest_1samp(means, 0.0)
    ends = theirs.confidence_interval()
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert (found.p, found.df, found.clusters) == (
        pytest.approx(theirs.pvalue),
        pytest.approx(9),
        10,
    )
    robust = OLS(values, np.ones(60)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True
    )
    assert found.error == pytest.approx(robust.bse[0])
    assert found.design_effect == pytest.approx(robust.bse[0] ** 2 / (values.var(ddof=1) / 60))
    # Facts that are their own clusters: the paired t-test.
    alone = clustered(values)
    ends = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert (alone.low, alone.high) == pytest.approx((ends.low, ends.high))
    assert math.isnan(alone.icc) and alone.design_effect == pytest.approx(1)


def test_the_correlation_in_clusters_is_that_of_the_analysis_of_variance():
    values, clusters = drawn_clusters([6] * 10)
    groups = values.reshape(10, 6)
    f = stats.f_oneway(*groups).statistic
    assert clustered(values, clusters).icc == pytest.approx((f - 1) / (f + 5))


def test_clusters_of_different_sizes_by_the_matrices_of_bell_and_mccaffrey():
    n = np.array([2, 3, 5, 9, 20, 30])
    values, clusters = drawn_clusters(n, seed=2)
    found = clustered(values, clusters)
    rho = min(max(found.icc, 0), 1)
    assert 0 < rho < 1
    assumed, weights = np.diag(rho + (1 - rho) / n), n / n.sum()
    deviations = np.eye(6) - np.outer(np.ones(6), weights)
    covariance = deviations @ assumed @ deviations.T
    target = weights @ assumed @ weights
    factors = weights**2 * np.diag(assumed) / np.diag(covariance)
    means = np.array([values[clusters == i].mean() for i in range(6)])
    assert found.error**2 == pytest.approx((factors * (means - values.mean()) ** 2).sum())
    form = np.diag(factors) @ covariance
    assert found.df == pytest.approx(target**2 / np.trace(form @ form))
    assert np.trace(form) == pytest.approx(target)  # unbiased


def test_crossed_clusters_add_up_as_cameron_gelbach_and_miller_say():
    values, rows = drawn_clusters([8] * 6, seed=4)
    columns = np.tile(np.arange(8), 6)
    values += 2 * np.random.default_rng(1).normal(size=8)[columns]
    first, second = clustered(values, rows), clustered(values, columns)
    both = clustered(values, rows, columns)
    total = first.error**2 + second.error**2 - clustered(values).error ** 2
    assert both.error**2 == pytest.approx(max(total, first.error**2, second.error**2))
    assert both.df == pytest.approx(5) and both.clusters == 6


def test_p_is_exact_if_few_clusters_change():
    """Three of twenty clusters rise: one in four sign patterns is as extreme."""
    values = np.zeros(40)
    values[[0, 2, 4]] = 1
    clusters = np.repeat(np.arange(20), 2)
    assert clustered(values, clusters).p == 2 / 2**3
    # Facts that are their own clusters: McNemar's exact test.
    changes = np.r_[np.ones(7), -np.ones(2), np.zeros(21)]
    assert clustered(changes).p == pytest.approx(mcnemar(changes < 0, changes > 0).p)
    same = clustered(np.zeros(6), np.repeat([0, 1, 2], 2))
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("n", "p"), [(3, 1 / 4), (5, 1 / 2**4), (12, 1 / 2**11), (20, 1 / 2**19)])
def test_clusters_that_all_change_alike_say_as_much_as_their_number(n, p):
    """p is that of the sign flips, and the change may be less than 1."""
    values, clusters = np.ones(3 * n), np.repeat(np.arange(n), 3)
    found = clustered_change(values, clusters, least_icc=USUAL_ICC, only_if_few=True)
    assert found.p == clustered(values, clusters).p == p == clustered(np.ones(n)).p
    assert found.few and found.low < 1 - 1 / n and found.high == 1
    # One fact more or less, or thirds, which are rounded, change nothing of this.
    values[0] = 0
    nearly = clustered_change(values, clusters, least_icc=USUAL_ICC, only_if_few=True)
    assert nearly.few and nearly.low < found.low and nearly.p >= p
    thirds = clustered_change(np.full(3 * n, 1 / 3), clusters, least_icc=USUAL_ICC)
    assert thirds.few and thirds.p == p and thirds.low < 1 / 3 - 1 / 4 / n


@pytest.mark.parametrize(
    ("relations", "facts", "change"),
    [(3, 3, 0.85), (4, 3, 0.9), (5, 2, 0.9), (10, 1, 0.9), (10, 5, 0.05), (3, 3, 0.1)],
)
def test_the_interval_of_few_clusters_covers_changes_near_none_and_all(relations, facts, change):
    random, clusters, covered = np.random.default_rng(0), np.repeat(range(relations), facts), 0
    for _ in range(200):
        changes = (random.random(len(clusters)) < change).astype(float)
        found = clustered_change(changes, clusters, least_icc=USUAL_ICC, only_if_few=True)
        covered += found.low <= change <= found.high
    assert covered >= 0.95 * 200


def test_what_is_not_known_has_no_p():
    for values in (np.full(6, np.nan), np.r_[np.zeros(5), np.nan]):
        assert math.isnan(clustered(values, np.repeat([0, 1, 2], 2)).p)


def test_crossed_clusters_have_no_order():
    changes, rows = np.zeros(60), np.repeat(np.arange(4), 15)
    changes[[0, 1, 15, 30, 31]] = 1
    of_rows, of_facts = (clustered(changes, of) for of in (rows, np.arange(60)))
    for options in ({}, {"least_icc": USUAL_ICC, "only_if_few": True}):
        one = clustered_change(changes, rows, np.arange(60), **options)
        assert one == clustered_change(changes, np.arange(60), rows, **options)
        assert one.few and one.p >= max(of_rows.p, of_facts.p) and one.icc == of_rows.icc


def test_one_cluster_has_no_interval():
    found = clustered(np.array([1.0, 0.0]), np.array(["P36", "P36"]))
    assert str(found) == "0.500 (one cluster: no interval)"
    assert (found.low, found.high) == (-math.inf, math.inf) and math.isnan(found.p)
    assert math.isnan(found.equivalence(0.1))
    with pytest.raises(ValueError, match="2 values, labels"), unchecked():
        clustered(np.ones(2), np.ones(3))


def test_equivalence_is_two_one_sided_tests():
    values, clusters = drawn_clusters([6] * 10)
    found = clustered(values, clusters)
    means = values.reshape(10, 6).mean(axis=1)
    sides = (
        stats.ttest_1samp(means, -1.5, alternative="greater").pvalue,
        stats.ttest_1samp(means, 1.5, alternative="less").pvalue,
    )
    assert found.equivalence(1.5) == pytest.approx(max(sides))


def test_a_clustered_fraction_is_wilsons_with_the_effective_number_of_facts():
    hits = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1.0])
    clusters = np.repeat([0, 1, 2], 4)
    found = clustered_fraction(hits, clusters)
    plain = clustered(hits, clusters)
    effective = found.value * (1 - found.value) / plain.error**2
    z = stats.t.ppf(0.975, 2)
    assert (found.low, found.high) == pytest.approx(wilson(found.value * effective, effective, z))
    # Nothing differs between three clusters: three observations.
    none = clustered_fraction(np.zeros(12), clusters)
    assert (none.low, none.high) == pytest.approx(wilson(0, 3, z), abs=1e-12)


def test_the_change_of_no_fact_or_of_every_fact_by_hand():
    # Without a change the spread at a change c is |c| - c^2, so n c = t^2 (1 - c).
    none, square = clustered_change(np.zeros(17), np.arange(17)), stats.t.ppf(0.975, 16) ** 2
    assert (none.low, none.high) == pytest.approx((-square / (17 + square), square / (17 + square)))
    every = clustered_change(-np.ones(17), np.arange(17))
    assert every.low == -1 and -1 < every.high < 0
    assert clustered_change(np.ones(4), np.zeros(4)).high == math.inf  # one cluster


def test_equivalence_is_not_shown_by_few_facts_of_which_none_changes():
    # At a change of .05 the score of 0 changes in n facts is sqrt(n .05 / .95).
    for n, shown in ((10, False), (200, True)):
        score, p = math.sqrt(n * 0.05 / 0.95), clustered_change(np.zeros(n)).equivalence(0.05)
        assert p == pytest.approx(stats.t.sf(score, n - 1))
        assert (p < 0.05) == shown


def test_the_correlation_of_few_changed_clusters_is_at_least_the_usual_one():
    clusters, one = np.repeat(np.arange(20), 10), np.eye(200)[0]
    most = 200 / (1 + 9 * USUAL_ICC)
    assert clustered_change(np.zeros(200), clusters, least_icc=USUAL_ICC).effective == most
    assert clustered_change(one, clusters, least_icc=USUAL_ICC).effective == most
    assert clustered_change(one, clusters).effective > most


@pytest.mark.parametrize(
    ("n", "relations", "gained", "lost", "claim", "verdict"),
    [
        (200, 20, 0, 0, "relations", "PASS"),
        (200, 20, 0, 0, "facts", "PASS"),
        (200, 20, 40, 0, "relations", "FAIL"),
        (200, 20, 40, 0, "facts", "FAIL"),
        (200, 20, 14, 10, "facts", "INCONCLUSIVE"),
        (200, 20, 0, 20, "facts", "PASS"),
        (29, 29, 0, 29, "facts", "INCONCLUSIVE"),
        (29, 29, 29, 0, "facts", "INCONCLUSIVE"),
        (200, 9, 0, 100, "relations", "INCONCLUSIVE"),
        (200, 1, 0, 0, "facts", "PASS"),
        (200, 1, 0, 0, "relations", "INCONCLUSIVE"),
    ],
)
def test_the_verdict_of_a_gate(n, relations, gained, lost, claim, verdict):
    random = np.random.default_rng(0)
    changes = random.permutation(np.repeat([1, -1, 0], [gained, lost, n - gained - lost]))
    found = judge(changes < 0, changes > 0, np.arange(n) % relations, max_rise=0.05, claim=claim)
    assert (found.verdict, found.gained, found.lost) == (verdict, gained, lost)
    assert found.rise == pytest.approx((gained - lost) / n)
    assert str(found).startswith(f"{verdict}: efficacy ")


def test_a_gate_seldom_passes_a_rise_of_the_margin():
    """20 relations of 10 facts whose rises vary: t would pass about 14% of such new models."""
    random, clusters, passed = np.random.default_rng(0), np.repeat(np.arange(20), 10), 0
    for _ in range(200):
        chance = random.beta(0.05 * 7.4, 0.95 * 7.4, 20)  # mean .05, correlation .119
        after = random.random(200) < np.repeat(chance, 10)
        gate = judge(np.zeros(200, bool), after, clusters, max_rise=0.05, claim="relations")
        passed += gate.verdict == "PASS"
    assert passed <= 10


def test_a_clustered_change_is_tangos_with_the_effective_number_of_facts():
    changes = np.repeat([1.0, -1.0, 0.0], [12, 2, 36])
    found = clustered_change(changes, np.arange(50))
    square = stats.t.ppf(0.975, 49) ** 2
    for end in (found.low, found.high):
        grid = np.arange(max(0, -end) + 1e-6, (1 - end) / 2, 1e-6)  # fractions of losses
        likelihood = 12 * np.log(grid + end) + 2 * np.log(grid) + 36 * np.log(1 - 2 * grid - end)
        spread = 2 * grid[likelihood.argmax()] + end - end**2
        assert 49 * (found.value - end) ** 2 / spread == pytest.approx(square, rel=1e-4)


def test_an_interval_is_limited_to_what_a_change_can_be():
    change = clustered(np.array([1.0, 1, 1, 0]), np.array([0, 0, 1, 1]))
    assert change.high > 1 and change.within(-1.0, 1.0).high == 1
    assert clustered(np.ones(2), np.zeros(2)).within(-1.0, 1.0).high == math.inf  # one cluster


def test_a_clustered_ratio_by_taylor():
    wholes, clusters = drawn_clusters([6] * 10, seed=3)
    wholes += 5
    parts = wholes / 2 + drawn_clusters([6] * 10, seed=5)[0]
    found = clustered_ratio(parts, wholes, clusters)
    value = parts.sum() / wholes.sum()
    rest = (parts - value * wholes).reshape(10, 6).mean(axis=1)
    half = stats.t.ppf(0.975, 9) * stats.sem(rest) / wholes.mean()
    assert (found.value, found.low, found.high) == pytest.approx(
        (value, value - half, value + half)
    )
    uncertain = clustered_ratio(parts, wholes - wholes.mean() + 0.1, clusters)
    assert (uncertain.low, uncertain.high) == (-math.inf, math.inf)


def test_a_ratio_of_verdicts_that_are_all_undone_is_no_certainty():
    clusters = np.repeat(np.arange(12), 2)
    changes = np.tile([1.0, 0.0], 12)
    every, none = (clustered_ratio(x * changes, changes, clusters) for x in (1, 0))
    of_facts = clustered_fraction(np.ones(12), np.arange(12))
    assert (every.value, every.low, every.high) == (1, of_facts.low, 1)
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(1 - of_facts.low))


def test_the_dose_of_half_effect_by_hand():
    doses = np.array([0.0, 1.0, 5.0])
    curves = np.array([[0, 0.2, 1], [0, 0.2, 1]])
    found = half_effect(curves, doses, np.array([0, 1]), seed=0)
    # From .2 at dose 1 to 1 at dose 5, .5 is three eighths of the way.
    assert found.value == pytest.approx(1 + 4 * 0.3 / 0.8)
    assert (found.low, found.high) == pytest.approx((found.value, found.value))
    flat = half_effect(np.zeros((2, 3)), doses, np.array([0, 1]), seed=0)
    assert math.isnan(flat.value) and (flat.low, flat.high) == (-math.inf, math.inf)


def test_power_is_that_of_statsmodels():
    from statsmodels.stats.power import TTestPower

    spread = math.sqrt(0.3 - 0.05**2)
    found = detection(0.05, icc=0.0, discordance=0.3, relations=500, facts=1)
    assert found == pytest.approx(TTestPower().power(0.05 / spread, 500, 0.05))
    count = TTestPower().solve_power(0.05 / spread, power=0.8, alpha=0.05)
    assert needed(0.05, icc=0.0, discordance=0.3, facts=1) == math.ceil(count)
    # Facts of a relation that all change alike are one observation.
    alike = detection(0.05, icc=1.0, discordance=0.3, relations=500, facts=40)
    assert alike == pytest.approx(found)
