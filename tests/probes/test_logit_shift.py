"""The shift of facts: it is the one that the model gives, and its parts sum to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.probe import HookProbe
from hijacklens.prompts.correspondence import SPANS
from hijacklens.prompts.schemes import Scheme
from hijacklens.results.result import load_result
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.pairs import pairs
from hijacklens.sites import head_count
from hijacklens.statistics import clustered
from probes import logit_shift
from probes.ablation import ablate
from probes.logit_shift.page import save_attention_page

FACTS = sample_facts()
NEGATIVE = "do-not-think"


@pytest.fixture(scope="module")
def traced(model):
    return logit_shift.trace(model, pairs(model, FACTS[:1], scheme=NEGATIVE, dose=2))


@pytest.fixture(scope="module")
def averaged(model):
    return logit_shift.average(model, pairs(model, FACTS), quiet=True)


def test_targets_with_one_first_token_are_refused(model):
    years = replace(FACTS[0], target_true="New York", target_false="New Delhi")
    twins = pairs(model, replace(FACTS, facts=(years,)))
    with pytest.raises(InputError, match="trace cannot take case 0: both targets start with"):
        logit_shift.trace(model, twins)


def test_parts_sum_to_the_shift_of_plain_forward_passes(pair, traced):
    fact, scorer = FACTS[0], PlainScorer(pair[0], pair[1].tokenizer)
    differences = []
    for prompt in (fact.prompt, f"Do not think of Guam. Do not think of Guam. {fact.prompt}"):
        false, true = (scorer.scores(prompt, t)[0] for t in (fact.target_false, fact.target_true))
        differences.append(false - true)
    bare, hijacked = differences
    assert traced.bare == pytest.approx(bare, abs=1e-4)
    assert traced.hijacked == pytest.approx(hijacked, abs=1e-4)
    parts = traced.to_dataframe()
    assert parts["shift"].sum() == pytest.approx(hijacked - bare, rel=1e-4, abs=2e-6)
    assert parts["bare"].sum() == pytest.approx(bare, rel=1e-4, abs=2e-6)
    assert parts["hijacked"].sum() == pytest.approx(hijacked, rel=1e-4, abs=2e-6)
    assert traced.relative_residual < 1e-4
    assert traced.residual == pytest.approx(traced.shift - parts["shift"].sum())


def test_shifts_equal_those_of_scoring(model, averaged):
    items = hijack(model, FACTS, schemes=[NEGATIVE], doses=[1], quiet=True).items
    items["difference"] = items["first_false"] - items["first_true"]
    by_dose = items.pivot(index="case_id", columns="dose", values="difference")
    facts = averaged.facts.set_index("case_id")
    assert list(facts.index) == [fact.case_id for fact in FACTS]
    np.testing.assert_allclose(facts["bare"], by_dose.loc[facts.index, 0], atol=1e-4)
    np.testing.assert_allclose(facts["hijacked"], by_dose.loc[facts.index, 1], atol=1e-4)
    assert averaged.residual < 1e-4 * facts["shift"].abs().max()


def test_the_table_has_every_part_once(model, traced):
    table = traced.to_dataframe()
    keys = ["kind", "position", "layer", "head"]
    assert not table.duplicated(keys).any()
    attention = table[table["kind"] == "attention"]
    n = model.cfg.n_layers * head_count(model, "head")
    assert (attention.groupby("position").size() == n).all()
    assert set(attention["span"]) <= set(SPANS)
    last = attention[attention["span"] == "last"]
    assert last["token"].unique().tolist() == ["of"]
    hijacked_only = attention["span"].isin(["hijack", "mention"])
    assert (attention.loc[hijacked_only, "bare"] == 0).all()
    assert (attention.loc[~hijacked_only, "bare"] != 0).any()
    assert table.loc[table["kind"] == "mlp", "layer"].tolist() == [0, 1]


def test_a_bos_has_separate_rows(family, traced):
    spans = traced.to_dataframe()["span"]
    if family == "gpt2":
        assert "bos" not in set(spans)
    else:
        bos = traced.to_dataframe()[spans == "bos"]
        assert bos["position"].unique().tolist() == [0]
        assert bos["token"].unique().tolist() == ["<s>" if family == "llama" else "<bos>"]


def test_averages_agree_with_single_traces(model, averaged):
    traces = [logit_shift.trace(model, pair) for pair in pairs(model, FACTS[:2])]
    table = averaged.to_dataframe()
    assert list(table.columns) == [
        "kind", "span", "layer", "head", "shift", "stderr", "low", "high", "n"
    ]  # fmt: skip
    for i, trace in enumerate(traces):
        parts = trace.to_dataframe()
        attention = parts[parts["kind"] == "attention"]
        for span in SPANS:
            rows = attention[attention["span"] == span]
            found = averaged.attention[i, SPANS.index(span)].sum()
            assert found == pytest.approx(rows["shift"].sum(), abs=1e-5)
        heads = parts[parts["kind"].isin(["attention", "value_bias"])]
        by_head = heads.groupby(["layer", "head"])["shift"].sum().to_numpy()
        np.testing.assert_allclose(averaged.by_head[i].ravel(), by_head, atol=1e-5)
        mlp = parts.loc[parts["kind"] == "mlp", "shift"]
        np.testing.assert_allclose(averaged.mlp[i], mlp, atol=1e-5)
    total = table["shift"].sum()
    assert total == pytest.approx(averaged.facts["shift"].mean(), abs=1e-5)
    assert averaged.summary()["shift"].sum() == pytest.approx(total, abs=1e-6)
    relations = averaged.facts["relation_id"].to_numpy()
    assert averaged.shift == clustered(averaged.facts["shift"].to_numpy(), relations)
    mlp = clustered(averaged.mlp[:, 0], relations)
    row = table[(table["kind"] == "mlp") & (table["layer"] == 0)].iloc[0]
    assert row[["shift", "stderr", "low", "high"]].tolist() == pytest.approx(
        [mlp.value, mlp.error, mlp.low, mlp.high]
    )


def test_head_attribution_is_the_average_by_head(model, averaged):
    found = logit_shift.head_attribution(model, pairs(model, FACTS))
    assert found.shape == (len(FACTS), model.cfg.n_layers, head_count(model, "head"))
    torch.testing.assert_close(found, torch.from_numpy(averaged.by_head))


def test_any_batch_gives_the_same_averages(gpt2):
    some = pairs(gpt2, FACTS[:4])
    one, many = (
        logit_shift.average(gpt2, some, quiet=True, batch_tokens=size) for size in (1, 400)
    )
    np.testing.assert_allclose(one.attention, many.attention, atol=2e-6)
    np.testing.assert_allclose(one.mlp, many.mlp, atol=2e-6)


@pytest.mark.parametrize("by", [("token", "layer"), ("layer", "head"), ("layer", "span")])
def test_a_map_shows_everything_that_layers_wrote(gpt2, by):
    trace = logit_shift.trace(gpt2, pairs(gpt2, FACTS)[0])
    figure = trace.plot(by=by)
    image = figure.axes[0].images[0].get_array()
    parts = trace.to_dataframe()
    shown = parts.loc[parts["layer"].notna(), "shift"].sum()
    assert float(image.sum()) == pytest.approx(shown, abs=1e-6)
    assert image.shape[by.index("layer")] == 2
    assert figure.axes[0].get_ylabel() == by[0]
    # Probes change what is drawn.
    probed = replace(trace, settings=replace(trace.settings, probes=("ablate:heads=0",)))
    assert "with ablate:heads=0: " in probed.plot(by=by).axes[0].get_title()


def test_maps_by_anything_else_are_refused(gpt2):
    some = pairs(gpt2, FACTS[:2])
    averaged, trace = logit_shift.average(gpt2, some, quiet=True), logit_shift.trace(gpt2, some[0])
    for by in (("token", "head"), ("layer",), ("layer", "kind"), ("token", "layer", "head")):
        with pytest.raises(InputError, match="cannot plot by"):
            trace.plot(by=by)
    with pytest.raises(InputError, match=r"allowed: \('span', 'layer'\)"):
        averaged.plot(by=("token", "layer"))


def test_biggest_parts(traced):
    parts = traced.biggest(3, by=("layer",))
    assert parts["shift"].abs().is_monotonic_decreasing and len(parts) == 3
    whole = traced.biggest(10_000, by=("span",))
    assert whole["shift"].sum() == pytest.approx(traced.to_dataframe()["shift"].sum())
    with pytest.raises(InputError, match="cannot sum by"):
        traced.biggest(3, by=("shift",))


def test_results_are_saved_and_loaded(gpt2, tmp_path):
    made = pairs(gpt2, FACTS, scheme="relation")
    traced, averaged = logit_shift.trace(gpt2, made[4]), logit_shift.average(gpt2, made, quiet=True)
    traced.save(tmp_path / "one")
    found = load_result(tmp_path / "one")
    pd.testing.assert_frame_equal(found.to_dataframe(), traced.to_dataframe())
    assert (found.shift, found.residual) == (traced.shift, traced.residual)
    assert found.configuration() == traced.configuration()
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"token_layer.png", "token_layer.svg", "layer_head.png", "layer_head.svg"} <= names
    averaged.save(tmp_path / "many")
    found = load_result(tmp_path / "many")
    pd.testing.assert_frame_equal(found.to_dataframe(), averaged.to_dataframe())
    pd.testing.assert_frame_equal(found.facts, averaged.facts)
    pd.testing.assert_frame_equal(found.skipped, averaged.skipped)
    np.testing.assert_allclose(found.by_head, averaged.by_head, rtol=1e-9)
    assert repr(found) == repr(averaged)
    for folder, file in (("one", "account.parquet"), ("many", "parts.npz")):
        (tmp_path / folder / file).write_bytes(b"no")
        with pytest.raises(InputError, match=f"{file} is not the file that was saved"):
            load_result(tmp_path / folder)


def test_facts_without_a_pair_are_listed(gpt2):
    rare = Scheme(name="rare", templates={"P131": "Not {target_false}."})
    made = pairs(gpt2, FACTS, scheme=rare)
    found = logit_shift.average(gpt2, made, quiet=True)
    usable = [fact.case_id for fact in FACTS if fact.relation_id == "P131"]
    assert list(found.facts["case_id"]) == usable
    assert len(found.skipped) == len(FACTS) - len(usable)
    assert found.skipped["reason"].str.contains("no sentence for relation").all()
    with pytest.raises(InputError, match="case 2 cannot be attributed: rare has no sentence"):
        logit_shift.head_attribution(gpt2, made)
    none = made.without(["why"] * len(made))
    with pytest.raises(InputError, match="takes one pair of prompts, and these are 0"):
        logit_shift.trace(gpt2, none)
    with pytest.raises(InputError, match=r"none of the 10 facts .* could be accounted for"):
        logit_shift.average(gpt2, none, quiet=True)


def test_the_old_form_takes_facts_with_scheme_dose_and_seed(gpt2):
    made = pairs(gpt2, FACTS[:2], scheme="think", dose=2, seed=1)
    options = {"scheme": "think", "dose": 2, "seed": 1}
    with pytest.warns(FutureWarning, match="average takes prompt pairs"):
        old = logit_shift.average(gpt2, FACTS[:2], quiet=True, **options)
    assert old.configuration() == logit_shift.average(gpt2, made, quiet=True).configuration()
    with pytest.warns(FutureWarning, match="trace takes prompt pairs"):
        old = logit_shift.trace(gpt2, fact=FACTS[0], **options)
    assert old.configuration() == logit_shift.trace(gpt2, made[0]).configuration()


def test_a_page_needs_the_probes_of_its_account(gpt2, tmp_path):
    trace = logit_shift.trace(gpt2, pairs(gpt2, FACTS)[0])
    other = HookProbe("other", [])
    with pytest.raises(InputError, match="give the same"):
        save_attention_page(gpt2, trace, tmp_path / "page.html", probes=[other])
    with pytest.raises(InputError, match="top counts heads"):
        save_attention_page(gpt2, trace, tmp_path / "page.html", top=0)


def test_a_probe_that_puts_the_account_out_of_balance_is_refused(model):
    late = ablate(layers=[1], site="attn_out")
    for call in (
        lambda: logit_shift.trace(model, pairs(model, FACTS)[0], probes=[late]),
        lambda: logit_shift.average(model, pairs(model, FACTS), probes=[late], quiet=True),
    ):
        with pytest.raises(InputError, match="the parts of the account miss"):
            call()


def test_one_pair_and_several_are_distinguished(model):
    made = pairs(model, FACTS)
    with pytest.raises(InputError, match="trace takes one pair of prompts, and these are 10"):
        logit_shift.trace(model, made)
    with unchecked(), pytest.raises(InputError, match=r"a Pair; give a Pairs.*trace\(...\) takes"):
        logit_shift.average(model, made[0])
