"""Panels of a hijack result by relation: what is drawn is what the summary says."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hijack_runs import made_up_run
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

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


def test_names_of_users_are_shown_as_they_are():
    """A leading underscore hides a label from matplotlib, and dollars begin mathematics."""
    facts = tuple(replace(fact, relation_id="US$_in_C$") for fact in sample_facts())
    run = made_up_run(models=("_edited", "pay$_up$"), schemes=("do-not-think",), facts=facts)
    for figure in (run.plot(), run.plot_relations()):
        figure.canvas.draw()
        texts = [text.get_text().strip() for text in figure.legends[0].get_texts()]
        assert [text.split(" (n")[0] for text in texts] == ["_edited", r"pay\$_up\$"]
    assert r"US\$_in_C\$" in figure.axes[0].get_title()


def test_a_scheme_is_named_where_there_are_several(result):
    with pytest.raises(InputError, match="do-not-think"):
        result.plot_relations()
