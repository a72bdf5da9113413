"""Panels of a hijack result by relation: what is drawn is what the summary says."""

from __future__ import annotations

import copy

import pytest
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


def test_a_scheme_is_named_where_there_are_several(result):
    with pytest.raises(InputError, match="do-not-think"):
        result.plot_relations()
