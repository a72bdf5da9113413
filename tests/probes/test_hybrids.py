"""Hybrids have layers without attention heads: "all layers" are those that have what is probed."""

from __future__ import annotations

import copy

import pytest
import torch
from rows import subject
from sample_facts import sample_facts
from torch.testing import assert_close

import hijacklens as hl
from hijacklens.errors import InputError
from hijacklens.models.agreement import comparing_once
from hijacklens.probe import probed
from hijacklens.prompts.layout import Layout
from probes.ablation import ablate, mean_outputs
from probes.activations import patch_between
from probes.attention import knock_out
from probes.heads import Method, search
from probes.patching import ByHead, sweep
from probes.values import replace, replace_circuit, zero

IDS = torch.tensor([[7, 8, 9, 10]])


@pytest.fixture(scope="module")
def pair():
    """A plain Jamba whose layer 1 attends and whose layer 0 does not, and the same with hooks."""
    model = subject("jamba").load()
    with comparing_once(model):
        yield copy.deepcopy(model.original_model), model


@pytest.fixture(scope="module")
def model(pair):
    return pair[1]


PROBES = {
    "ablated heads": (ablate(), "o_proj"),
    "ablated attention": (ablate(site="attn_out"), "o_proj"),
    "values": (replace(zero()), "v_proj"),
    "circuits": (replace_circuit(zero()), "o_proj"),
    "ablated MLPs": (ablate(layers=0, site="mlp_out"), "feed_forward"),
}


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_acts_in_the_layers_that_it_can_act_in(pair, name):
    plain, model = copy.deepcopy(pair[0]), pair[1]
    probe, part = PROBES[name]
    weights = (weight for path, weight in plain.named_parameters() if f".{part}." in path)
    of_layer_0 = plain.model.layers[0].feed_forward.parameters()
    with torch.no_grad():
        for weight in of_layer_0 if part == "feed_forward" else weights:
            weight.zero_()
        with probed(model, [probe], Layout(IDS, {})):
            got = model(IDS)
        assert_close(got, plain(IDS).logits, atol=1e-5, rtol=0)
        assert (got - pair[0](IDS).logits).abs().max() > 0.01


def test_attention_is_cut_where_there_is_attention(model):
    names = {"last": [0, 0, 0, 1], "far": [0, 1, 0, 0]}
    masks = {name: torch.tensor([of], dtype=torch.bool) for name, of in names.items()}
    with probed(model, [knock_out("last", "far")], Layout(IDS, masks)), torch.no_grad():
        _, cache = model.run_with_cache(IDS)
    pattern = cache["pattern", 1][0]
    assert not pattern[:, 3, 1].any() and pattern[:, 2, 1].all()


@pytest.mark.parametrize("probe", [ablate(layers=0), replace(zero(), heads=[(0, 1), (1, 1)])])
def test_a_layer_without_heads_is_refused_by_its_number(model, probe):
    with pytest.raises(InputError, match=r"layer 0 of 'Jamba.* no attn.hook_z.* have it: 1\.$"):
        probe.hooks(model, Layout(IDS, {}))


def test_a_model_without_heads_is_refused():
    with pytest.raises(InputError, match="no layer of 'MambaForCausalLM' has attn"):
        replace(zero()).hooks(subject("mamba").load(), Layout(IDS, {}))


def test_means_and_patches_are_of_layers_that_have_the_site(model):
    pairs = hl.pairs(model, sample_facts()[:3], dose=1)
    means = mean_outputs(model, pairs.facts)
    assert means.values[0].isnan().all() and means.values[1].isfinite().all()
    assert list(patch_between(model, pairs, site="z").values) == [1]
    assert list(patch_between(model, pairs, site="resid_post").values) == [0, 1]
    by_head = sweep(model, pairs, ByHead(), quiet=True)
    assert set(by_head.patches["layer"]) == {1}


@pytest.mark.parametrize("method", [Method(), Method(attribution="direct", kind="zero")])
def test_heads_are_searched_among_those_that_exist(model, method, tmp_path):
    facts = sample_facts()
    found = search(model, hl.pairs(model, facts, dose=1), size=1, candidates=2, method=method)
    table = found.to_dataframe()
    assert table[["layer", "head"]].to_numpy().tolist() == [[1, head] for head in range(4)]
    assert sorted(table["rank"]) == [1, 2, 3, 4]
    assert [tick.get_text() for tick in found.plot().axes[0].get_yticklabels()] == ["1"]
    found.save(tmp_path / "search")
    assert hl.load_result(tmp_path / "search").to_dataframe().equals(table)
