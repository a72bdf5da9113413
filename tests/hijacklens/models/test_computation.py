"""What a model computes: the digest changes with it, and with nothing else."""

from __future__ import annotations

import sys
import types
from functools import cache, cached_property, partial

import pytest
import torch
from peft import LoraConfig
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama import modeling_llama

from hijacklens.models.computation import computation_of, tensors_of
from hijacklens.models.hooked import unnamed_hooks
from hijacklens.models.loading import load_model

IDS = torch.tensor([[1, 2, 3, 4]])


def load(family: str = "llama", model=None):
    model = tiny_model(family) if model is None else model
    return load_model(model, tokenizer=tiny_tokenizer(family), device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_for_two_loads_and_after_a_pass(family):
    one, two = load(family), load(family)
    before, tensors = computation_of(one), tensors_of(one)
    one(IDS, output_attentions=False)
    one.original_model(IDS, output_hidden_states=True)
    one.requires_grad_(False)
    assert computation_of(one) == before == computation_of(two)
    assert before.unkeyed == ()
    assert tensors_of(one).keys() == tensors.keys()


def test_it_is_the_same_for_a_folder_under_another_name(tmp_path):
    for name in ("a", "b"):
        tiny_model("gpt2").save_pretrained(tmp_path / name)
        tiny_tokenizer("gpt2").save_pretrained(tmp_path / name)
    first, second = (load_model(tmp_path / name, device="cpu") for name in ("a", "b"))
    assert computation_of(first) == computation_of(second)


class Louder(modeling_llama.LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


def change_rope(model, factor):
    model.model.rotary_emb.attention_scaling = factor


def replace_module(parent, name, function):
    delattr(parent, name)
    setattr(parent, name, function)


CHANGES = {
    "eps": lambda m: setattr(m.model.norm, "variance_epsilon", 1e-3),
    "scaling": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.7),
    "activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.Tanh()),
    "function": lambda m: replace_module(m.model.layers[0].mlp, "act_fn", torch.tanh),
    "class": lambda m: setattr(m.model.layers[0].mlp, "__class__", Louder),
    "a layer less": lambda m: m.model.layers.__delitem__(1),
    "a layer twice": lambda m: m.model.layers.__setitem__(1, m.model.layers[0]),
    "training": lambda m: m.model.layers[0].train(),
    "rope": lambda m: change_rope(m, 1.01),
    "rope in the last digit": lambda m: change_rope(m, 1.0000000000000002),
    "configuration": lambda m: setattr(m.config, "rms_norm_eps", 1e-4),
    "attention": lambda m: setattr(m.config, "_attn_implementation", "eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_module_shows(change):
    before = computation_of(tiny_model("llama"))
    changed = tiny_model("llama")
    CHANGES[change](changed)
    after = computation_of(changed)
    assert after.digest != before.digest
    assert after.unkeyed == before.unkeyed == ()


OWN_CODE = {
    "literal": ("", "return x * {}"),
    "global": ("S = {}", "return x * S"),
    "function": ("def f(x): return x * {}", "return f(x)"),
    "method of another class": ("class F:\n def f(x): return x * {}", "return F.f(x)"),
    "autograd": (
        "class F(torch.autograd.Function):\n @staticmethod\n def forward(c, x): return x * {}",
        "return F.apply(x)",
    ),
    "object": ("class F:\n def __call__(self, x): return x * {}\nf = F()", "return f(x)"),
    "container": ("def f(x): return x * {}\nF = {{'f': [f]}}", "return F['f'][0](x)"),
    "partial": ("f = partial(torch.mul, other={})", "return f(x)"),
    "cached": ("@cache\ndef f(): return {}", "return x * f()"),
    "default": ("def f(x, by=({},)): return x * by[0]", "return f(x)"),
    "closure": ("def g(s):\n return lambda x: x * s[0]\nf = g([{}])", "return f(x)"),
    "module": ("", "return helpers.f(x)"),
    "imported": ("", "import helpers\n  return helpers.f(x)"),
    "class attribute": ("", "return x * float(self.S)\n S = '{}'"),
    "dict of a class": ("", "return x * self.S['seed']\n S = {{'seed': {}}}"),
    "tensor of a class": ("", "return x * self.S\n S = torch.tensor({})"),
    "descriptor": ("class F:\n def __get__(self, *_): return {}", "return x * self.f\n f = F()"),
    "property": ("", "return x * self.f\n f = property(lambda self: {})"),
    "cached property": ("", "return x * self.f\n f = cached_property(lambda self: {})"),
}


@pytest.mark.parametrize("kind", OWN_CODE)
def test_all_that_own_code_refers_to_shows(kind, monkeypatch):
    """A model that computes something else has another digest; run again, it has the same."""

    def changed(factor):
        before, body = (text.format(factor) for text in OWN_CODE[kind])
        helpers = types.ModuleType("helpers")
        exec(f"def f(x): return x * {factor}", vars(helpers))
        monkeypatch.setitem(sys.modules, "helpers", helpers)
        code = types.ModuleType("own_code")
        vars(code).update(torch=torch, nn=nn, helpers=helpers, partial=partial)
        vars(code).update(cache=cache, cached_property=cached_property)
        source = f"{before}\nclass Own(nn.SiLU):\n def forward(self, x):\n  {body}\n"
        exec(source, vars(code))
        model = tiny_model("llama")
        model.model.layers[0].mlp.act_fn = code.Own()
        return computation_of(model), model(IDS).logits, computation_of(model)

    first, logits, used = changed(1.0)
    assert first == used == changed(1.0)[0]
    second, other_logits, _ = changed(2.0)
    assert first.digest != second.digest
    assert first.unkeyed == second.unkeyed == ()
    assert not torch.equal(logits, other_logits)


def test_attributes_of_own_modules_show():
    """Names that modules of packages give to what a pass leaves, or that change nothing there."""
    found = []
    for changes in ({}, {"mix_states": 2.0}, {"dtype": torch.float16}):
        model = tiny_model("llama")
        mlp = model.model.layers[0].mlp
        mlp.__class__ = Louder
        vars(mlp).update({"mix_states": 1.0, "dtype": torch.float32, **changes})
        found.append(computation_of(model).digest)
    assert len(set(found)) == 3


def adapted(**settings):
    model = tiny_model("llama")
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **settings))
    return model.eval()


def test_adapters_show():
    model = load(model=adapted())
    before = computation_of(model)
    assert before.unkeyed == ()
    model(IDS)
    assert computation_of(model) == computation_of(load(model=adapted())) == before
    assert any("lora_A" in name for name in tensors_of(model))
    inner = model.original_model
    inner.disable_adapters()
    off = computation_of(model)
    inner.enable_adapters()
    assert computation_of(model) == before != off
    layer = inner.model.layers[1].self_attn.q_proj
    layer.scaling["default"] *= 1.5
    assert computation_of(model).digest not in (before.digest, off.digest)
    assert computation_of(adapted(lora_alpha=9)) != computation_of(adapted())


def test_code_that_was_replaced_shows(monkeypatch):
    model = load()
    digests = {computation_of(model).digest}
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x) * 2)
    digests.add(computation_of(model).digest)
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -x)  # two functions below forward
    digests.add(computation_of(model).digest)
    monkeypatch.undo()
    assert len(digests) == 3
    assert computation_of(model).digest in digests


def test_hooks_and_replaced_methods_have_no_key():
    model = load()
    before = computation_of(model)
    layer = model.original_model.model.layers[1]

    def mine(*given):
        return None

    handle = layer.mlp.register_forward_pre_hook(mine)
    assert computation_of(model).unkeyed == ("a forward_pre_hook (mine) on model.layers.1.mlp",)
    assert unnamed_hooks(model)
    handle.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(mine)
    assert computation_of(model).unkeyed == ("a hook (mine) on all modules of torch",)
    everywhere.remove()
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: value)]):
        (phrase,) = computation_of(model).unkeyed
        assert phrase.startswith("a hook (<lambda>) on blocks.0")
        assert unnamed_hooks(model)
    assert computation_of(model) == before
    assert not unnamed_hooks(model)
    layer.mlp.original_component.forward = mine
    (phrase,) = computation_of(model).unkeyed
    assert phrase == "the replaced method forward (mine) on model.layers.1.mlp"
    del layer.mlp.original_component.forward
    layer.mlp.original_component.state = torch.Generator()
    (phrase,) = computation_of(model).unkeyed
    assert phrase == "the attribute model.layers.1.mlp.state, a Generator"


def test_hooks_of_the_libraries_are_not_those_of_the_user():
    size = len(tiny_tokenizer("llama"))
    config = OPTConfig(
        vocab_size=size,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    config.architectures = ["OPTForCausalLM"]
    model = load(model=OPTForCausalLM(config).eval())
    model.original_model(IDS, output_hidden_states=True)
    assert computation_of(model).unkeyed == ()
    assert not unnamed_hooks(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_long_prompt_leaves_what_is_computed(kind):
    plain = tiny_model("llama")
    config = plain.config
    config.max_position_embeddings = 64
    scaling = (
        {"factor": 2.0}
        if kind == "dynamic"
        else {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    )
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    config.rope_parameters = rope | scaling
    model = load(model=LlamaForCausalLM(config).eval())

    def state():
        values = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
        return computation_of(model), values

    model(torch.arange(5)[None])  # loading reads a longer prompt
    before, values = state()
    frequencies = model.original_model.model.rotary_emb.inv_freq.clone()
    model(torch.arange(70)[None])
    assert not torch.equal(model.original_model.model.rotary_emb.inv_freq, frequencies)
    after, later = state()
    assert after == before
    assert values.keys() == later.keys()
    assert all(torch.equal(values[name], later[name]) for name in values)
