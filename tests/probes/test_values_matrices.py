"""Matrices read from models, against the Hugging Face weights; matrices of replacements."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from edited_values import PlainValues, draw, ids_of, load, run, same, with_values
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.probe import Probe
from hijacklens.prompts.layout import Layout
from probes import values
from probes.anatomy.matrices import (
    attention_norm_weight,
    kv_head_of,
    output_matrix,
    ov_circuit,
    value_bias,
    value_matrix,
)
from probes.values.replacements import MatrixSite


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_matrices_are_those_of_the_file(pair):
    read, model = PlainValues(pair[0]), pair[1]
    for layer in (0, 1):
        close(attention_norm_weight(model, layer), read.norm(layer)[0])
        for kv_head in range(read.kv_heads):
            assert torch.equal(value_matrix(model, layer, kv_head), read.value(layer, kv_head))
            bias = read.bias(layer, kv_head) if read.gpt2 else torch.zeros(read.d_head)
            assert torch.equal(value_bias(model, layer, kv_head), bias)
        for head in range(read.heads):
            assert kv_head_of(model, head) == read.kv_of(head)
            assert torch.equal(output_matrix(model, layer, head), read.output(layer, head))
            product = read.value(layer, read.kv_of(head)) @ read.output(layer, head)
            close(ov_circuit(model, layer, head).AB, product)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_moves_the_norm_weight_into_the_matrices(family):
    read = PlainValues(tiny_model(family))
    model = load_model(tiny_model(family), tokenizer=tiny_tokenizer(family), device="cpu")
    model.enable_compatibility_mode(disable_warnings=True)
    for layer in (0, 1):
        close(attention_norm_weight(model, layer), torch.ones(32))
        expected = read.norm(layer)[0][:, None] * read.value(layer, 1)
        got = value_matrix(model, layer, 1)
        if read.gpt2:  # a layer norm has centred its output, so folding centres what reads it
            expected = expected - expected.mean(0)
        close(got, expected)


def test_reading_asks_for_a_head_that_is_there(pair):
    read, model = PlainValues(pair[0]), pair[1]
    with pytest.raises(InputError, match=f"kv_head {read.kv_heads} .* it has {read.kv_heads}"):
        value_matrix(model, 0, read.kv_heads)
    with pytest.raises(InputError, match="layer 2 is not one"):
        ov_circuit(model, 2, 0)
    with pytest.raises(InputError, match="head -1"):
        output_matrix(model, 0, -1)


def test_low_rank_is_the_best_one(pair):
    """Its error is what the singular values left out amount to (Eckart and Young)."""
    _, model = pair
    for site in (MatrixSite(model, 1, 1, "value"), MatrixSite(model, 1, 1, "circuit")):
        now = site.current
        for rank in (1, 3):
            new = values.low_rank(rank).matrix(site)
            left_out = torch.linalg.svdvals(now)[rank:]
            assert torch.linalg.matrix_rank(new, rtol=1e-5) == rank
            close(torch.linalg.matrix_norm(now - new), left_out.norm())
        close(values.low_rank(model.cfg.d_head).matrix(site), now)
        with pytest.raises(InputError, match=f"1..{model.cfg.d_head}"):
            values.low_rank(model.cfg.d_head + 1).matrix(site)


def test_random_matrices_have_the_norm_and_rank_of_what_they_replace(pair):
    _, model = pair
    for kind in ("value", "circuit"):
        site, other_site = MatrixSite(model, 1, 1, kind), MatrixSite(model, 1, 0, kind)
        new = values.random(seed=4).matrix(site)
        close(torch.linalg.matrix_norm(new), torch.linalg.matrix_norm(site.current))
        assert torch.linalg.matrix_rank(new, rtol=1e-5) == model.cfg.d_head
        assert torch.equal(new, values.random(seed=4).matrix(site))
        # Far apart: two independent directions in hundreds of dimensions.
        for other in (values.random(seed=5).matrix(site), values.random(seed=4).matrix(other_site)):
            assert abs(torch.cosine_similarity(new.flatten(), other.flatten(), dim=0)) < 0.4


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3"])
def test_a_cue_is_what_the_first_layer_is_given_for_it(family):
    """Where there are no position embeddings, exactly; a memory then answers in its own circuit."""
    plain = tiny_model(family)
    read, hf = PlainValues(plain), copy.deepcopy(plain)
    model = load_model(hf, tokenizer=tiny_tokenizer(family), device="cpu")
    ids = torch.tensor([[5, 300, 17]])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    x = cache["blocks.0.attn.v.hook_in"][0]
    up = plain.lm_head.weight.data * _scale(plain.model.norm, family)
    if family in ("gemma2", "gemma3"):
        up = up * _scale(read.block(0).post_attention_layernorm, family)
    memory = values.associations([(5, 40), (300, 41)])
    expected = torch.outer(x[0], up[40]) + torch.outer(x[1], up[41])
    for head in range(read.heads):
        torch.testing.assert_close(
            memory.matrix(MatrixSite(model, 0, head, "circuit")), expected, atol=1e-4, rtol=1e-4
        )
    for kv_head in range(read.kv_heads):
        outputs = [
            read.output(0, head) for head in range(read.heads) if read.kv_of(head) == kv_head
        ]
        stacked = torch.cat(outputs, 1).double()  # least squares, by another routine
        aim = torch.cat([expected] * len(outputs), 1).double()
        best = torch.linalg.lstsq(stacked.T, aim.T, driver="gelsd").solution.T.float()
        torch.testing.assert_close(
            memory.matrix(MatrixSite(model, 0, kv_head, "value")), best, atol=1e-3, rtol=1e-3
        )


def _scale(norm, family):
    return norm.weight.data + (0 if family == "llama" else 1)


def test_associations_are_recalled_through_gpt2s_norms():
    """Each cue raises its own answer: the direction is the gradient of the logit, up to scale."""
    plain = tiny_model("gpt2")
    model = load_model(plain, tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    made = values.associations([(7, 50)]).matrix(MatrixSite(model, 1, 0, "circuit"))
    output = torch.randn(32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    norm = model.ln_final
    centred = output - output.mean()
    scale = (centred.pow(2).mean() + model.cfg.eps).sqrt().detach()
    logit = ((centred / scale) * norm.w.detach()) @ model.W_U.detach()[:, 50]
    (gradient,) = torch.autograd.grad(logit, output)
    _, _, right = torch.linalg.svd(made)
    assert abs(torch.cosine_similarity(right[0], gradient, dim=0)) == pytest.approx(1, abs=1e-5)
    assert torch.linalg.matrix_rank(made, rtol=1e-5) == 1


KEYS = {
    "zero-value:layers=0-2,heads=1": values.replace(values.zero(), layers=range(3), heads=1),
    "scale-value:factor=0.5,heads=0.1+1.0,keep-bias=no": values.replace(
        values.scaled(0.5), heads=[(1, 0), (0, 1)], keep_bias=False
    ),
    "low-rank-value:rank=2,of=circuit,heads=1.3": values.replace_circuit(
        values.low_rank(2), heads=[(1, 3)]
    ),
    "replace-value:replacement=matched(identity),of=circuit,heads=1.3": values.replace_circuit(
        values.matched(values.identity()), heads=[(1, 3)]
    ),
    'replace-value:replacement="taken_from(layer=5,head=0)"': values.replace(
        values.taken_from(layer=5, head=0)
    ),
    "random-value:seed=2": values.replace(values.random(seed=2)),
    "replace-value:replacement=computed(mine)": values.replace(
        values.computed(lambda model, layer, head: torch.zeros(1), name="mine")
    ),
}


@pytest.mark.parametrize("key", KEYS)
def test_keys(key):
    assert isinstance(KEYS[key], Probe)
    assert KEYS[key].key == key


def test_keys_of_matrices_go_by_their_values():
    one, other = torch.zeros(4, 2), torch.zeros(4, 2)
    other[3, 1] = 1e-7
    keys = [values.replace(matrix).key for matrix in (one, one.clone(), other, one.double())]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    pairs = [{(0, 0): one, (0, 1): other}, {(0, 1): other, (0, 0): one}, {(0, 0): other}]
    first, second, third = (values.replace(pair).key for pair in pairs)
    assert first == second != third
    assert "heads=0.0+0.1" in first
    order = [values.associations(pairs).key for pairs in ([(1, 2)], [(2, 1)])]
    assert order[0] != order[1]


def test_a_probe_can_be_sent_to_another_process(pair):
    _, model = pair
    probe = values.replace(values.matched(values.random(seed=1)), heads=[(1, 0)])
    layout = Layout(torch.tensor([[3, 4]]), {})
    probe.hooks(model, layout)  # by now it holds a matrix for this model
    sent = pickle.loads(pickle.dumps(probe))
    assert sent.key == probe.key
    assert len(sent.hooks(model, layout)) == 2


WRONG = {
    "nothing taken": (lambda: values.taken_from(), "names nothing"),
    "no pairs": (lambda: values.associations([]), "at least one"),
    "words": (lambda: values.associations([("Rome", "Italy")]), "pairs of token ids"),
    "keys": (lambda: values.given({3: torch.zeros(2, 2)}), r"\{\(layer, head\): tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_replacements_without_content(name):
    make, message = WRONG[name]
    with unchecked(), pytest.raises(InputError, match=message):
        make()


class Adapted(torch.nn.Module):
    """A linear module with a low-rank adapter, as peft makes it: `weight` is that of the base."""

    def __init__(self, base: torch.nn.Linear, seed: int) -> None:
        super().__init__()
        self.base, self.bias = base, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = torch.nn.Parameter(draw(base.in_features, 2, seed=seed))
        self.up = torch.nn.Parameter(draw(2, base.out_features, seed=seed + 1))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down @ self.up


def adapted_and_merged():
    """A hooked model with adapters on values and outputs, and a plain one with both merged."""
    plain = tiny_model("llama")
    merged = copy.deepcopy(plain)
    for layer, of_merged in zip(plain.model.layers, merged.model.layers, strict=True):
        for name in ("v_proj", "o_proj"):
            adapted = Adapted(getattr(layer.self_attn, name), seed=len(name))
            setattr(layer.self_attn, name, adapted)
            delta = (adapted.down @ adapted.up).T.detach()
            getattr(of_merged.self_attn, name).weight.data += delta
    return load(plain, "llama"), merged


def test_matrices_are_those_that_modules_with_an_adapter_compute_with():
    model, merged = adapted_and_merged()
    edited = {(1, head): -1.5 * PlainValues(merged).value(1, head) for head in range(2)}
    got = run(model, ids_of("llama"), values.replace(values.scaled(-1.5), layers=1))
    with torch.no_grad():
        same(got, with_values(merged, edited)(ids_of("llama")).logits)
    close(output_matrix(model, 1, 3), PlainValues(merged).output(1, 3))


def test_a_module_that_is_not_linear_has_no_matrix():
    model, _ = adapted_and_merged()
    module = model.blocks[1].attn.v.original_component
    module.forward = lambda x: Adapted.forward(module, x).square()
    with pytest.raises(InputError, match="W_V of layer 1 cannot be read"):
        value_matrix(model, 1, 0)
