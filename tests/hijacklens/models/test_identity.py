"""The identity of a model: equal for equal weights and tokenizers, different for others."""

from __future__ import annotations

import torch
from tiny_models import CONTEXT, tiny_model, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.models.identity import ModelIdentity, identify
from hijacklens.models.loading import load_model


def tiny(family: str = "gpt2", **options):
    return load_model(tiny_model(family), tokenizer=tiny_tokenizer(family), **options)


def test_two_loads_of_one_model_are_the_same(bridge, family, folder):
    one, two, saved = identify(bridge), identify(tiny(family, device="cpu")), load_model(folder)
    assert one == two
    assert one.weights_hash == identify(saved).weights_hash
    assert one.tokenizer_hash == identify(saved).tokenizer_hash


def test_what_an_identity_says(bridge, plain, family):
    found = identify(bridge)
    assert found == ModelIdentity(
        name=type(plain).__name__,
        revision=None,
        architecture=type(plain).__name__,
        parameters=sum(parameter.numel() for parameter in plain.parameters()),
        dtype="float32",
        device="cpu",
        weights_hash=found.weights_hash,
        tokenizer_hash=found.tokenizer_hash,
        adds_bos=family != "gpt2",
        context_length=CONTEXT,
        vocabulary=plain.config.vocab_size,
    )
    assert len(found.weights_hash) == len(found.tokenizer_hash) == 64


def test_a_tokenizer_with_a_bos_of_transformer_lens_is_noted(folder, family):
    """`boot_transformers` adds a BOS even where the model's own tokenizer has none."""
    booted = identify(TransformerBridge.boot_transformers(str(folder), device="cpu"))
    assert booted.adds_bos
    assert ("own tokenizer does not" in booted.tokenizer_note) is (family == "gpt2")
    assert identify(load_model(folder)).tokenizer_note == ""


def test_a_scaled_matrix_is_another_model():
    one, two = tiny("llama"), tiny("llama")
    with torch.no_grad():
        two.original_model.model.layers[1].self_attn.v_proj.weight.mul_(0.5)
    assert identify(one).weights_hash != identify(two).weights_hash
    assert identify(one).tokenizer_hash == identify(two).tokenizer_hash


def test_another_seed_dtype_or_tokenizer_shows():
    base = identify(tiny("gemma"))
    other_seed = load_model(tiny_model("gemma", seed=1), tokenizer=tiny_tokenizer("gemma"))
    assert identify(other_seed).weights_hash != base.weights_hash
    half = identify(tiny("gemma", dtype="bfloat16"))
    assert (half.dtype, half.weights_hash != base.weights_hash) == ("bfloat16", True)
    other = load_model(tiny_model("gemma"), tokenizer=tiny_tokenizer("llama"))
    assert identify(other).tokenizer_hash != base.tokenizer_hash
    assert identify(other).weights_hash == base.weights_hash


def test_identifying_leaves_the_model_alone(bridge):
    before = {name: value.clone() for name, value in bridge.state_dict().items()}
    identify(bridge)
    assert all(torch.equal(value, before[name]) for name, value in bridge.state_dict().items())
