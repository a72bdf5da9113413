"""Probes of latent attention (DeepSeek), whose values have another width than queries and keys.

They are compared with plain models whose weights were edited: rows of `kv_b_proj` that make the
values of a head, and columns of `o_proj` that read its output.
"""

from __future__ import annotations

import copy

import pytest
import torch
from edited_values import draw, ids_of, run, same
from tiny_models import rough, tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.prompts.layout import Layout
from probes import values
from probes.ablation import ablate, mean_outputs
from probes.anatomy.matrices import ov_circuit, value_matrix

IDS = ids_of("llama")
HEADS, WIDTH, KEYS, LATENT = 4, 6, 8, 12
HEAD = (1, 2)


@pytest.fixture(scope="module")
def plain():
    tokenizer = tiny_tokenizer("llama")
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=16,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=KEYS,
        qk_rope_head_dim=8,
        v_head_dim=WIDTH,
        max_position_embeddings=160,
    )
    return rough(DeepseekV3ForCausalLM(config))


@pytest.fixture(scope="module")
def model(plain):
    return load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("llama"), device="cpu")


def value_rows(plain, layer: int, head: int) -> torch.Tensor:
    weight = plain.model.layers[layer].self_attn.kv_b_proj.weight.data
    return weight.view(HEADS, KEYS + WIDTH, LATENT)[head, KEYS:]


def output_columns(plain, layer: int, head: int) -> torch.Tensor:
    return plain.model.layers[layer].self_attn.o_proj.weight.data.view(32, HEADS, WIDTH)[:, head]


def edited(plain, edit) -> torch.Tensor:
    """Logits of a plain copy after `edit(copy)`."""
    other = copy.deepcopy(plain)
    edit(other)
    with torch.no_grad():
        return other(IDS).logits


def test_a_value_matrix_maps_the_latent_to_the_values(plain, model):
    matrix = draw(LATENT, WIDTH)
    same(value_matrix(model, *HEAD), value_rows(plain, *HEAD).T)
    got = run(model, IDS, values.replace({HEAD: matrix}))
    same(got, edited(plain, lambda other: value_rows(other, *HEAD).copy_(matrix.T)))


@pytest.mark.parametrize("factor", [0.0, -1.5])
def test_scaled_values(plain, model, factor):
    probe = values.replace(values.scaled(factor), layers=1)
    want = edited(plain, lambda m: [value_rows(m, 1, h).mul_(factor) for h in range(HEADS)])
    same(run(model, IDS, probe), want)


def test_a_circuit_and_an_ablated_head(plain, model):
    left, right = draw(LATENT, WIDTH, seed=1), draw(WIDTH, 32, seed=2)

    def edit(other):
        value_rows(other, *HEAD).copy_(left.T)
        output_columns(other, *HEAD).copy_(right.T)

    same(run(model, IDS, values.replace_circuit({HEAD: left @ right})), edited(plain, edit))
    same(
        run(model, IDS, ablate(heads=[HEAD])),
        edited(plain, lambda other: output_columns(other, *HEAD).zero_()),
    )
    circuit = value_rows(plain, *HEAD).T @ output_columns(plain, *HEAD).T
    same(ov_circuit(model, *HEAD).AB, circuit)


def test_hooks_have_the_usual_shapes(model):
    shapes = {}
    with torch.no_grad():
        model.run_with_hooks(
            IDS,
            fwd_hooks=[
                (f"blocks.0.attn.hook_{name}", lambda x, hook: shapes.update({hook.name: x.shape}))
                for name in ("q", "k", "v", "z")
            ],
        )
    pos = IDS.shape[1]
    widths = {"q": KEYS + 8, "k": KEYS + 8, "v": WIDTH, "z": WIDTH}
    wanted = {(1, pos, HEADS, width) for width in widths.values()}
    assert {tuple(shape) for shape in shapes.values()} == wanted


def test_associations_see_the_latent_of_a_cue(plain, model):
    cue, answer = 7, 9
    attention = plain.model.layers[0].self_attn
    x = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(torch.tensor([[cue]])))
    latent = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(x)[..., :LATENT])[0]
    direction = plain.lm_head.weight[[answer]] * plain.model.norm.weight
    probe = values.replace_circuit(values.associations([(cue, answer)]), heads=[(0, 1)])
    given = values.replace_circuit({(0, 1): (latent.T @ direction).detach()})
    same(run(model, IDS, probe), run(model, IDS, given))


def test_a_bridge_whose_heads_are_mixed_is_refused(plain):
    tokenizer = copy.deepcopy(tiny_tokenizer("llama"))
    tokenizer.init_kwargs["add_bos_token"] = True
    config = plain.config
    config.architectures = ["DeepseekV3ForCausalLM"]
    bridge = TransformerBridge.boot_transformers(
        tokenizer.name_or_path, hf_model=copy.deepcopy(plain), tokenizer=tokenizer, device="cpu"
    )
    with pytest.raises(InputError, match=r"load the model with hijacklens\.load_model"):
        run(bridge, IDS, ablate(heads=[HEAD]))


def test_means_of_head_outputs(model):
    means = mean_outputs(model, Layout(IDS, {}))
    assert means.values.shape == (2, HEADS, WIDTH)
    run(model, IDS, ablate(kind="mean", means=means))
