"""Accounts of families with multipliers, gates, norms of the stream, clipped values and mixers.

A head of the last layer is compared with what vanishes from a plain model's logits when its path is
cut: its columns of the output matrix are zero, while all that follows it is held at what it was.
"""

from __future__ import annotations

import copy
from importlib.metadata import version

import pytest
import torch
import transformers as hf
from tiny_models import rough, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.models.agreement import agreement_of
from hijacklens.models.loading import load_model
from probes.account import SINGLE, Question, accounts
from probes.anatomy import anatomy_of

SHAPE = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "pad_token_id": 3,
}
SCALED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {
    "head_dim": 8,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OPT = {"vocab_size": 420, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4}
SHARED = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 420,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
FAMILIES = {
    "multipliers": ("Granite", {**SHAPE, **SCALED}, "norm"),
    "a logit scale, parallel": ("Cohere", {**SHAPE, "logit_scale": 0.25}, "norm"),
    "a norm before W_O": ("BitNet", SHAPE, "norm"),
    "a mixer next to the heads": (
        "FalconH1",
        {**SHAPE, **STATES, "head_dim": 8, "mamba_d_ssm": 32, "attention_out_multiplier": 0.7},
        "final_layernorm",
    ),
    "a gate, a layer without heads": ("Qwen3_5", {**SHAPE, **DELTA}, "norm"),
    "clipped values": ("Olmo", {**SHAPE, "clip_qkv": 0.3}, "norm"),
    "latent attention": (
        "DeepseekV3",
        {
            **SHAPE,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 6,
        },
        "norm",
    ),
    "norms of the stream": (
        "OpenAIGPT",
        {"vocab_size": 420, "n_positions": 160, "n_embd": 32, "n_layer": 2, "n_head": 4},
        None,
    ),
    "a projection after norms of the stream": (
        "OPT",
        {**OPT, "num_hidden_layers": 2, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        None,
    ),
    "values that layers share": ("Gemma4", {**SHAPE, **SHARED}, None),
}
PLUS, MINUS = 300, 310


def plain_of(family: str):
    kind, settings, _ = FAMILIES[family]
    suffix = "LMHeadModel" if kind == "OpenAIGPT" else "ForCausalLM"
    model = getattr(hf, kind + suffix)
    plain = rough(model(model.config_class(**settings)))
    plain.set_attn_implementation("eager")
    return plain


def difference(plain, ids) -> float:
    with torch.no_grad():
        last = plain(torch.tensor([ids])).logits[0, -1].double()
    return float(last[PLUS] - last[MINUS])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_balances(family):
    plain = plain_of(family)
    tokenizer = tiny_tokenizer("llama")
    model = load_model(copy.deepcopy(plain), tokenizer=tokenizer, device="cpu")
    if version("transformer-lens").startswith("3.") and agreement_of(model).hooked:
        pytest.skip("TransformerLens 3.9 does not compute what this model does, so it is refused")
    ids = tuple(tokenizer("Do not think of Guam. Rome is the capital of").input_ids)
    end = len(ids) - 1
    account, *others = accounts(
        model,
        [
            Question(ids, end, PLUS, MINUS),
            Question(ids, 4, PLUS, None),
            Question(ids[:9], 8, MINUS, PLUS),
        ],
    )
    whole = difference(plain, ids)
    assert account.whole == pytest.approx(whole, abs=1e-5)
    for each in (account, *others):
        assert abs(each.residual) < 1e-5
    assert (account.single[SINGLE.index("other")] != 0) == (
        family
        in (
            "a mixer next to the heads",
            "a gate, a layer without heads",
            "values that layers share",
        )
    )
    norm = FAMILIES[family][2]
    if norm is not None:
        for head in range(4):
            assert account.by_head[-1, head] == pytest.approx(
                whole - cut(plain, norm, ids, head), abs=1e-5
            )


def cut(plain, norm: str, ids, head: int) -> float:
    """The logit difference without the path from a head of the last layer to the last norm.

    `norm` is the name of the last norm.
    """
    layer, final = plain.model.layers[-1], getattr(plain.model, norm)
    output = layer.self_attn.o_proj
    mlp = next(m for n, m in layer.named_children() if n in ("mlp", "feed_forward"))
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda module, inputs, result, name=name: seen.update({name: (inputs[0], result)})
        )
        for name, module in (("mlp", mlp), ("final", final))
    ]
    whole = difference(plain, ids)
    for handle in handles:
        handle.remove()
    before, after = seen["final"]
    centred = type(final).__name__.endswith("LayerNorm")
    unscaled = before - before.mean(-1, keepdim=True) if centred else before
    scale = after / unscaled  # weight over scale, coordinate by coordinate

    def held(module, inputs, result):
        x = inputs[0] - inputs[0].mean(-1, keepdim=True) if centred else inputs[0]
        return x * scale

    def without(module, inputs):
        z = inputs[0].unflatten(-1, (4, -1)).clone()
        z[..., head, :] = 0
        return (z.flatten(-2), *inputs[1:])

    handles = [
        mlp.register_forward_hook(lambda module, inputs, result: seen["mlp"][1]),
        final.register_forward_hook(held),
    ]
    try:
        assert difference(plain, ids) == pytest.approx(whole, abs=1e-5)
        handles.append(output.register_forward_pre_hook(without))
        return difference(plain, ids)
    finally:
        for handle in handles:
            handle.remove()


WRITERS = ("o_proj", "down_proj")


def quiet(kind: str, settings: dict, *, by: float, dtype: str, writers=WRITERS):
    """A hooked model whose writers write `by` times what those of a rough model do."""
    model = getattr(hf, kind + "ForCausalLM")
    plain = rough(model(model.config_class(**settings)))
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.split(".")[-2] in writers:
                weight *= by
        for i, layer in enumerate(plain.model.layers):
            if hasattr(layer, "layer_scalar"):  # Gemma 4
                layer.layer_scalar.fill_(0.3 + 0.4 * i)
    return load_model(plain, tokenizer=tiny_tokenizer("llama"), dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("by", [1, 0.02])
def test_factors_are_measured_where_a_layer_adds_little_to_the_stream(by, dtype):
    large = {**SHAPE, **SCALED, "hidden_size": 64, "residual_multiplier": 0.22}
    form = anatomy_of(quiet("Granite", large, by=by, dtype=dtype), range(20, 28)).layers[1]
    assert form.stream == 1
    assert (form.attention, *form.mlps.values()) == pytest.approx((0.22, 1), rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scaled_stream_is_measured(dtype):
    forms = anatomy_of(
        quiet("Gemma4", FAMILIES["values that layers share"][1], by=1, dtype=dtype), range(20, 28)
    ).layers
    for form, scale in zip(forms, (0.3, 0.7, 1.1, 1.5), strict=True):
        assert form.stream == pytest.approx(scale, rel=0.01)
        assert (form.attention, *form.mlps.values()) == pytest.approx((1, 1), rel=0.03)


def test_heads_that_write_nothing_have_a_factor_whatever_memory_held_before():
    model = quiet("Granite", {**SHAPE, **SCALED}, by=0, dtype="float32", writers=WRITERS[:1])
    torch.use_deterministic_algorithms(True)  # fills new memory with the largest integers
    try:
        forms = anatomy_of(model, range(20, 28)).layers
    finally:
        torch.use_deterministic_algorithms(False)
    for form in forms:
        assert (form.stream, form.attention, *form.mlps.values()) == (1, 1, 1)


def test_a_layer_that_drowns_in_rounding_is_refused():
    model = quiet("Granite", {**SHAPE, **SCALED}, by=1e-5, dtype="bfloat16")
    with pytest.raises(InputError, match="adds too little to the stream"):
        anatomy_of(model, range(20, 28))


def test_a_clip_is_found_though_the_first_tokens_do_not_reach_it():
    settings = {**SHAPE, "clip_qkv": 50.0}
    plain = rough(hf.OlmoForCausalLM(hf.OlmoConfig(**settings)))
    model = load_model(plain, tokenizer=tiny_tokenizer("llama"), device="cpu")
    assert [form.clip for form in anatomy_of(model, (5, 6, 7)).layers] == [50.0, 50.0]


def test_a_head_that_is_not_linear_is_refused():
    settings = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = hf.ModernBertDecoderConfig(**settings, **ends, local_attention=8)
    plain = rough(hf.ModernBertDecoderForCausalLM(config))
    model = load_model(plain, tokenizer=tiny_tokenizer("llama"), device="cpu")
    with pytest.raises(InputError, match="cannot be accounted for: its last norm is not followed"):
        accounts(model, [Question((5, 6, 7), 2, PLUS, MINUS)])
