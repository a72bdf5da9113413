"""Two runs, schemes, doses, rules or models, compared fact by fact; numbers by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hijack_runs import made_up_run
from sample_facts import sample_facts
from scipy import stats
from tiny_models import tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.facts.chat import Chat
from hijacklens.models.loading import load_model
from hijacklens.results.glance import drawn
from hijacklens.results.result import load_result
from hijacklens.scoring.comparison import compare
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.power import power
from hijacklens.statistics import USUAL_ICC, clustered, clustered_change


def run(dtype="float32", **options):
    model = load_model(
        copy.deepcopy(tiny_model("llama")),
        tokenizer=tiny_tokenizer("llama"),
        dtype=dtype,
        device="cpu",
    )
    return hijack(
        model, sample_facts(), doses=[0, 1], execution=Execution(store=False), quiet=True, **options
    )


@pytest.fixture(scope="module")
def full():
    return run()


def test_a_run_agrees_with_itself(full):
    parity = compare(full, full)
    assert parity.flips.empty
    assert len(parity.to_dataframe()) == 3 * len(full.items)
    assert (parity.summary()["largest"] == 0).all()


def test_flips_by_hand(full):
    """Two verdicts are turned, one under the rule `first` alone; a tie is a verdict too."""
    items = full.items.copy()
    items.loc[3, "first_false"] = items.loc[3, "first_true"] - np.sign(
        items.loc[3, "first_false"] - items.loc[3, "first_true"]
    )
    items.loc[5, ["sum_true", "n_tokens_true"]] = items.loc[5, ["sum_false", "n_tokens_false"]]
    parity = compare(full, replace(full, items=items))
    flips = {(row.case_id, row.dose, row.rule) for row in parity.flips.itertuples()}
    third, fifth = ((items.loc[i, "case_id"], items.loc[i, "dose"]) for i in (3, 5))
    assert flips == {(*third, "first"), (*fifth, "sum"), (*fifth, "mean")}
    assert parity.configuration()["flipped"] == {"first": 1, "sum": 1, "mean": 1}
    table = parity.summary().set_index(["dose", "rule"])
    assert table.loc[(third[1], "first"), "flipped"] == 1
    n = len(full.items) / 2
    assert table.loc[(third[1], "first"), "share"] == pytest.approx(1 / n)


def test_bfloat16_against_float32(full, tmp_path):
    half = run("bfloat16")
    parity = compare(full, half)
    assert parity.runs["reference"][0].dtype == "float32"
    assert parity.runs["other"][0].dtype == "bfloat16"
    sizes = parity.to_dataframe()["difference"].abs()
    assert 1e-4 < sizes.max() < 1
    widest = parity.flips["reference"].abs().max() if len(parity.flips) else 0
    assert widest <= sizes.max()
    again = load_result(parity.save(tmp_path / "parity"))
    assert again.to_dataframe().equals(parity.to_dataframe())
    assert again.configuration() == parity.configuration()
    assert len(parity.plot().axes) == 1


def with_margins(result, margins, *, scheme="a", dose=1):
    """The run with these margins under the rule `first`, fact by fact."""
    items = result.items.copy()
    rows = (items["scheme"] == scheme) & (items["dose"] == dose)
    items.loc[rows, "first_true"] = 0.0
    items.loc[rows, "first_false"] = margins
    return replace(result, items=items)


@pytest.fixture(scope="module")
def two_schemes():
    """Ten facts of five relations; the verdicts of scheme b are those of a, with 4 lost, 1 won."""
    run = made_up_run(models=("alpha",), schemes=("a", "b"), doses=(0, 1))
    run = with_margins(run, [1, 1, 1, 1, 1, 1, 1, -1, -1, -1])
    return with_margins(run, [-1, -1, -1, -1, 1, 1, 1, 2, -1, -1], scheme="b")


def test_two_schemes_by_hand(two_schemes):
    found = two_schemes.compare("a", "b", dose=1, rule="first")
    row = found.changes().set_index("measure").loc["efficacy"]
    assert (row["n"], row["first"], row["second"]) == (10, 0.7, 0.4)
    assert row["change"] == pytest.approx(-0.3)
    assert (row["gained"], row["lost"]) == (1, 4)
    assert row["facts_p"] == pytest.approx(2 * (1 + 5) / 2**5)
    changes = np.array([-1, -1, -1, -1, 0, 0, 0, 1, 0, 0])
    relations = np.array([fact.relation_id for fact in sample_facts()])
    # So few verdicts change that both are score intervals.
    for name, clusters in (("facts", ()), ("clustered", (relations,))):
        here = clustered_change(changes, *clusters, least_icc=USUAL_ICC)
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((here.low, here.high))
    assert row["clusters"] == len(set(relations))
    margins = found.changes().set_index("measure").loc["margin"]
    assert margins["change"] == pytest.approx((-2 * 4 + 3) / 10)


def test_p_is_corrected_over_the_printed_tests(two_schemes):
    found = two_schemes.compare("a", "b", dose=1, rule="first")
    table = found.changes()
    # Retention mirrors efficacy: three tests, or two and the shift if bare queries differ.
    tests = table["tests"].iloc[0]
    assert tests == len(table) - 1
    smallest = table["facts_p"].min()
    assert table["facts_p_corrected"].min() == pytest.approx(min(1, tests * smallest))
    other = found.changes(correction="benjamini-hochberg")
    assert (other["facts_p_corrected"] <= table["facts_p_corrected"] + 1e-12).all()
    none = found.changes(correction="none")
    assert none["facts_p_corrected"].equals(none["facts_p"].rename("facts_p_corrected"))
    shown = repr(found)
    assert f"p corrected (holm) over {tests} tests" in shown and "these facts" in shown
    first = table.iloc[0]
    assert f"p {first['facts_p']:.2g} ({first['facts_p_corrected']:.2g})" in shown
    assert "no p is corrected" in drawn(found.glance(correction="none"))
    assert "relations like these: 95% t interval over" in shown


def test_the_forest_plot_has_the_rows_of_the_table(two_schemes):
    """The bare query once, then each scheme at its dose; the rule is named."""
    found = compare(two_schemes, with_margins(two_schemes, [1.0] * 10))
    (ax,) = found.plot(rule="mean").axes
    rows = found.changes().query("rule == 'mean' and measure == 'efficacy'")
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == [f"alpha, {row.scheme}, dose {row.dose} (10)" for row in rows.itertuples()]
    assert labels[0] == "alpha, bare, dose 0 (10)" and len(labels) == 3
    points = [line.get_xdata()[0] for line in ax.get_lines() if line.get_marker() == "o"]
    assert points == pytest.approx(list(rows["change"]))
    assert "(fraction of facts; rule: mean)" in ax.get_xlabel()


def test_rounding_is_no_change(two_schemes):
    """A probe that does not touch the bare query changes its margin by rounding alone."""
    items = two_schemes.items
    noise = np.random.default_rng(0).uniform(0, 1e-5, len(items))
    again = replace(two_schemes, items=items.assign(first_false=items["first_false"] + noise))
    assert "shift" not in list(compare(two_schemes, again).changes()["measure"])
    found = compare(two_schemes, again, first={"rule": "first"}, second={"rule": "first"})
    margins = found.changes().query("measure == 'margin'")
    assert (margins[["change", "facts_low", "facts_high"]] == 0).all(axis=None)
    assert (margins["facts_p"] == 1).all()


@pytest.mark.parametrize(
    ("first", "second", "axis"),
    [("alpha", "beta", "model"), (1, 2, "dose"), ("first", "mean", "rule"), ("a", "b", "scheme")],
)
def test_each_axis_of_a_run_can_be_compared(first, second, axis):
    run = made_up_run(schemes=("a", "b"))
    table = run.compare(first, second).to_dataframe()
    assert set(table[axis]) == {f"{first} -> {second}"}
    row = table.iloc[0]
    values = {name: row[name] for name in ("model", "scheme", "dose", "rule")}
    sides = []
    for value in (first, second):
        chosen = {**values, axis: value}
        keys = [name for name in chosen if name != "rule"]
        items = run.items[(run.items[keys] == pd.Series({k: chosen[k] for k in keys})).all(axis=1)]
        item = items[items["case_id"] == row["case_id"]].iloc[0]
        name = "sum" if chosen["rule"] == "mean" else chosen["rule"]
        count = [
            item[f"n_tokens_{x}"] if chosen["rule"] == "mean" else 1 for x in ("false", "true")
        ]
        sides.append(item[f"{name}_false"] / count[0] - item[f"{name}_true"] / count[1])
    assert (row["reference"], row["other"]) == pytest.approx(tuple(sides))


def test_one_relation_gives_a_plain_message(two_schemes):
    facts = two_schemes.items.assign(relation_id="P1")
    found = replace(two_schemes, items=facts).compare("a", "b", dose=1)
    assert "say nothing about relations like these" in repr(found)
    assert found.changes()["clustered_p"].isna().all()
    assert "one relation" in repr(replace(two_schemes, items=facts))


def test_what_only_one_side_has_is_listed_with_the_reason(two_schemes):
    items = two_schemes.items
    skipped = two_schemes.skipped.assign(case_id=0, scheme="a", reason="too long")
    less = replace(two_schemes, items=items[items["case_id"] != 0], skipped=skipped)
    more = replace(two_schemes, items=items[items["case_id"] != 1])
    found = compare(less, more)
    assert set(found.verdicts["case_id"]) == set(items["case_id"]) - {0, 1}
    reasons = found.unmatched.drop_duplicates("case_id").set_index("case_id")
    assert reasons.loc[0, ["only_in", "reason"]].tolist() == ["second", "too long"]
    assert reasons.loc[1, "only_in"] == "first"
    assert "did not include" in reasons.loc[1, "reason"]
    # Another fact under the same number is another fact.
    other = replace(two_schemes, items=items.assign(subject="Nobody"))
    with pytest.raises(InputError, match="no fact in common"):
        compare(two_schemes, other)


def test_probes_and_models_are_named(two_schemes):
    probed = replace(two_schemes, settings=replace(two_schemes.settings, probes=("blind",)))
    assert list(compare(two_schemes, probed).labels.values()) == ["no probe", "blind"]
    beta = replace(two_schemes, items=two_schemes.items.assign(model="beta"))
    assert list(compare(two_schemes, beta).labels.values()) == ["alpha", "beta"]


def test_the_bare_query_that_schemes_share_is_compared_once(two_schemes):
    other = replace(two_schemes, items=two_schemes.items.assign(model="beta"))
    table = compare(two_schemes, other).changes()
    cells = table.drop_duplicates(["scheme", "dose"])[["scheme", "dose"]].to_numpy().tolist()
    assert cells == [["bare", 0], ["a", 1], ["b", 1]]
    assert (table.loc[table["scheme"] == "bare", "n"] == 10).all()


def gate_run(opening="", facts=40, **more):
    """A run of 40 facts in 40 relations whose false target wins in the first 10."""
    items = pd.concat(
        [made_up_run(models=("alpha",), schemes=("a",), doses=(0, 1)).items] * 4,
        ignore_index=True,
    )
    items["case_id"] = np.arange(len(items)) // 2
    items["relation_id"] = "P" + items["case_id"].astype(str)
    items["first_true"], items["first_false"] = 0.0, np.where(items["case_id"] < 10, 1.0, -1.0)
    run = replace(made_up_run(), items=items[items["case_id"] < facts].assign(**more))
    facts = replace(run.settings.facts, opening=opening)
    settings = replace(run.settings, facts=facts, models=run.settings.models[:1])
    return replace(run, settings=settings, prompts=run.prompts.iloc[:0])


def test_a_gate_is_a_typed_verdict_that_is_saved(tmp_path):
    found = compare(gate_run(), gate_run(model="beta")).with_gate(0.1, claim="facts")
    assert found.gate.verdict == "PASS" and found.gate.facts == 40
    assert found.gate.of == "model alpha -> beta, scheme a, dose 1, rule first"
    again = load_result(found.save(tmp_path / "gate"))
    assert again.gate == found.gate and str(found.gate) in repr(again)
    # Both limits by hand: of 40 facts none changes.
    square = stats.t.ppf(0.95, 39) ** 2
    assert found.gate.high == pytest.approx(square / (40 + square))
    worse = compare(gate_run(), gate_run(first_false=1.0)).with_gate(0.1)
    assert worse.gate.verdict == "FAIL" and worse.gate.gained == 30


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (gate_run("Well."), "the prompts differ: opening '' -> 'Well.'"),
        (gate_run(facts=19), "19 facts are fewer than 30"),
        (gate_run(facts=19), "only 19 of the 40 facts of the first side are in both"),
    ],
)
def test_a_gate_on_other_prompts_or_few_facts_is_inconclusive(other, why):
    found = compare(gate_run(), other).with_gate(0.5, claim="facts").gate
    assert found.verdict == "INCONCLUSIVE" and why in found.reasons


def test_what_a_gate_cannot_judge_is_refused(two_schemes):
    both = compare(two_schemes, two_schemes)
    with pytest.raises(InputError, match=r"several \(scheme: a, b\).*--scheme"):
        both.with_gate(0.05)
    one = two_schemes.compare("a", "b", dose=1)
    for margin in (0, 1, 5, float("nan")):
        with pytest.raises(InputError, match="max_rise is"):
            one.with_gate(margin)
        with pytest.raises(InputError, match="equivalence is"):
            one.changes(equivalence=margin)
    with pytest.raises(InputError, match="claim"):
        one.with_gate(0.05, claim="models")


def test_every_setting_that_differs_is_shown(two_schemes):
    """Whatever else differs: a difference in model must not hide one in prompts or facts."""
    settings, (model, *_) = two_schemes.settings, two_schemes.settings.models
    facts = replace(settings.facts, opening="Well.", hash="f" * 64, joining="none", chat=Chat())
    settings = replace(
        settings, facts=facts, seed=5, probes=("blind",), models=(replace(model, dtype="bfloat16"),)
    )
    prompts = two_schemes.prompts.assign(sentence="Think.")
    items = two_schemes.items.assign(model=model.name)
    other = replace(two_schemes, settings=settings, items=items, prompts=prompts)
    found = compare(two_schemes, other)
    names = {"opening", "facts hash", "joining", "chat", "seed", "probes", "dtype", "sentences"}
    assert set(found.differences) == names
    assert found.differences["opening"] == ("''", "'Well.'")
    assert "seed 0 -> 5" in repr(found) and "opening '' -> 'Well.'" in repr(found)
    assert compare(two_schemes, two_schemes).differences == {}


def test_equivalence_needs_a_stated_margin(two_schemes):
    found = two_schemes.compare("a", "b", dose=1, rule="first")
    assert "equivalent_p" not in found.changes()
    row = found.changes(equivalence=0.9, by=("relation", "target_false")).iloc[0]
    assert 0 < row["equivalent_p"] < 0.5
    assert found.changes(equivalence=0.1).iloc[0]["equivalent_p"] > 0.5


def test_a_comparison_is_saved_drawn_and_reported(two_schemes, tmp_path):
    found = two_schemes.compare("a", "b", dose=1)
    again = load_result(found.save(tmp_path / "kept"))
    assert repr(again) == repr(found)
    assert (tmp_path / "kept" / "changes.csv").is_file()
    labels = [text.get_text() for text in found.plot().axes[0].get_yticklabels()]
    assert (
        labels[-1] == "all (10)" and len(labels) == 1 + two_schemes.items["relation_id"].nunique()
    )
    assert [exhibit.heading for exhibit in found.exhibits()][:2] == [
        "Change of efficacy",
        "Changes",
    ]


def test_what_cannot_be_compared_is_refused(two_schemes):
    with pytest.raises(InputError, match="name two schemes, doses, rules or models"):
        two_schemes.compare("a", "c")
    with pytest.raises(InputError, match="no scheme in common"):
        compare(made_up_run(schemes=("a", "b")), made_up_run(schemes=("c", "d")))
    with pytest.raises(InputError, match="by is"):
        two_schemes.compare("a", "b").changes(by=())
    with pytest.raises(InputError, match="cannot be compared"):
        compare(two_schemes, two_schemes.compare("a", "b"))


def test_trends_by_hand(two_schemes):
    run = made_up_run(models=("alpha",), schemes=("a",), doses=(0, 1, 2))
    for dose, margins in enumerate(([-1] * 10, [1] * 4 + [-1] * 6, [1] * 6 + [-1] * 4)):
        run = with_margins(run, margins, dose=dose)
    row = run.trends().iloc[0]
    # Six facts flip in all: four by the first sentence, two by the second.
    assert row["slope"] == pytest.approx(0.3)
    slopes = np.array([0.5] * 6 + [0.0] * 4)
    assert row["facts_low"] == pytest.approx(clustered(slopes).low)
    assert row["half_dose"] == pytest.approx(0.75)
    assert row["half_dose_low"] <= 0.75 <= row["half_dose_high"]
    bare = replace(run, items=run.items[run.items["dose"] == 0])
    with pytest.raises(InputError, match="at least two doses"):
        bare.trends()


def test_power_of_a_pilot(two_schemes):
    pilot = two_schemes.compare("a", "b", dose=1, rule="first")
    found = power(0.1, like=pilot)
    assert found.discordance == pytest.approx(0.5)
    assert found.icc == pytest.approx(max(0, pilot.changes()["icc"].iloc[0]))
    assert found.facts < power(0.05, like=pilot).facts
    assert "relations of 20 facts" in repr(found)
    # A one-sided gate needs fewer facts than a two-sided test of the same change.
    assert found.gate_facts < found.facts
    assert found.gate_relations <= found.relations["relations"].iloc[1]
    for name, value in (("change", 0.0), ("icc", 2.0), ("discordance", 0.01), ("power", 1.0)):
        with pytest.raises(InputError, match=f"{name} is "):
            power(**{name: value})
