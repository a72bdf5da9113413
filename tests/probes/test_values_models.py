"""The same value probes on the one-layer model and, under 3.9, on a HookedTransformer."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.one_layer import memory, spans
from hijacklens.one_layer.architecture import OneLayerConfig
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.training import train
from hijacklens.probe import probed
from hijacklens.prompts.layout import Layout
from probes import values
from probes.anatomy.matrices import (
    attention_norm_weight,
    ov_circuit,
    value_bias,
    value_matrix,
)

TASK = ConceptTask(bits=3, length=12)
HALF = ConceptTask(bits=3, length=12, support="first-bit")


def one_layer(seed: int = 0) -> OneLayerTransformer:
    return OneLayerTransformer(
        OneLayerConfig(vocab=8, d_model=6, length=12, seed=seed, init_scale=0.5)
    )


def contexts(seed: int = 0, batch: int = 4) -> torch.Tensor:
    return torch.randint(0, 8, (batch, 12), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, *probes):
    with torch.no_grad(), probed(model, probes, spans.layout(TASK, tokens)):
        return model(tokens)


def same(got, wanted):
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def rank_2(matrix):
    left, values, right = torch.linalg.svd(matrix)
    return left[:, :2] @ values[:2].diag() @ right[:2]


BY_HAND = {
    "zero": (values.zero(), lambda m: torch.zeros(6, 6)),
    "identity": (values.identity(), lambda m: torch.eye(6)),
    "scaled": (values.scaled(3.0), lambda m: 3 * m.W_V[0, 0]),
    "low rank": (values.low_rank(2), lambda m: rank_2(m.W_V[0, 0])),
    "memory": (values.memory(TASK), lambda m: memory.constructed(m.W_E, TASK)),
    "memory of a half": (values.memory(HALF), lambda m: memory.constructed(m.W_E, HALF)),
    "matched memory": (
        values.matched(values.memory(TASK)),
        lambda m: memory.matched(memory.constructed(m.W_E, TASK), m.W_V[0, 0]),
    ),
    "another model": (
        values.taken_from(model=one_layer(5)),
        lambda m: one_layer(5).W_V[0, 0],
    ),
}


@pytest.mark.parametrize("way", [values.replace, values.replace_circuit])
@pytest.mark.parametrize("name", BY_HAND)
def test_the_one_layer_model_is_the_one_with_that_value(name, way):
    source, expected = BY_HAND[name]
    model, tokens = one_layer(), contexts()
    wanted = model.with_value(expected(model).detach())
    same(run(model, tokens, way(source)), wanted(tokens))
    same(run(model, tokens, way(source))[:, -1], wanted.last_logits(tokens))


@given(seed=st.integers(0, 2**32), way=st.sampled_from([values.replace, values.replace_circuit]))
@settings(max_examples=12, deadline=None)
def test_any_matrix_on_any_contexts(seed, way):
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 6, generator=draw)
    model, tokens = one_layer(seed % 100), contexts(seed)
    same(run(model, tokens, way(matrix)), model.with_value(matrix)(tokens))


def test_the_pairs_of_equation_5_1_give_equation_5_1():
    model = one_layer()
    near = HALF.neighbours() & (HALF.hamming() == 1)
    pairs = [(int(cue), int(answer)) for answer, cue in near.nonzero()]
    for way in (values.replace, values.replace_circuit):
        made = run(model, contexts(), way(values.associations(pairs)))
        same(made, run(model, contexts(), way(values.memory(HALF))))


def test_trained_models_answer_with_the_memory_by_the_same_call():
    trained = train(
        TASK,
        d_model=8,
        seeds=2,
        steps=60,
        batch=64,
        learning_rates=(0.01,),
        evaluation=256,
        quiet=True,
    )
    built = values.matched(values.memory(TASK))
    by_probe = trained.accuracy(probes=[values.replace(built)])

    def by_hand(model):
        return memory.matched(memory.constructed(model.W_E, TASK), model.W_V[0, 0])

    pd.testing.assert_frame_equal(by_probe, trained.accuracy(by_hand), atol=1e-5)
    wanted = trained.summary()["constructed_accuracy"].to_numpy()
    assert by_probe["accuracy"].to_numpy() == pytest.approx(wanted)
    assert (trained.accuracy()["loss"] - by_probe["loss"]).abs().min() > 1e-3


def test_the_memory_needs_the_task_of_the_model():
    with pytest.raises(InputError, match="8 rows, and the task with bits=4"):
        run(one_layer(), contexts(), values.replace(values.memory(ConceptTask(bits=4))))


# A user's own HookedTransformer, under TransformerLens 3.9.
KINDS = {
    "layer norm": {"normalization_type": "LN"},
    "folded layer norm": {"normalization_type": "LNPre"},
    "rms, grouped": {"normalization_type": "RMS", "n_key_value_heads": 2},
    "rms before and after": {
        "normalization_type": "RMS",
        "n_key_value_heads": 2,
        "use_normalization_before_and_after": True,
    },
    "folded rms before and after": {
        "normalization_type": "RMSPre",
        "use_normalization_before_and_after": True,
    },
    "no norm": {"normalization_type": None},
}
IDS = torch.tensor([[1, 7, 3, 7, 2, 9, 4]])


def hooked_transformer(**kind):
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    config = {"n_layers": 2, "d_model": 12, "n_heads": 4, "d_head": 3, "d_mlp": 16, "n_ctx": 16}
    model = HookedTransformer(
        HookedTransformerConfig(**(config | kind), d_vocab=12, act_fn="gelu", seed=0, device="cpu")
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model.eval()


def weight(model, layer, name):
    attention = model.blocks[layer].attn
    return attention._parameters.get(f"_{name}", attention._parameters.get(name)).data


@pytest.mark.parametrize("kind", KINDS)
def test_a_hooked_transformer_with_other_values(kind):
    model = hooked_transformer(**KINDS[kind])
    draw = torch.Generator().manual_seed(1)
    edited = copy.deepcopy(model)
    new = {place: torch.randn(12, 3, generator=draw) for place in [(0, 1), (1, 0), (1, 1)]}
    for (layer, kv_head), matrix in new.items():
        weight(edited, layer, "W_V")[kv_head] = matrix
        weight(edited, layer, "b_V")[kv_head] = 0
    with torch.no_grad(), unchecked():
        wanted = edited(IDS)
        with probed(model, [values.replace(new, keep_bias=False)], Layout(IDS, {})):
            torch.testing.assert_close(model(IDS), wanted, atol=1e-4, rtol=0)
        assert (model(IDS) - wanted).abs().max() > 0.05


@pytest.mark.parametrize("keep_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hooked_transformer_with_other_circuits(kind, keep_bias):
    model = hooked_transformer(**KINDS[kind])
    edited = copy.deepcopy(model)
    places_ = [(0, 1), (1, 0), (1, 3)]
    new = {}
    for seed, (layer, head) in enumerate(places_):
        draw = torch.Generator().manual_seed(seed)
        output = torch.randn(3, 12, generator=draw)
        kv_head = head // (4 // len(weight(model, layer, "W_V")))
        bias, old = weight(model, layer, "b_V")[kv_head], weight(model, layer, "W_O")[head]
        new[layer, head] = weight(model, layer, "W_V")[kv_head] @ output
        kept = bias @ old if keep_bias else 0
        weight(edited, layer, "W_O")[head] = output
        weight(edited, layer, "b_O").add_(kept - bias @ output)
    with torch.no_grad(), unchecked():
        wanted = edited(IDS)
        probe = values.replace_circuit(new, keep_bias=keep_bias)
        with probed(model, [probe], Layout(IDS, {})):
            torch.testing.assert_close(model(IDS), wanted, atol=1e-4, rtol=0)
        assert (model(IDS) - wanted).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_a_hooked_transformer(kind):
    model = hooked_transformer(**KINDS[kind])
    with torch.no_grad(), unchecked():
        _, cache = model.run_with_cache(IDS)
        assert torch.equal(value_matrix(model, 1, 1), weight(model, 1, "W_V")[1])
        assert torch.equal(value_bias(model, 1, 1), weight(model, 1, "b_V")[1])
        assert torch.equal(ov_circuit(model, 1, 3).AB, model.blocks[1].attn.OV[3].AB)
        if KINDS[kind]["normalization_type"] in ("RMS", "LNPre"):
            x = cache["blocks.1.ln1.hook_normalized"] * attention_norm_weight(model, 1)
            made = x @ value_matrix(model, 1, 1) + value_bias(model, 1, 1)
            torch.testing.assert_close(made, cache["v", 1][:, :, 1], atol=1e-5, rtol=1e-5)
