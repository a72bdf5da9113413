"""Which architectures are run on packs, which are not, and that the result says so."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from tiny_models import SHAPE, random_model, tiny_tokenizer

from hijacklens.engine import engine, support
from hijacklens.engine.engine import next_token_logprobs, read
from hijacklens.engine.reading import ReadOptions
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe

SENTENCE = tuple(range(11, 21))
WANTED = {
    SENTENCE * dose + query: {1, 2}
    for dose in range(3)
    for query in ((21, 22, 23), (21, 24), (31,))
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "sliding_window": 8}
SUPPORTED = {
    "GPTNeoX": SHAPE,
    "Mistral": {**WINDOW, "head_dim": 8},
    "Phi3": WINDOW,
    "Qwen2": GROUPED,
    "Qwen3": {**WINDOW, "head_dim": 8, "use_sliding_window": True, "max_window_layers": 1},
}
REFUSED = {
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "takes no position ids"),
    "GPTNeo": (
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 8,
            "attention_types": [[["global", "local"], 1]],
        },
        "positions in the row",
    ),
    "Falcon": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "ALiBi",
    ),
}


def tiny(name, options):
    """A random plain model of an architecture, and the hooked one made of its copy."""
    plain = random_model(f"{name}:{name}ForCausalLM", **options)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("gpt2"), device="cpu")


def check(plain, readings):
    for prefix, tokens in WANTED.items():
        with torch.no_grad():
            expected = plain(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
        for token in tokens:
            value = readings[prefix].logprobs[token]
            assert value == pytest.approx(float(expected[token]), abs=1e-4)


@pytest.mark.parametrize("name", SUPPORTED)
def test_known_architectures(name):
    plain, model = tiny(name, SUPPORTED[name])
    idle = HookProbe("idle", (), packs=True)
    for sharing, probes in product(("packed", "cached"), ([], [idle])):
        readings = read(model, WANTED, ReadOptions(probes=probes, sharing=sharing))
        assert readings.accounting.sharing == sharing
        check(plain, readings)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_architectures_are_run_the_plain_way(name):
    options, why = REFUSED[name]
    plain, model = tiny(name, options)
    readings = read(model, WANTED, ReadOptions(sharing="cached"))
    assert readings.accounting.sharing == "plain"
    assert why in readings.accounting.why
    for prefix, tokens in WANTED.items():
        expected = next_token_logprobs(model, prefix)
        for token in tokens:
            value = readings[prefix].logprobs[token]
            assert value == pytest.approx(float(expected[token]), abs=1e-4)
    check(plain, readings)
    assert read(model, WANTED, ReadOptions(sharing="plain")).accounting.why == "it was requested"


def test_unknown_architectures_are_tried(monkeypatch):
    """Windows that the configuration does not tell of are found out, and crashes too."""
    plain, model = tiny("Mistral", SUPPORTED["Mistral"])
    for sharing in ("packed", "cached"):
        readings = read(model, WANTED, ReadOptions(sharing=sharing))
        assert readings.accounting.sharing == sharing
        check(plain, readings)
    wrong = support.Support({"": None})
    monkeypatch.setattr(engine, "support_of", lambda model: wrong)
    for sharing in ("packed", "cached"):
        readings = read(model, WANTED, ReadOptions(sharing=sharing))
        assert readings.accounting.sharing == "plain"
        assert "packed and plain prompts gave different numbers" in readings.accounting.why
        check(plain, readings)
    unusable = support.Support({"full_attention": None})
    monkeypatch.setattr(engine, "support_of", lambda model: unusable)
    readings = read(model, WANTED, ReadOptions(sharing="packed"))
    assert readings.accounting.why.startswith("it fails on packed prompts")
    check(plain, readings)


def test_layers_without_a_mask_are_refused():
    _, model = tiny("Qwen2", SUPPORTED["Qwen2"])
    model.original_model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in support.support_of(model).refused


def test_a_hooked_transformer_is_run_the_plain_way():
    """It is a hooked model under TransformerLens 3.9, and takes no position ids."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    config = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=64, d_head=8, d_vocab=50, act_fn="gelu", seed=0
    )
    model = HookedTransformer(config).eval()
    readings = read(model, WANTED, ReadOptions(sharing="packed"))
    assert readings.accounting.sharing == "plain"
    assert readings.accounting.why == "a HookedTransformer takes no position ids"
    for prefix, tokens in WANTED.items():
        with torch.no_grad():
            expected = model(torch.tensor([prefix]))[0, -1].log_softmax(-1)
        for token in tokens:
            value = readings[prefix].logprobs[token]
            assert value == pytest.approx(float(expected[token]), abs=1e-4)
