"""Replaced OV circuits against plain Hugging Face models with edited weights."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from edited_values import (
    PlainValues,
    draw,
    ids_of,
    load,
    run,
    same,
    with_circuits,
    with_outputs,
    with_values,
)
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from tiny_models import FAMILIES, rough, tiny_model

from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import hooked
from hijacklens.probe import HookProbe, probed
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.schemes import get_scheme
from hijacklens.scoring.hijack import hijack
from probes import values
from probes.ablation import ablate
from probes.values.replacements import MatrixSite

SITES = [(0, 1), (1, 0), (1, 3)]


def circuit(plain: PlainValues, layer: int, head: int) -> torch.Tensor:
    return plain.value(layer, plain.kv_of(head)) @ plain.output(layer, head)


def test_the_standin_itself_changes_nothing_by_the_same_circuit(pair, ids):
    plain, _ = pair
    read = PlainValues(plain)
    same(with_circuits(plain, {p: circuit(read, *p) for p in SITES})(ids).logits, plain(ids).logits)


def test_any_matrix(pair, ids):
    """Of full rank, so that no W_V and W_O could give it."""
    plain, model = pair
    new = {site: draw(32, 32, seed=sum(site)) for site in SITES}
    expected = with_circuits(plain, new)(ids).logits
    same(run(model, ids, values.replace_circuit(new)), expected)
    assert (expected - plain(ids).logits).abs().max() > 0.05


# Edits of W_O alone that make W_V W_O the expected product: M = W_V C.
def _shrunk(read, layer, head):
    _, _, v = torch.linalg.svd(circuit(read, layer, head))
    return read.output(layer, head) @ v[:2].T @ v[:2]


EXPRESSIBLE = {
    "zero": (values.zero(), lambda read, *site: torch.zeros_like(read.output(*site))),
    "scaled": (values.scaled(-2), lambda read, *site: -2 * read.output(*site)),
    "low rank": (values.low_rank(2), _shrunk),
}


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_circuits_that_edited_output_matrices_give(pair, ids, name):
    plain, model = pair
    read = PlainValues(plain)
    source, output = EXPRESSIBLE[name]
    # The same matrices, and without the knowledge that they are made of W_V and W_O.
    whole = {site: source.matrix(MatrixSite(model, *site, "circuit")) for site in SITES}
    for keep_bias in (True, False) if read.gpt2 else (True,):
        edited = with_outputs(plain, {site: output(read, *site) for site in SITES})
        if read.gpt2:  # b_V goes through the old W_O if it stays, and through none if it does not
            for layer, head in SITES:
                bias, new = read.bias(layer, head), PlainValues(edited).output(layer, head)
                kept = bias @ read.output(layer, head) if keep_bias else 0
                PlainValues(edited).attention(layer).c_proj.bias.data += kept - bias @ new
        expected = edited(ids).logits
        inner = values.replace_circuit(source, heads=SITES, keep_bias=keep_bias)
        outer = values.replace_circuit(whole, keep_bias=keep_bias)
        assert inner.packs and not outer.packs
        same(run(model, ids, inner), expected)
        same(run(model, ids, outer), expected)


def test_another_head_in_place_of_one(pair, ids):
    plain, model = pair
    read = PlainValues(plain)
    new = {site: circuit(read, site[0], 2) for site in SITES}
    probe = values.replace_circuit(values.taken_from(head=2), heads=SITES)
    same(run(model, ids, probe), with_circuits(plain, new)(ids).logits)


def test_only_one_query_head_of_a_group_changes():
    plain = tiny_model("llama")
    model, ids = load(plain, "llama"), ids_of("llama")
    alone = run(model, ids, values.replace_circuit(values.zero(), heads=[(1, 0)]))
    group = run(model, ids, values.replace(values.zero(), heads=[(1, 0)]))
    both = run(model, ids, values.replace_circuit(values.zero(), heads=[(1, 0), (1, 1)]))
    same(both, group)
    assert (alone - group).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_folded(family):
    plain = tiny_model(family)
    model, ids, read = load(plain, family), ids_of(family), PlainValues(plain)
    model.enable_compatibility_mode(disable_warnings=True)
    new, given, edited = {}, {}, copy.deepcopy(plain)
    for site in SITES:
        weight, bias = read.norm(site[0])
        new[site] = draw(32, 32, seed=sum(site))
        given[site] = weight[:, None] * new[site]
        if read.gpt2:  # the norm's bias was folded by the old matrices, and stays
            kept = bias @ (circuit(read, *site) - new[site])
            PlainValues(edited).attention(site[0]).c_proj.bias.data += kept
    got = run(model, ids, values.replace_circuit(given))
    same(got, with_circuits(edited, new)(ids).logits, normalised=True)


@pytest.mark.parametrize("packs", [True, False])
def test_scores_of_whole_data_sets(pair, packs):
    plain, model = pair
    facts = FactSet(tuple(sample_facts())[:3], name="three")
    new = {site: draw(32, 32, seed=sum(site)) for site in SITES}
    probe = values.replace_circuit(new)
    if packs:
        new = {site: 0.4 * circuit(PlainValues(plain), *site) for site in SITES}
        probe = values.replace_circuit(values.scaled(0.4), heads=SITES)
    assert probe.packs is packs
    result = hijack(model, facts, doses=(0, 2), probes=[probe], quiet=True)
    scorer = PlainScorer(with_circuits(plain, new), model.tokenizer)
    by_case = {fact.case_id: fact for fact in facts}
    for item in result.items.to_dict("records"):
        fact = by_case[item["case_id"]]
        sentence = get_scheme(item["scheme"]).sentence(fact)
        prompt = " ".join([sentence] * item["dose"] + [fact.prompt])
        expected = scorer.scores(prompt, fact.target_false)
        assert item["sum_false"] == pytest.approx(sum(expected), abs=1e-4)


def test_after_a_probe_of_attention(pair, ids):
    """Attention that was edited before is what the new circuit reads by."""
    plain, model = pair
    new = {site: draw(32, 32, seed=sum(site)) for site in SITES}

    def halve(pattern, hook):  # not renormalised: it scales what every head writes, b_V too
        return pattern * 0.5

    half = HookProbe("half", [("blocks.1.attn.hook_pattern", halve)])
    edited = copy.deepcopy(plain)
    read = PlainValues(edited)
    for kv in range(read.kv_heads):
        read.value(1, kv).mul_(0.5)
        if read.gpt2:
            read.bias(1, kv).mul_(0.5)
    expected = with_circuits(edited, {p: m * (0.5 if p[0] else 1) for p, m in new.items()})
    probe = values.replace_circuit(new)
    same(run(model, ids, half, probe), expected(ids).logits)
    with pytest.raises(InputError, match="list probes that change attention or values before"):
        run(model, ids, probe, half)
    shrunk = values.replace_circuit(values.scaled(0.3), layers=1)
    after = {(1, head): 0.3 * circuit(read, 1, head) for head in range(read.heads)}
    same(run(model, ids, half, shrunk), with_circuits(edited, after)(ids).logits)


def test_with_replaced_values_of_the_same_head():
    """The circuit replaces the whole product, so what became of W_V does not matter to it."""
    plain = tiny_model("gpt2")
    model, ids, read = load(plain, "gpt2"), ids_of("gpt2"), PlainValues(plain)
    new, values_new = {(1, 0): draw(32, 32)}, {(1, 0): draw(32, 8), (1, 1): draw(32, 8)}
    probes = [values.replace(values_new), values.replace_circuit(new)]
    expected = with_circuits(with_values(plain, values_new), new)(ids).logits
    same(run(model, ids, *probes), expected)
    assert read.gpt2


def scaled_head(factor):
    scale = torch.ones(4, 1)
    scale[1] = factor
    return HookProbe("scaled", [("blocks.1.attn.hook_z", lambda z, hook: z * scale)])


LATER = {
    "ablated": ablate(heads=[(1, 1)]),
    "scaled": scaled_head(3.0),
    "scaled to nothing": scaled_head(0.0),
    "the circuit again": values.replace_circuit({(1, 1): draw(32, 32)}),
    "a circuit of both matrices": values.replace_circuit(values.zero(), heads=[(1, 1)]),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("nothing", [False, True])
def test_later_probes_on_the_output_of_the_head_are_refused(pair, ids, name, nothing):
    """They were without effect on what the circuit writes, which is added after z."""
    _, model = pair
    probe = values.replace_circuit({(1, 1): draw(32, 32)})
    before = [values.replace(values.zero(), layers=1, keep_bias=False)] if nothing else []
    with pytest.raises(InputError, match="replace_circuit"):
        run(model, ids, *before, probe, LATER[name])


def test_other_heads_and_the_attention_output_can_be_changed_in_any_order(pair, ids):
    _, model = pair
    probe = values.replace_circuit({(1, 1): draw(32, 32)})
    other, output = ablate(heads=[(1, 2)]), ablate(layers=1, site="attn_out")
    same(run(model, ids, probe, other), run(model, ids, other, probe))
    assert (run(model, ids, probe, other) - run(model, ids, probe)).abs().max() > 1e-3
    for order in ([probe, output], [output, probe]):
        same(run(model, ids, *order), run(model, ids, output))


def test_circuits_made_of_both_matrices_work_under_a_cache(pair, ids):
    _, model = pair
    probe = values.replace_circuit(values.low_rank(2), heads=SITES)
    whole = run(model, ids, probe)
    with torch.no_grad():
        with probed(model, [probe], Layout(ids[:, :5], {})):
            _, cache = model(ids[:, :5], return_type="logits_and_cache", use_cache=True)
        with probed(model, [probe], Layout(ids[:, 5:], {}, past_tokens=ids[:, :5])):
            rest, _ = model(ids[:, 5:], return_type="logits_and_cache", past_key_values=cache)
    same(rest, whole[:, 5:])


def test_others_refuse_a_cache(pair, ids):
    _, model = pair
    probe = values.replace_circuit(values.identity(), heads=[(0, 0)])
    layout = Layout(ids[:, 3:], {}, past_tokens=ids[:, :3])
    with pytest.raises(InputError, match="a key/value cache"), probed(model, [probe], layout):
        pass


def test_with_separate_head_results():
    plain = tiny_model("gemma2")
    model, ids = load(plain, "gemma2"), ids_of("gemma2")
    new = {site: draw(32, 32, seed=sum(site)) for site in SITES}
    model.set_use_attn_result(True)
    same(run(model, ids, values.replace_circuit(new)), with_circuits(plain, new)(ids).logits)


def test_hooks_come_off_when_the_order_is_wrong(pair, ids):
    _, model = pair
    before = run(model, ids)
    probe = values.replace_circuit(values.identity(), layers=0)
    double = ("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern * 2)
    layout = Layout(ids, {})
    with pytest.raises(InputError), probed(model, [probe], layout), hooked(model, [double]):
        model(ids)
    assert torch.equal(run(model, ids), before)


@pytest.mark.parametrize("name", ["zero", "scaled", "low rank"])
def test_heads_may_be_wider_than_the_stream(name):
    config = transformers.LlamaConfig(
        vocab_size=420, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = load(rough(transformers.LlamaForCausalLM(config)), "llama")
    site, of = MatrixSite(model, 1, 0, "inner"), MatrixSite(model, 1, 0, "circuit")
    made = {"zero": values.zero(), "scaled": values.scaled(0.5), "low rank": values.low_rank(2)}
    got = of.circuit.A @ made[name].matrix(site) @ of.circuit.B
    torch.testing.assert_close(got, made[name].matrix(of), atol=1e-4, rtol=1e-3)
    run(model, ids_of("llama"), values.replace_circuit(made[name], heads=[(1, 0)]))
