"""Dose curves and the answers of figure 1: changes by hand, tables of two tiny models, figures."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from analyses.paper import answers_over_facts
from analyses.paper.example_answers import AnswerSettings, answers, draw_answers
from analyses.paper.hijack_curves import (
    COLUMNS,
    RELATIONS,
    CurveSettings,
    curves,
    dose_change,
    draw_curves,
    moves,
    verdicts,
)
from analyses.reproduction.workbench import Workbench
from hijacklens.scoring.efficacy import RULES, margin

DEEP, FLAT = "deep", "flat"
"""Two tiny models, of 3 layers and of 2."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A workbench of both, one of them named twice, with the ten sample facts."""
    folders = []
    for name, family, layers in ((DEEP, "llama", 3), (FLAT, "gpt2", 2)):
        folder = tmp_path_factory.mktemp("models") / name
        tiny_model(family, layers=layers).save_pretrained(folder)
        tiny_tokenizer(family).save_pretrained(folder)
        folders.append(str(folder))
    return Workbench(models=(*folders, folders[0]), facts=sample_facts(), quiet=True)


SETTINGS = CurveSettings(
    schemes=("near-word",), relations=("all", "P131"), limit=None, doses=(0, 2)
)


@pytest.fixture(scope="module")
def table(bench):
    return curves(SETTINGS, bench)


def rows(margins, *, model="m", scheme="s", relation="r", kind="item", **more):
    """Rows of `curves` from the margins of facts, dose by dose: the three rules give the same."""
    found = [
        {
            "kind": kind,
            "model": model,
            "scheme": scheme,
            "relation": relation,
            "case_id": case,
            "dose": dose,
            **{f"margin_{rule}": value for rule in RULES},
            **more,
        }
        for dose, values in margins.items()
        for case, value in enumerate(values)
    ]
    return pd.DataFrame(found).reindex(columns=list(COLUMNS))


FOUR = {0: [-1.0, -2.0, 0.0, 3.0], 1: [1.0, -2.0, 0.5, 3.0]}
"""The false target wins 1 fact of 4, then 3: by fact +1, 0, +1 (a tie is no win) and 0."""
MORE = pd.concat([rows(FOUR), rows({0: [-1, -1], 1: [-1, -1]}, relation="other")])
"""FOUR and two facts of another relation whose verdicts never change."""


def test_a_change_is_paired_over_facts():
    (found,) = dose_change(verdicts(rows(FOUR)), 0, 1)
    # The mean of (1, 0, 1, 0) and its standard error sqrt(1/3) / 2; Student's t at 3 is 3.182.
    assert found.value == 0.5
    half = 3.182446 * math.sqrt(1 / 3) / 2
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_a_change_of_all_facts_is_clustered_by_relation():
    """Facts 0 and 1 are of one relation, 2 and 3 of another: mean changes of 1/2 each."""
    pooled = rows(FOUR, relation="all").assign(relation_id=["P1", "P1", "P2", "P2"] * 2)
    (found,) = dose_change(verdicts(pooled), 0, 1)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    (one,) = dose_change(verdicts(pooled.assign(relation_id="P1")), 0, 1)
    assert (one.low, one.high) == (-math.inf, math.inf)


def test_a_change_of_few_facts_needs_the_exact_test():
    """Four of 54 verdicts fall: Student's interval lies below 0, McNemar's p is .125."""
    (found,) = dose_change(verdicts(rows({0: [1.0] * 54, 1: [-1.0] * 4 + [1.0] * 50})), 0, 1)
    assert found.value == pytest.approx(-4 / 54)
    assert found.low == pytest.approx(-0.146, abs=1e-3) and found.high == 0


def test_a_change_back_is_the_same_with_the_other_sign():
    (up,), (down,) = (dose_change(verdicts(rows(FOUR)), *ends) for ends in ((0, 1), (1, 0)))
    assert (down.value, down.low, down.high) == (-up.value, -up.high, -up.low)


def test_changes_pool_relations_and_keep_models_and_schemes_apart():
    others = [rows(FOUR, model="n"), rows(FOUR, scheme="t")]
    found = dose_change(verdicts(pd.concat([MORE, *others])), 0, 1)
    # (m, s) has 2 of 6, (m, t) and (n, s) have 2 of 4.
    assert [interval.value for interval in found] == pytest.approx([1 / 3, 1 / 2, 1 / 2])


def test_a_dose_that_was_not_run_has_no_change():
    assert dose_change(verdicts(rows(FOUR)), 0, 5) == []


def test_verdicts_are_of_items_and_count_ties():
    skipped = pd.DataFrame([{"kind": "skipped", "model": "m", "scheme": "s", "case_id": 9}])
    found = verdicts(pd.concat([rows(FOUR), skipped]))
    assert found["wins"].tolist() == [0, 0, 0, 1, 1, 0, 1, 1]
    assert found["ties"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_a_claim_must_hold_for_every_model_and_rule():
    rises = moves("it rises", (0, 1), up=True)
    by_rules = moves("it rises by all", (0, 1), up=True, rules=RULES)
    surely = rows({0: [-1.0] * 9, 1: [1.0] * 9})
    assert rises.judge(surely, "quick").state == by_rules.judge(surely, "quick").state == "pass"
    both = pd.concat([surely, rows({0: [-1.0] * 9, 1: [-1.0] * 9}, model="n")])
    assert (rises.judge(both, "quick").value, rises.judge(both, "quick").state) == (0, "fail")
    disputed = surely.assign(margin_mean=-1.0)
    assert rises.judge(disputed, "quick").state == "pass"
    assert by_rules.judge(disputed, "quick").state == "fail"


def test_a_claim_about_a_relation_leaves_the_others_out():
    of_other = moves("it rises", (0, 1), up=True, only={"relation": "other"})
    assert of_other.judge(MORE, "quick").value == 0
    of_none = moves("it rises", (0, 1), up=True, only={"relation": "absent"})
    assert of_none.judge(MORE, "quick").state == "fail"
    assert of_none.judge(MORE, "quick", own=True).state == "open"


def test_the_table_has_both_models_once_with_their_size(table, bench):
    assert tuple(table.columns) == COLUMNS
    sizes = table[["model", "layers", "parameters"]].drop_duplicates()
    assert sizes["model"].tolist() == list(bench.models[:2])
    assert sizes["layers"].tolist() == [3, 2]
    plain = sum(weights.numel() for weights in tiny_model("llama", layers=3).parameters())
    assert sizes["parameters"].iloc[0] == plain


def test_items_have_the_margin_by_every_rule(table, bench):
    name = bench.models[1]
    items = table[
        (table["kind"] == "item") & (table["model"] == name) & (table["relation"] == "all")
    ]
    assert set(items["dose"]) == {0, 2}
    result = hl.hijack(
        hl.load_model(name), sample_facts(), schemes=["near-word"], doses=(0, 2), quiet=True
    ).to_dataframe()
    assert items["case_id"].tolist() == result["case_id"].tolist()
    for rule in RULES:
        assert items[f"margin_{rule}"].tolist() == pytest.approx(margin(result, rule).tolist())
    assert items["reason"].isna().all()


def test_facts_that_cannot_be_scored_are_listed_with_the_reason(table, bench):
    skipped = table[table["kind"] == "skipped"]
    without = [fact.case_id for fact in sample_facts() if not fact.near_false]
    for name in bench.models[:2]:
        own = skipped[(skipped["model"] == name) & (skipped["relation"] == "all")]
        assert own["case_id"].tolist() == without
        assert own["reason"].str.contains("no near word is known").all()
    assert skipped["dose"].isna().all()
    assert skipped[[f"margin_{rule}" for rule in RULES]].isna().all(axis=None)


def test_skipped_facts_are_in_no_verdict_and_survive_the_disk(table, tmp_path):
    table.to_csv(tmp_path / "table.csv", index=False)
    again = pd.read_csv(tmp_path / "table.csv")
    assert (again["kind"] == "skipped").sum() == (table["kind"] == "skipped").sum() > 0
    one, other = (dose_change(verdicts(each), 0, 2) for each in (table, again))
    assert one == other
    assert len(one) == 2


def labels(panel):
    return [tick.get_text() for tick in panel.get_xticklabels()]


def test_a_figure_has_two_panels_per_relation(table):
    """With three models: one is named twice, and one more has another name."""
    more = pd.concat([table, table[table["layers"] == 2].assign(model="another")])
    curve, by_size, p131, _ = draw_curves(more, SETTINGS).axes
    assert curve.get_title() == "“Do not think of {near false}.”\nall relations, n = 5, no ties"
    assert p131.get_title().endswith("P131, n = 2, no ties")
    assert "rule first" in curve.get_ylabel()
    assert [label.split("\n")[1] for label in labels(by_size)] == ["2 layers", "3 layers"]


def test_equal_curves_of_two_models_are_side_by_side():
    size = {"layers": 2, "parameters": 1_500_000}
    cell = {"scheme": "think", "relation": "P103"}
    same = pd.concat([rows(FOUR, model=name, **cell, **size) for name in ("m", "n")])
    figure = draw_curves(same, CurveSettings(schemes=("think",), relations=("P103",)))
    (curve,) = figure.axes  # two models say nothing about size
    places = [line.get_xdata()[0] for line in curve.get_lines() if line.get_marker() in "os"]
    assert places == pytest.approx([-0.06, 0.06])
    assert curve.get_title() == "“Think of {false}.”\nP103, n = 4, 2 ties"  # one of each model


def test_a_relation_that_was_not_scored_has_an_empty_panel():
    scored = rows(FOUR, scheme="think", relation="P103", layers=2, parameters=10)
    settings = CurveSettings(schemes=("think",), relations=("P103", "P131"))
    full, empty = draw_curves(scored, settings).axes
    assert full.get_title().endswith("n = 4, 1 tie")
    assert empty.get_title().endswith("P131, n = 0, no ties")
    for panel in draw_curves(scored[:0], settings).axes:  # no relation was
        assert panel.get_title().endswith("n = 0, no ties")


def test_one_model_has_no_size_panel_and_low_curves_get_a_short_axis():
    cell = {"scheme": "do-not-think-true", "relation": "all"}
    low = rows({0: [1.0, *[-1.0] * 99], 1: [-1.0] * 100}, layers=2, parameters=7, **cell)
    settings = CurveSettings(schemes=("do-not-think-true",), relations=("all",), limit=None)
    (curve,) = draw_curves(low, settings).axes
    assert curve.get_title().startswith("“Do not think of {true}.”\nall relations, n = 100")
    assert curve.get_ylim()[1] < 0.1


def test_the_answers_have_the_size_of_the_model_and_their_prompts_as_labels(bench):
    settings = AnswerSettings(contexts=("question alone", "one sentence"), tokens=2)
    table = answers(settings, bench)
    assert table["layers"].tolist() == [3, 3, 2, 2]
    (axes,) = draw_answers(table, settings).axes
    texts = [tick.get_text().replace("\n", " ") for tick in axes.get_yticklabels()]
    assert texts == ["(the question alone)", "The Eiffel Tower is not in Chicago."]


def test_the_relations_are_in_the_order_of_the_paper():
    assert RELATIONS == ("P103", "P131", "P190", "P641")


class TestAnswersOverFacts:
    """Whether the first token of a target is the most likely one, fact by fact."""

    def test_it_is_that_of_the_items(self, bench):
        settings = answers_over_facts.LikelySettings(limit=4)
        table = answers_over_facts.most_likely(settings, bench)
        assert list(table["model"].unique()) == list(dict.fromkeys(bench.models))
        assert len(table) == 2 * 4 * 2
        assert not (table["true"] & table["false"]).any()
        model = bench.language_model(bench.models[0])
        for row in table[table["model"] == bench.models[0]].itertuples():
            (fact,) = bench.scored.where(case_ids=[row.case_id])
            text = f"Do not think of {fact.target_false}. " * row.dose + fact.prompt
            found = hl.answer(model, text, targets=(fact.target_true, fact.target_false))
            assert [row.true, row.false] == [side.rank == 0 for side in found.targets]
        answers_over_facts.draw_most_likely(table, settings)

    def test_its_checks_cluster_by_relation(self):
        """Two relations of two facts whose false target becomes likeliest on 1 and on 2 facts."""
        after = {0: (0, 0, 0, 0), 1: (1, 0, 1, 1)}
        table = pd.DataFrame(
            {"model": "m", "relation_id": "ab"[case // 2], "case_id": case, "dose": dose}
            | {"false": likely, "true": 1 - likely}
            for dose, cases in after.items()
            for case, likely in enumerate(cases)
        )
        more, less = (check.judge(table, "full") for check in answers_over_facts.ANALYSES[0].checks)
        # Relation means of 1/2 and 1: t(1) = 12.706 times 1/4.
        assert more.value == 0.75 and more.low == pytest.approx(0.75 - 12.706 / 4, abs=1e-3)
        assert (less.value, less.high) == (-more.value, -more.low)
