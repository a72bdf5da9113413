"""Panels of a hijack result by relation: what is drawn is what the summary says."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hijack_runs import made_up_run
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.scoring.hijack import hijack


@pytest.fixture(scope="module")
def result():
    model = load_model(
        copy.deepcopy(tiny_model("gpt2")), tokenizer=tiny_tokenizer("gpt2"), device="cpu"
    )
    return hijack(
        model, sample_facts(), schemes=["do-not-think", "relation"], doses=(0, 1, 3), quiet=True
    )


def test_each_panel_draws_its_relation(result):
    figure = result.plot_relations(scheme="relation", rule="sum")
    shown = [ax for ax in figure.axes if ax.get_title()]
    relations = sorted(set(result.items.relation_id), key=lambda name: int(name[1:]))
    assert [ax.get_title().split(",")[0] for ax in shown] == relations
    for ax, relation in zip(shown, relations, strict=True):
        table = result.summary(rule="sum", relation=relation).query("scheme == 'relation'")
        curve = ax.get_lines()[0]
        assert list(curve.get_xdata()) == list(table.dose)
        assert list(curve.get_ydata()) == pytest.approx(list(table.efficacy))
        assert f"n = {table.n.max()}" in ax.get_title()


def test_every_measure_is_drawn_with_its_interval():
    """Margins of four facts: 1, 3, -2 and 0 nats; two are won by the false target, one is a tie."""
    run = made_up_run(models=("a",), schemes=("think",), doses=(0, 1))
    items = run.items[run.items["case_id"].isin(run.items["case_id"].unique()[:4])].copy()
    items["first_true"], items["first_false"] = 0.0, [0.0, 1.0, 0.0, 3.0, 0.0, -2.0, 0.0, 0.0]
    run = replace(run, items=items)
    expected = {
        "efficacy": (0.5, 0.150039, 0.849961),  # Wilson: 2 of 4, 1 of 4
        "retention": (0.25, 0.045587, 0.699358),
        "margin": (0.5, 0.5 - 3.182446 * 2.081666 / 2, 0.5 + 3.182446 * 2.081666 / 2),
    }
    for measure, (value, low, high) in expected.items():
        (ax,) = run.plot(measure=measure).axes
        assert ax.get_lines()[0].get_ydata()[1] == pytest.approx(value)
        (band,) = ax.collections
        at_dose_1 = [y for x, y in band.get_paths()[0].vertices if x == 1]
        assert (min(at_dose_1), max(at_dose_1)) == pytest.approx((low, high), abs=1e-5)
        assert measure in ax.get_ylabel() and "these facts" in ax.get_ylabel()
    with unchecked(), pytest.raises(InputError, match="did you mean 'margin'"):
        run.plot(measure="margins")
    (ax,) = replace(run, items=items[:2]).plot(measure="margin").axes
    assert list(ax.get_lines()[0].get_ydata()) == [0.0, 1.0]  # one fact has no interval


def test_names_of_users_are_shown_as_they_are():
    """A leading underscore hides a label from matplotlib, and dollars begin mathematics."""
    facts = tuple(replace(fact, relation_id="US$_in_C$") for fact in sample_facts())
    run = made_up_run(models=("_edited", "pay$_up$"), schemes=("do-not-think",), facts=facts)
    for figure in (run.plot(), run.plot_relations()):
        figure.canvas.draw()
        texts = [text.get_text().strip() for text in figure.legends[0].get_texts()]
        assert [text.split(" (n")[0] for text in texts] == ["_edited", r"pay\$_up\$"]
    assert r"US\$_in_C\$" in figure.axes[0].get_title()


def test_panels_by_relation_name_every_model_and_the_rule():
    """Model beta has no fact of the first relation."""
    run = made_up_run(schemes=("think",))
    items = run.items[(run.items["model"] != "beta") | (run.items["relation_id"] != "P36")]
    figure = replace(run, items=items).plot_relations(rule="mean")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alpha", "beta"]
    assert figure._suptitle.get_text().startswith("think\nefficacy: fraction with false > true (")
    assert "rule: mean; band: 95% Wilson" in figure._suptitle.get_text()
    shown = str(replace(run, items=items)).splitlines()[1:8]
    counts = [(line.split()[0], line.split()[1]) for line in shown]  # and their facts
    assert counts == [("model", "facts"), *[("alpha", "10")] * 3, *[("beta", "8")] * 3]


def test_panels_of_many_models_are_two_in_a_row():
    figure = made_up_run(models=("a", "b", "c")).plot()
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", ""]
    assert [bool(ax.get_ylabel()) for ax in figure.axes[:3]] == [True, False, True]
    assert figure.get_figwidth() < 11


def test_figures_name_the_probes():
    run = made_up_run(models=("a",), schemes=("think",))
    run = replace(run, settings=replace(run.settings, probes=("ablate:heads=$0", "b")))
    drawing = run.exhibits()[1]
    assert "Curves of efficacy, with ablate:heads=$0, b (rule" in drawing.alt
    for figure in (run.plot(), run.plot_relations(), drawing.figure):
        assert r"with ablate:heads=\$0, b" in figure._suptitle.get_text()


def test_a_run_of_the_bare_query_alone_is_said_in_words():
    run = made_up_run(schemes=("think",), doses=(0,))
    alone = replace(run, items=run.items[run.items["case_id"] == 0])
    (words,), drawing = alone.exhibits()[0].paragraphs, alone.exhibits()[1]
    assert drawing.alt.count("at dose 0") == 2  # once for each model
    assert words == "alpha, beta completed 1 fact of sample, bare (dose 0)."


def test_a_scheme_is_named_where_there_are_several(result):
    with pytest.raises(InputError, match="do-not-think"):
        result.plot_relations()
