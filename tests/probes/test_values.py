"""Replaced value matrices against plain Hugging Face models with edited weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from edited_values import (
    TEXT,
    PlainValues,
    draw,
    ids_of,
    load,
    run,
    same,
    with_circuits,
    with_values,
)
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from type_checks import unchecked

from hijacklens.engine.engine import read
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.models.exclusive import exclusive
from hijacklens.models.hooked import hooked
from hijacklens.models.identity import identify
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import PACKAGED
from hijacklens.probe import probed
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.schemes import get_scheme
from hijacklens.scoring.hijack import hijack
from probes import values

SITES = [(0, 1), (1, 0), (1, 1)]


def expected_matrices(plain: PlainValues, name: str) -> dict:
    """By hand, from the weights of the plain model."""
    d_model, d_head = plain.d_model, plain.d_head
    matrices = {}
    for site in SITES:
        now = plain.value(*site).clone()
        u, s, v = torch.linalg.svd(now, full_matrices=False)
        matrices[site] = {
            "zero": torch.zeros_like(now),
            "identity": torch.eye(d_model, d_head),
            "scaled": -1.5 * now,
            "low rank": (u[:, :2] * s[:2]) @ v[:2],
            "another head": plain.value(site[0], 0).clone(),
            "another layer": plain.value(0, site[1]).clone(),
            "a matrix": draw(d_model, d_head),
            "matched": torch.eye(d_model, d_head) * (now.norm() / math.sqrt(d_head)),
        }[name]
    return matrices


REPLACEMENTS = {
    "zero": lambda plain: values.zero(),
    "identity": lambda plain: values.identity(),
    "scaled": lambda plain: values.scaled(-1.5),
    "low rank": lambda plain: values.low_rank(2),
    "another head": lambda plain: values.taken_from(head=0),
    "another layer": lambda plain: values.taken_from(layer=0),
    "a matrix": lambda plain: draw(plain.d_model, plain.d_head),
    "matched": lambda plain: values.matched(values.identity()),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replacing_equals_editing_the_weights(pair, ids, name):
    plain, model = pair
    read = PlainValues(plain)
    expected = with_values(plain, expected_matrices(read, name))(ids).logits
    got = run(model, ids, values.replace(REPLACEMENTS[name](read), heads=SITES))
    same(got, expected)
    assert (expected - plain(ids).logits).abs().max() > 0.05  # the edit is one that shows


def test_a_mapping_names_its_sites(pair, ids):
    plain, model = pair
    read = PlainValues(plain)
    new = {(0, 1): draw(read.d_model, read.d_head), (1, 0): draw(read.d_model, read.d_head, seed=1)}
    same(run(model, ids, values.replace(new)), with_values(plain, new)(ids).logits)


def test_a_function_is_called_for_every_site(pair, ids):
    plain, model = pair
    read = PlainValues(plain)

    def make(hooked_model, layer, head):
        assert hooked_model is model
        return draw(read.d_model, read.d_head, seed=10 * layer + head)

    new = {(layer, kv): make(model, layer, kv) for layer in (0, 1) for kv in range(read.kv_heads)}
    got = run(model, ids, values.replace(values.computed(make, name="by site")))
    same(got, with_values(plain, new)(ids).logits)


def test_another_model_lends_its_matrices(pair, ids):
    plain, model = pair
    family = "gpt2" if plain.config.model_type == "gpt2" else plain.config.model_type.split("_")[0]
    other = tiny_model(family, seed=5)
    lent = {site: PlainValues(other).value(*site) for site in SITES}
    probe = values.replace(values.taken_from(model=load(other, family)), heads=SITES)
    same(run(model, ids, probe), with_values(plain, lent)(ids).logits)
    assert "model=" in probe.key


def test_the_bias_of_gpt2_can_go_too():
    plain = tiny_model("gpt2")
    model, ids, read = load(plain, "gpt2"), ids_of("gpt2"), PlainValues(plain)
    new = {site: draw(read.d_model, read.d_head) for site in SITES}
    without = run(model, ids, values.replace(new, keep_bias=False))
    same(without, with_values(plain, new, drop_bias=True)(ids).logits)
    assert (without - run(model, ids, values.replace(new))).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fold", [False, True], ids=["no processing", "folded"])
def test_compatibility_mode(family, fold):
    plain = tiny_model(family)
    model, ids, read = load(plain, family), ids_of(family), PlainValues(plain)
    # Made before the switch: nothing of the unfolded model may be remembered.
    shrunk = values.replace(values.scaled(0.5), heads=[(1, 0)])
    run(model, ids, shrunk)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=not fold)
    new, given, edited = {}, {}, copy.deepcopy(plain)
    for site in SITES:
        weight, bias = read.norm(site[0])
        new[site] = draw(read.d_model, read.d_head, seed=sum(site))
        given[site] = weight[:, None] * new[site] if fold else new[site]
        if fold and read.gpt2:  # the norm's bias has gone into b_V by the old matrix, and stays
            kept = bias @ (read.value(*site) - new[site])
            PlainValues(edited).bias(*site).add_(kept)
    got = run(model, ids, values.replace(given))
    same(got, with_values(edited, new)(ids).logits, normalised=True)
    halved, edited = {(1, 0): 0.5 * read.value(1, 0)}, copy.deepcopy(plain)
    if fold and read.gpt2:
        kept = 0.5 * read.norm(1)[1] @ read.value(1, 0)
        PlainValues(edited).bias(1, 0).add_(kept)
    same(run(model, ids, shrunk), with_values(edited, halved)(ids).logits, normalised=True)


def test_scores_of_packed_prompts_are_those_of_edited_models(pair):
    plain, model = pair
    facts = FactSet(tuple(sample_facts())[:4], name="four")
    read = PlainValues(plain)
    new = {site: draw(read.d_model, read.d_head) for site in SITES}
    probe = values.replace(new)
    assert probe.packs
    result = hijack(model, facts, doses=(0, 2), probes=[probe], quiet=True)
    scorer = PlainScorer(with_values(plain, new), model.tokenizer)
    by_case = {fact.case_id: fact for fact in facts}
    assert len(result.items) == 8
    for item in result.items.to_dict("records"):
        fact = by_case[item["case_id"]]
        sentence = get_scheme(item["scheme"]).sentence(fact)
        prompt = " ".join([sentence] * item["dose"] + [fact.prompt])
        for side, target in (("true", fact.target_true), ("false", fact.target_false)):
            expected = scorer.scores(prompt, target)
            assert item[f"sum_{side}"] == pytest.approx(sum(expected), abs=1e-4)
    assert result.settings.probes == (probe.key,)


def test_under_a_key_value_cache(pair, ids):
    _, model = pair
    probe = values.replace(values.low_rank(2), heads=SITES)
    whole = run(model, ids, probe)
    with torch.no_grad():
        with probed(model, [probe], Layout(ids[:, :5], {})):
            _, cache = model(ids[:, :5], return_type="logits_and_cache", use_cache=True)
        with probed(model, [probe], Layout(ids[:, 5:], {}, past_tokens=ids[:, :5])):
            rest, _ = model(ids[:, 5:], return_type="logits_and_cache", past_key_values=cache)
    same(rest, whole[:, 5:])


def test_composition_and_order(pair, ids):
    plain, model = pair
    read = PlainValues(plain)
    first, second = (draw(read.d_model, read.d_head, seed=i) for i in (0, 1))
    probes = [values.replace(first, layers=1), values.replace(second, heads=[(1, 0)])]
    new = {(1, kv): first for kv in range(read.kv_heads)} | {(1, 0): second}
    same(run(model, ids, *probes), with_values(plain, new)(ids).logits)
    # A later probe of the output sees the replaced values: this one takes a head of another layer.
    silence = ("blocks.0.attn.hook_z", lambda z, hook: torch.zeros_like(z))
    with hooked(model, [silence]):
        both = run(model, ids, *probes)
    gone = with_values(plain, new)
    for head in range(read.heads):
        PlainValues(gone).output(0, head).zero_()
    same(both, gone(ids).logits)


def test_nothing_is_left_behind(pair, ids):
    _, model = pair
    before, hash_before = run(model, ids), identify(model).weights_hash
    hooks = {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()}
    probes = [
        values.replace(values.random(seed=0)),
        values.replace_circuit(values.zero(), heads=[(0, 0)]),
    ]

    def fail(logits, hook):
        raise KeyboardInterrupt

    assert not torch.equal(run(model, ids, *probes), before)
    with pytest.raises(KeyboardInterrupt), hooked(model, [("blocks.1.hook_resid_post", fail)]):
        run(model, ids, *probes)
    assert {name: list(point.fwd_hooks) for name, point in model.hook_dict.items()} == hooks
    assert identify(model).weights_hash == hash_before
    assert torch.equal(run(model, ids), before)


def test_matrices_are_made_once_in_a_run_and_again_in_the_next():
    model, ids = load(tiny_model("llama"), "llama"), ids_of("llama")
    calls = []

    def make(hooked_model, layer, head):
        calls.append((layer, head))
        return torch.zeros(32, 8)

    counted = values.replace(values.computed(make, name="counted"), heads=[(0, 1), (1, 1)])
    with exclusive(model):
        run(model, ids, counted)
        run(model, ids, counted)
    assert calls == [(0, 1), (1, 1)]
    # An edit that torch does not notice, between two runs of the same probe.
    probe, requests = values.replace(values.low_rank(2)), {(1, 2, 3): {4}}
    options = ReadOptions(probes=[probe])
    before = read(model, requests, options)
    for parameter in model.parameters():
        parameter.data.mul_(-1.5)
    fresh = ReadOptions(probes=[values.replace(values.low_rank(2))])
    after = read(model, requests, options)
    assert dict(after) == dict(read(model, requests, fresh)) != dict(before)
    assert not torch.equal(run(model, ids, counted), run(model, ids))
    assert calls == [(0, 1), (1, 1)] * 2


def test_gradients_flow_after_scoring():
    model, ids = load(tiny_model("llama"), "llama"), ids_of("llama")
    probe, layout = values.replace(values.low_rank(2)), Layout(ids, {})
    with torch.inference_mode(), probed(model, [probe], layout):
        scored = model(ids)
    with torch.enable_grad(), probed(model, [probe], layout):
        logits = model(ids)
        logits[0, -1, 0].backward()
    torch.testing.assert_close(logits.detach(), scored.clone())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_half_precision_keeps_its_type():
    model = load_model(
        tiny_model("gemma3"), tokenizer=tiny_tokenizer("gemma3"), dtype="bfloat16", device="cpu"
    )
    ids = ids_of("gemma3")
    got = run(model, ids, values.replace(values.low_rank(16)))  # full rank: nothing changes
    assert got.dtype == torch.bfloat16
    assert (got - run(model, ids)).abs().max() < 0.3


WRONG = {
    "shape": ((torch.zeros(8, 32),), {}, r"gives the shape \[8, 32\] for layer 0, kv_head 0"),
    "uncalled": ((values.zero,), {}, r"zero\(\) or memory\(task\)"),
    "other": (("zero",), {}, "not by 'zero'"),
    "no such head": ((values.zero(),), {"heads": [2]}, "kv_head 2 .* it has 2"),
    "rank": ((values.low_rank(9),), {}, "rank must lie in 1..8"),
    "not in the mapping": (({(0, 0): torch.zeros(32, 8)},), {"layers": 1}, "no matrix is given"),
    "an empty mapping": (({},), {}, "at least one entry"),
    "the wrong memory": ((values.associations([(0, 999)]),), {}, "0 to 999"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name):
    model, ids = load(tiny_model("llama"), "llama"), ids_of("llama")
    args, options, message = WRONG[name]
    with unchecked(), pytest.raises(InputError, match=message):
        run(model, ids, values.replace(*args, **options))


def test_models_with_split_inputs_are_refused():
    model, ids = load(tiny_model("gpt2"), "gpt2"), ids_of("gpt2")
    model.set_use_split_qkv_input(True)
    with pytest.raises(InputError, match=r"set_use_split_qkv_input\(False\)"):
        run(model, ids, values.replace(values.zero()))


@pytest.mark.packaged
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models(name):
    folder = str(PACKAGED[name].folder())
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(name, device="cpu")
    ids, read = torch.tensor([model.tokenizer(TEXT).input_ids]), PlainValues(plain)
    layers = model.cfg.n_layers
    new = {(layer, 0): draw(read.d_model, read.d_head) for layer in (layers // 2, layers - 2)}
    circuits = {(layers // 2, 1): draw(read.d_model, read.d_model) * 0.1}
    got = run(model, ids, values.replace(new), values.replace_circuit(circuits))
    expected = with_circuits(with_values(plain, new), circuits)(ids).logits
    same(got, expected.detach(), normalised=True)
    assert (got - run(model, ids)).abs().max() > 0.1
