"""Weights and configuration that do not belong together: refused, or harmless."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.errors import InputError
from hijacklens.models.loading import ModelWarning, load_model

LAYER = "model.layers.0.self_attn"


def folder_with(
    path: Path, family: str = "llama", *, weights: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A folder with more weights (None takes one out), or another configuration."""
    tiny_model(family).save_pretrained(path)
    tiny_tokenizer(family).save_pretrained(path)
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(record | config))
    if weights:
        found = load_file(path / "model.safetensors") | weights
        found = {name: weight for name, weight in found.items() if weight is not None}
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("llama", {"num_hidden_layers": 1}, "model.layers.1."),
        ("gpt2", {"n_layer": 1}, "h.1."),
        ("gpt2", {"n_layer": -1}, "h.0."),
        ("gpt2", {"n_layer": 0}, "h.0."),
        ("llama", {"weights": {f"{LAYER}.q_proj.bias": torch.zeros(32)}}, "q_proj.bias"),
        ("llama", {"weights": {f"{LAYER}.q_norm.weight": torch.ones(8)}}, "q_norm.weight"),
        ("llama", {"weights": {f"{LAYER}.q_proj.lora_A.weight": torch.zeros(2, 32)}}, "lora_A"),
        ("llama", {"weights": {"lm_head.bias": torch.zeros(420)}}, "lm_head.bias"),
        ("llama", {"weights": {"model.norm.bias": torch.zeros(32)}}, "model.norm.bias"),
        ("llama", {"weights": {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}}, "layers.7"),
        ("llama", {"vocab_size": 500}, "(420, 32) in its file and (500, 32)"),
        ("llama", {"intermediate_size": 48}, "(32, 64) in its file and (32, 48)"),
        ("llama", {"num_key_value_heads": 4}, "(16, 32) in its file and (32, 32)"),
        ("gpt2", {"n_positions": 64}, "(160, 32) in its file and (64, 32)"),
        ("llama", {"num_hidden_layers": 3}, "lacks 9 weights"),
        ("llama", {"weights": {"lm_head.weight": None}}, "lm_head.weight"),
        ("gpt2", {"n_layer": 1_000_000}, "1,000,000"),
        ("llama", {"num_hidden_layers": 10**9}, "1,000,000,000"),
        ("llama", {"vocab_size": 10**12}, "vocab_size = 1,000,000,000,000"),
        ("llama", {"hidden_size": 10**8}, "hidden_size"),
        ("llama", {"intermediate_size": 10**10}, "intermediate_size"),
    ],
)
def test_weights_of_another_configuration_are_refused(family, change, says, tmp_path):
    folder = folder_with(tmp_path, family, **change)
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert says in str(caught.value) and str(folder) in str(caught.value)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}),
        ("gpt2", {"h.0.attn.masked_bias": torch.tensor(-1e4)}),
        ("llama", {f"{LAYER}.rotary_emb.inv_freq": torch.ones(4)}),
        ("llama", {f"{LAYER}.rotary_emb.cos_cached": torch.ones(4)}),
        ("llama", {"v_head.summary.weight": torch.ones(1, 32)}),
        ("llama", {"vision_tower.layers.0.weight": torch.ones(2, 2)}),
    ],
)
def test_buffers_and_heads_that_a_model_does_not_have_are_harmless(family, weights, tmp_path):
    load_model(folder_with(tmp_path, family, weights=weights))


def test_layers_that_predict_further_tokens_are_harmless(tmp_path):
    weights = {"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}
    load_model(folder_with(tmp_path, weights=weights, num_nextn_predict_layers=1))


@pytest.fixture
def grown():
    """A model whose tokenizer got tokens that the embedding has no rows for."""
    tokenizer = copy.deepcopy(tiny_tokenizer("llama"))
    tokenizer.add_tokens(["Cardiff", "Wales"])
    return load_model(tiny_model("llama"), tokenizer=tokenizer)


def test_texts_with_tokens_beyond_the_embedding_are_refused(grown):
    """Tokens that are never used, such as added special ones, do no harm."""

    def fact(case: int, subject: str, true: str) -> hl.Fact:
        return hl.Fact(
            case_id=case, relation_id="P36", subject=subject, template="The capital of {} is",
            target_true=true, target_false="London",
        )  # fmt: skip

    few = {"doses": [1], "execution": hl.Execution(store=False), "quiet": True}
    facts = hl.FactSet((fact(1, "Wales", "Rome"), fact(2, "Italy", "Cardiff")), name="wales")
    with pytest.raises(InputError, match=r"none of the 2 facts.*the model knows 420 tokens"):
        hl.hijack(grown, facts, **few)
    with pytest.raises(InputError, match=r"none of the 2 facts.*the model knows 420 tokens"):
        hl.pairs(grown, facts)
    both = hl.FactSet((*facts, fact(3, "Italy", "Rome")), name="wales")
    result = hl.hijack(grown, both, **few)
    assert set(result.items["case_id"]) == {3}
    assert set(result.skipped["case_id"]) == {1, 2}
    with pytest.raises(InputError, match="the model knows 420 tokens"):
        hl.answer(grown, "Wales is", tokens=1)
    with pytest.raises(InputError, match="the model knows 420 tokens"):
        hl.answer(grown, "Rome is", targets=["Cardiff"], tokens=1)
    assert hl.answer(grown, "Rome is", targets=["Rome"], tokens=1).top


def test_a_base_vocabulary_beyond_the_embedding_is_reported():
    plain = tiny_model("llama")
    plain.resize_token_embeddings(300)
    with pytest.warns(ModelWarning, match="420 tokens and the model knows 300") as caught:
        load_model(plain, tokenizer=tiny_tokenizer("llama"))
    assert [warning.filename for warning in caught] == [__file__]
