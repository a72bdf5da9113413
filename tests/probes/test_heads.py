"""The search for heads: a planted head is found, and numbers agree with plain comparisons."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from own_transformer import own_transformer
from planted_head import PLANTED, planted_facts, planted_model
from sample_facts import sample_facts
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.atlas import atlas
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe
from hijacklens.prompts.schemes import get_scheme
from hijacklens.results.result import load_result
from hijacklens.scoring import efficacy
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.pairs import pairs
from probes import heads, logit_shift
from probes.ablation import ablate, mean_outputs
from probes.heads.gradients import gradient_attribution
from probes.heads.ranking import HeadSearch

ZERO, DIRECT = heads.Method(kind="zero"), heads.Method(attribution="direct")
CASES = (0, 1, 3, 9)
"""Sample facts whose targets differ in their first token for every tokenizer."""


def boot(plain, family):
    return load_model(plain, tokenizer=tiny_tokenizer(family), device="cpu")


def shifts(model, facts, *, dose=1, scheme="do-not-think", probes=()):
    """The logit shift of every fact by its definition, from `hijack`."""
    result = hijack(model, facts, schemes=[scheme], doses=[dose], probes=probes, quiet=True)
    items = result.items.assign(margin=efficacy.margin(result.items, "first"))
    table = items.pivot(index="case_id", columns="dose", values="margin")
    return (table[dose] - table[0]).loc[[fact.case_id for fact in facts]].to_numpy()


def search(model, facts, *, scheme="do-not-think", dose=1, seed=0, size=1, **options):
    made = pairs(model, facts, scheme=scheme, dose=dose, seed=seed)
    return heads.search(model, made, size=size, quiet=True, **options)


@pytest.fixture(scope="module")
def planted():
    return boot(planted_model(), "llama")


@pytest.fixture(scope="module")
def found(planted) -> HeadSearch:
    return search(planted, planted_facts(), size=2, candidates=5)


@pytest.mark.parametrize("attribution", ["gradient", "direct"])
@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_the_planted_head_is_found(planted, attribution, kind):
    method = heads.Method(attribution=attribution, kind=kind)
    facts = planted_facts()
    nine = tuple(replace(fact, relation_id=f"P{i // 2}") for i, fact in enumerate(facts))
    found = search(planted, replace(facts, facts=nine), candidates=2, method=method)
    assert found.heads == (PLANTED,)
    assert found.estimand == "relations like these"
    assert found.candidates[0] == PLANTED
    table = found.to_dataframe()
    best = table[table["chosen"]].iloc[0]
    assert (best["layer"], best["head"], best["rank"]) == (*PLANTED, 1)
    # It alone carries nearly all of the shift, and the intervals show it.
    assert best["share"] == pytest.approx(1.0, abs=0.1)
    assert best["low"] > 0
    assert best["p_holm"] < 0.05
    assert table.loc[~table["chosen"], "carried"].abs().max() < 0.15


def test_with_all_other_heads_silent_the_planted_head_carries_the_shift():
    model = boot(planted_model(others=0.0), "llama")
    found = search(model, planted_facts(), layers=1, candidates=4)
    assert found.heads[0] == PLANTED
    # Rotary positions: without attention the last token is the same after any hijack.
    np.testing.assert_allclose(found.carried_by_set[:, 0], found.shift, atol=1e-5)
    at = found.candidates.index(PLANTED)
    others = np.delete(found.carried, at, axis=1)
    np.testing.assert_allclose(others, 0, atol=1e-5)
    assert found.growth["share"].tolist() == pytest.approx([1], abs=1e-4)
    assert (
        np.abs(np.delete(found.attribution.reshape(len(found.facts), -1), 6, axis=1)).max() < 1e-6
    )


def silence(plain, family, layer, head):
    """The plain model with what a query head writes taken out of its output matrix."""
    edited = copy.deepcopy(plain)
    with torch.no_grad():
        if family == "gpt2":
            weight = edited.transformer.h[layer].attn.c_proj.weight  # [head * d_head, d_model]
            width = weight.shape[0] // 4
            weight[head * width : (head + 1) * width] = 0
        else:
            weight = edited.model.layers[layer].self_attn.o_proj.weight
            width = weight.shape[1] // 4
            weight[:, head * width : (head + 1) * width] = 0
    return edited


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_effects_agree_with_edited_weights(family):
    plain = tiny_model(family)
    facts = sample_facts().where(case_ids=CASES)
    model = boot(copy.deepcopy(plain), family)
    found = search(model, facts, candidates=2, method=ZERO)
    whole = shifts(model, facts)
    np.testing.assert_allclose(found.shift, whole, atol=1e-5)
    for i, (layer, head) in enumerate(found.candidates):
        edited = boot(silence(plain, family, layer, head), family)
        carried = whole - shifts(edited, facts)
        np.testing.assert_allclose(found.carried[:, i], carried, atol=1e-4)
        assert np.abs(carried).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_attribution_is_the_slope_of_ablation(family):
    """Taking a hundredth of a head away changes the shift by a hundredth of its attribution."""
    model = boot(tiny_model(family), family)
    facts = sample_facts().where(case_ids=CASES)
    kind = "zero" if family == "gemma" else "mean"
    method = heads.Method(kind=kind)
    found = search(model, facts, candidates=1, method=method)
    layer, head = found.heads[0]
    away = 0.0 if found.means is None else found.means.values[layer, head]

    def taken(share):
        def hook_function(z, hook):
            part = (1 - share) * z[:, :, head] + share * away
            return torch.cat([z[:, :, :head], part[:, :, None], z[:, :, head + 1 :]], dim=2)

        hooks = [(f"blocks.{layer}.attn.hook_z", hook_function)]
        return shifts(model, facts, probes=[HookProbe(f"{share} taken", hooks)])

    slope = (taken(-0.01) - taken(0.01)) / 0.02
    assert np.abs(slope).max() > 0.01
    np.testing.assert_allclose(found.attribution[:, layer, head], slope, atol=3e-3, rtol=3e-3)


def test_direct_attribution_is_that_of_the_account(planted):
    made = pairs(planted, planted_facts()[:4])
    found = heads.search(planted, made, size=1, candidates=1, method=DIRECT, quiet=True)
    account = logit_shift.head_attribution(planted, made)
    np.testing.assert_allclose(found.attribution, account.numpy(), atol=1e-6)


def test_attribution_does_not_depend_on_the_batch_or_on_frozen_weights(planted, found):
    made = pairs(planted, planted_facts())
    before = {name: value.requires_grad for name, value in planted.named_parameters()}
    with torch.no_grad():
        single = gradient_attribution(planted, made, means=found.means, batch_tokens=1)
    np.testing.assert_allclose(single, found.attribution, atol=1e-5)
    assert all(value.grad is None for value in planted.parameters())
    try:
        for value in planted.parameters():
            value.requires_grad_(False)
        with torch.inference_mode():
            frozen = gradient_attribution(planted, made, means=found.means)
    finally:
        for name, value in planted.named_parameters():
            value.requires_grad_(before[name])
    np.testing.assert_allclose(frozen, found.attribution, atol=1e-5)
    assert not any(point.fwd_hooks for point in planted.hook_dict.values())


def test_a_search_may_run_in_inference_mode(planted, found):
    with torch.inference_mode():
        inside = search(planted, planted_facts(), candidates=1)
        late = boot(planted_model(), "llama")
    np.testing.assert_allclose(inside.attribution, found.attribution, atol=1e-6)
    some = pairs(planted, planted_facts())
    with pytest.raises(InputError, match="this model was loaded inside"):
        gradient_attribution(late, some, means=None)


def test_greedy_adds_the_head_that_increases_the_effect_most():
    model = boot(tiny_model("llama", seed=1), "llama")
    facts = sample_facts().where(case_ids=CASES)
    method = heads.Method(kind="zero", strategy="greedy")
    found = search(model, facts, size=2, candidates=3, method=method)
    whole = shifts(model, facts)

    def carried(*chosen):
        return (whole - shifts(model, facts, probes=[ablate(heads=chosen)])).mean()

    first = max(found.candidates, key=carried)
    rest = [head for head in found.candidates if head != first]
    second = max(rest, key=lambda head: carried(first, head))
    assert found.heads == (first, second)
    assert found.growth["carried"].tolist() == pytest.approx(
        [carried(first), carried(first, second)], abs=1e-5
    )


def test_top_takes_the_largest_exact_effects(found):
    exact = found.carried.mean(0)
    best = [found.candidates[i] for i in np.argsort(-exact)[:2]]
    assert list(found.heads) == best
    attributed = found.attribution.mean(0)
    assert [attributed[head] for head in found.candidates] == sorted(attributed.ravel())[::-1][:5]
    guessed = [attributed[head] for head in found.candidates]
    assert found.agreement.pearson == pytest.approx(np.corrcoef(guessed, exact)[0, 1])
    assert found.agreement.heads == 5


def test_a_reverse_scheme_has_heads_of_the_opposite_sign(planted):
    found = search(planted, planted_facts(), scheme="do-not-think-true", candidates=2)
    assert found.heads == (PLANTED,)
    assert found.shift.mean() < -0.3
    assert found.growth["share"].iloc[0] == pytest.approx(1, abs=0.1)


def test_facts_without_a_shift_are_listed(planted):
    model = boot(tiny_model("llama"), "llama")
    facts = sample_facts()
    found = search(model, facts, scheme="near-word", candidates=1)
    kept = {fact.case_id for fact in found.facts}
    assert kept | set(found.skipped["case_id"]) == set(range(10))
    assert not kept & set(found.skipped["case_id"])
    assert found.skipped["reason"].str.contains("no near word").any()
    twins = search(model, facts.where(case_ids=[0, 1, 3, 5]), candidates=1)
    assert twins.skipped["case_id"].tolist() == [5]  # New York and New Delhi
    assert "start with the same token" in twins.skipped["reason"].iloc[0]
    with pytest.raises(InputError, match="no fact of sample has a shift"):
        search(model, facts.where(case_ids=[5]), candidates=1)
    with pytest.raises(InputError, match=r"2 of the facts of sample .* at least 3"):
        search(model, facts.where(case_ids=[0, 1]), candidates=1)


def test_means_are_of_the_bare_queries_that_are_searched(planted, found):
    means = mean_outputs(planted, found.facts)
    torch.testing.assert_close(found.means.values, means.values)
    probe = ablate(heads=[PLANTED], kind="mean", means=means)
    at = found.candidates.index(PLANTED)
    carried = found.shift - shifts(planted, found.facts, probes=[probe])
    np.testing.assert_allclose(found.carried[:, at], carried, atol=1e-5)


def test_the_same_seed_gives_the_same_search(planted):
    first, again = (search(planted, planted_facts()[:4], seed=3, candidates=2) for _ in range(2))
    pd.testing.assert_frame_equal(again.to_dataframe(), first.to_dataframe())
    pd.testing.assert_frame_equal(again.growth, first.growth)


@pytest.mark.parametrize("kind", ["mean", "zero"])
def test_a_saved_search_is_read_back(planted, tmp_path, kind):
    scheme = get_scheme("relation")
    found = search(
        planted,
        planted_facts()[:6],
        scheme=scheme,
        dose=2,
        size=2,
        candidates=2,
        method=heads.Method(kind=kind),
    )
    found.save(tmp_path / "search")
    written = {path.name for path in (tmp_path / "search").iterdir()}
    assert written == {
        "heads.csv",
        "growth.csv",
        "facts.parquet",
        "skipped.csv",
        "search.npz",
        "result.json",
        "heads.svg",
        "heads.png",
    }
    back = load_result(tmp_path / "search")
    assert isinstance(back, HeadSearch)
    pd.testing.assert_frame_equal(back.to_dataframe(), found.to_dataframe())
    assert (back.facts, back.heads, back.settings) == (found.facts, found.heads, found.settings)
    assert (back.scheme.name, back.scheme.templates) == (scheme.name, dict(scheme.templates or {}))
    assert repr(back) == repr(found)
    if kind == "mean":
        assert back.means.hash == found.means.hash
    Path(tmp_path / "search" / "search.npz").unlink()
    with pytest.raises(InputError, match="not complete"):
        load_result(tmp_path / "search")


def test_a_saved_search_asks_its_facts_as_before(planted, tmp_path):
    facts = replace(planted_facts(), joining="none", origin="a data set", note="a note")
    facts = facts.with_opening("Well.")
    found = search(planted, facts[:6], candidates=2)
    back = load_result(found.save(tmp_path / "search"))
    assert isinstance(back, HeadSearch)
    assert back.facts == found.facts
    assert back.facts.opening == "Well." and back.facts.joining == "none"
    new = replace(facts[6:], name="new")
    tests = (each.test(new, random_sets=1, quiet=True) for each in (found, back.on(planted)))
    first, second = (each.sets for each in tests)
    pd.testing.assert_frame_equal(second, first)


def test_layers_can_be_chosen(planted):
    found = search(planted, planted_facts()[:4], layers=[2], candidates=50)
    assert sorted(found.candidates) == [(2, 0), (2, 1), (2, 2), (2, 3)]


def test_the_figure_shows_the_map_and_the_bars(found):
    left, right = found.plot().axes[:2]
    assert left.images[0].get_array().shape == (3, 4)
    assert right.get_yticklabels()[0].get_text() == "1.2"
    assert len(right.patches) == 5
    assert "no head's effect differs" not in right.get_title() + str(found)


def test_a_search_that_finds_nothing_says_so_and_marks_intervals_beyond_the_axis(found):
    noise = np.linspace(-1.0, 1.0, len(found.facts))[:, None] * np.ones(found.carried.shape[1])
    nothing = replace(found, carried=noise + 0.01)
    assert "no head's effect differs from 0: use more facts" in str(nothing)
    bars = nothing.plot().axes[1]
    assert "no head's effect differs from 0" in bars.get_title()
    left, right = bars.get_xlim()
    markers = {line.get_marker(): line for line in bars.get_lines()}
    assert len(markers["<"].get_xdata()) == len(markers[">"].get_xdata()) == 5
    bars.figure.canvas.draw()
    assert bars.get_position().width > 0.3 and left < markers["<"].get_xdata()[0] < right


WRONG = {
    "attribution": ({"attribution": "grad"}, "unknown attribution 'grad'"),
    "kind": ({"kind": "means"}, "unknown kind of ablation 'means'"),
    "strategy": ({"strategy": "best"}, "unknown strategy 'best'"),
    "size": ({"size": 3, "candidates": 2}, "cannot choose 3 heads from 2 candidates"),
    "none": ({"size": 0}, "cannot choose 0 heads"),
    "too many": ({"size": 13}, "cannot choose 13 heads: these layers have 12"),
    "layer": ({"layers": [7]}, "layer 7 is not one of this model's"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(planted, name):
    options, message = WRONG[name]
    with unchecked(), pytest.raises(InputError, match=message):
        search(planted, planted_facts(), **{"size": 5, **options})


def test_a_users_own_hooked_transformer():
    tokenizer = tiny_tokenizer("gpt2")
    model = own_transformer(d_vocab=len(tokenizer), model_name="own")
    model.tokenizer = tokenizer
    facts = sample_facts().where(case_ids=CASES)
    found = search(model, facts, candidates=8, method=ZERO)
    whole = shifts(model, facts)
    for i, (layer, head) in enumerate(found.candidates[:2]):
        weight = model.blocks[layer].attn.W_O
        before = weight.detach().clone()
        with torch.no_grad():
            weight[head] = 0
        carried = whole - shifts(model, facts)
        with torch.no_grad():
            weight.copy_(before)
        np.testing.assert_allclose(found.carried[:, i], carried, atol=1e-4)
    tested = found.test(sample_facts().where(case_ids=[2, 4]), random_sets=1, quiet=True)
    assert tested.settings.models[0].name == "own"


@pytest.mark.packaged
def test_search_and_test_on_a_real_model():
    """Ten facts each: the heads that carry the shift take most of it away on others too."""
    model = load_model("smollm2-135m", device="cpu")
    searched, held_back = heads.halves(atlas().sample(20, seed=0), by="relation", seed=0)
    found = search(model, searched, size=3, candidates=6)
    carried = found.growth["carried"].iloc[-1]
    assert found.shift.mean() > 1
    assert carried > 0.3 * found.shift.mean()
    # Each of them carries a part.
    assert (found.to_dataframe().query("chosen")["carried"] > 0).all()
    at = found.candidates.index(found.heads[0])
    probe = ablate(heads=[found.heads[0]], kind="mean", means=found.means)
    again = found.shift - shifts(model, found.facts, probes=[probe])
    np.testing.assert_allclose(found.carried[:, at], again, atol=1e-4)
    tested = found.test(held_back, random_sets=2, quiet=True)
    shift = tested.summary().query("relations == 'all' and measure == 'shift'").iloc[0]
    assert shift["chosen"] < min(shift["layers_low"], shift["none"])
    assert set(tested.side_effects()["relations"]) == {"all", "new"}
