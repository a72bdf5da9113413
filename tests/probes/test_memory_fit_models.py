"""The memory fit of language models: OV circuits of five families against plain weights."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sample_facts import sample_facts
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.errors import InputError
from probes import memory_fit
from probes.memory_fit import DirectPath, associations

PAIRS = associations.pairs([(300, 5), (301, 7), (302, 9), (303, 5), (304, 11)])


@cache
def loaded(family: str) -> tuple[Any, Any]:
    """A plain model and the hooked one of a copy."""
    plain = tiny_model(family)
    return plain, hl.load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer(family))


def plain_scores(plain: Any, family: str, layer: int, head: int) -> torch.Tensor:
    """Logits [source, target] of the direct path, from the plain model's own modules.

    The head attends to the source alone, whose embedding is its only input; the scales of the
    norms after it are left out, and so are biases. Less the mean over the vocabulary.
    """
    sources, targets = sorted(set(PAIRS.source)), sorted(set(PAIRS.target))
    with torch.no_grad():
        if family == "gpt2":
            block, final = plain.transformer.h[layer], plain.transformer.ln_f
            x = block.ln_1(plain.transformer.wte.weight[sources]) - block.ln_1.bias
            W_V = block.attn.c_attn.weight[:, 64 + 8 * head : 64 + 8 * head + 8]
            written = x @ W_V @ block.attn.c_proj.weight[8 * head : 8 * head + 8]
            read = (written - written.mean(-1, keepdim=True)) * final.weight
        else:
            block, final = plain.model.layers[layer], plain.model.norm
            one = 0 if family == "llama" else 1
            scale = 1 if family == "llama" else 32**0.5
            x = block.input_layernorm(plain.model.embed_tokens.weight[sources] * scale)
            width = block.self_attn.head_dim
            here = slice(head // 2 * width, (head // 2 + 1) * width)  # two heads share values
            W_V = block.self_attn.v_proj.weight[here]
            W_O = block.self_attn.o_proj.weight[:, head * width : (head + 1) * width]
            written = x @ W_V.T @ W_O.T
            if family in ("gemma2", "gemma3"):
                written = written * (1 + block.post_attention_layernorm.weight)
            read = written * (one + final.weight)
        logits = read @ plain.get_output_embeddings().weight.T
    return (logits - logits.mean(-1, keepdim=True))[:, targets].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_direct_path_of_the_plain_model(family):
    plain, model = loaded(family)
    path = DirectPath.of(model)
    x, y = path.read(sorted(set(PAIRS.source))), path.write(sorted(set(PAIRS.target)))
    for layer, head in [(0, 0), (0, 3), (1, 1), (1, 2)]:
        A, B = path.circuit(layer, head)
        expected = plain_scores(plain, family, layer, head)
        assert torch.allclose(x @ A @ B @ y.T, expected, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_written_into_a_head_is_found_there(family):
    plain, _ = loaded(family)
    edited = copy.deepcopy(plain)
    model = hl.load_model(edited, tokenizer=tiny_tokenizer(family))
    path = DirectPath.of(model)
    read = path.read(PAIRS.source)
    write = path.write(PAIRS.target)
    M = read.T @ write
    left, values, right = torch.linalg.svd(M)
    rank = int((values > 1e-9).sum())
    # The norms' weights are in the path's circuit: divide them out of what is written.
    A, B = left[:, :rank] * values[:rank], right[:rank]
    block = model.blocks[1]
    before, after = path.before[1], path.anatomy.layers[1].after_attention
    A = A / before.weight.double()[:, None]
    B = B if after is None else B / after.weight.double()
    with torch.no_grad():
        plain_block = (
            edited.transformer.h[1].attn if family == "gpt2" else edited.model.layers[1].self_attn
        )
        if family == "gpt2":
            plain_block.c_attn.weight[:, 64 + 8 : 64 + 8 + rank] = A.float()
            plain_block.c_attn.weight[:, 64 + 8 + rank : 64 + 16] = 0
            plain_block.c_proj.weight[8 : 8 + rank] = B.float()
        else:
            width = plain_block.head_dim
            plain_block.v_proj.weight[:width] = 0
            plain_block.v_proj.weight[:rank] = A.T.float()
            plain_block.o_proj.weight[:, width : width + rank] = B.T.float()
    assert block is model.blocks[1]
    fitted = memory_fit.fit(model, PAIRS, draws=99)
    best = fitted.summary().set_index("statistic")
    assert best.loc["cosine", ["layer", "head"]].tolist() == [1, 1]
    assert best.loc["cosine", "value"] == pytest.approx(1, abs=1e-4)
    assert best.loc["span", "value"] == pytest.approx(1, abs=1e-4)
    assert best.loc["recall", "value"] > 0.9
    assert best.loc["cosine", "p_family"] <= 0.02


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "gemma3"])
def test_processed_weights_give_the_same_numbers(family):
    plain, model = loaded(family)
    processed = hl.load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer(family))
    processed.enable_compatibility_mode()
    raw, folded = (memory_fit.fit(m, PAIRS, draws=9).table for m in (model, processed))
    for column in ("value", "mean", "std"):
        assert folded[column].to_numpy() == pytest.approx(raw[column].to_numpy(), abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_user_s_hooked_transformer_gives_the_same_numbers(family):
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained import weight_conversions
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    plain, model = loaded(family)
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_head": 8, "n_ctx": 160}
    kind: dict[str, Any] = {"normalization_type": "LN", "d_mlp": 128, "act_fn": "gelu_new"}
    if family == "llama":
        kind = {
            "normalization_type": "RMS",
            "final_rms": True,
            "d_mlp": 64,
            "act_fn": "silu",
            "gated_mlp": True,
            "n_key_value_heads": 2,
            "positional_embedding_type": "rotary",
            "rotary_dim": 8,
        }
    config = HookedTransformerConfig(**shape, **kind, d_vocab=model.cfg.d_vocab, device="cpu")
    theirs = HookedTransformer(config, tokenizer=None)
    convert = getattr(weight_conversions, f"convert_{family}_weights")
    for fold in (False, True):
        theirs.load_and_process_state_dict(
            convert(copy.deepcopy(plain), theirs.cfg),
            fold_ln=fold,
            center_writing_weights=fold and family == "gpt2",
            center_unembed=fold,
            fold_value_biases=fold,
        )
        theirs.eval()
        ours = memory_fit.fit(model, PAIRS, draws=5).table
        table = memory_fit.fit(theirs, PAIRS, draws=5).table
        assert table["value"].to_numpy() == pytest.approx(ours["value"].to_numpy(), abs=1e-3)


def test_heads_are_chosen_and_named():
    _, model = loaded("llama")
    fitted = memory_fit.fit(model, PAIRS, heads=[(1, 3), (0, 2)], draws=5)
    assert fitted.verdicts()[["layer", "head"]].drop_duplicates().values.tolist() == [
        [0, 2],
        [1, 3],
    ]
    whole = memory_fit.fit(model, PAIRS, draws=5)
    assert len(whole.table) == 2 * 4 * 3 * 2
    keys = ["layer", "head", "statistic", "control"]
    both = fitted.table.merge(whole.table, on=keys, suffixes=("", "_whole"))
    assert len(both) == len(fitted.table)
    for column in ("value", "mean", "std", "z", "p"):
        assert both[column].to_numpy() == pytest.approx(both[f"{column}_whole"].to_numpy())
    # one family: more matrices, larger corrected p-values
    assert (both["p_family_whole"] >= both["p_family"] - 1e-12).all()
    with pytest.raises(InputError, match="head 4"):
        memory_fit.fit(model, PAIRS, heads=4)
    with pytest.raises(InputError, match="this model has 0 to"):
        memory_fit.fit(model, associations.pairs([(0, 1), (1, 10**6)]))


def test_the_model_stays_bit_for_bit_what_it_was():
    _, model = loaded("gemma2")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    memory_fit.fit(model, PAIRS, draws=3)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_facts_on_a_language_model():
    _, model = loaded("gemma3")
    pairs = associations.of_facts(sample_facts(), model.tokenizer)
    fitted = memory_fit.fit(model, pairs, draws=19)
    assert fitted.settings.pairs == len(pairs) and fitted.settings.skipped == ()
    assert np.isfinite(fitted.table["value"]).all()
    assert fitted.plot().axes[0].get_title() == "cosine to the memory"


@pytest.mark.packaged
def test_the_last_heads_of_a_real_model_look_up_near_words():
    model = hl.load_model("smollm2-135m")
    pairs = associations.of_facts(hl.atlas().limit(60), model.tokenizer, cue="near")
    fitted = memory_fit.fit(model, pairs, layers=[0, 29], draws=39)
    best = fitted.best(count=1).iloc[0]
    # Heads 29.1 and 29.2 take a country to its capital or language, head 29.0 away from it.
    assert (best["layer"], best["head"]) in {(29, 1), (29, 2)}
    assert best["value"] > 0.65 and best["p_family"] <= 0.05
    recall = fitted.verdicts().query("statistic == 'recall' and layer == 29").set_index("head")
    assert recall.loc[0, "value"] < 0.4
