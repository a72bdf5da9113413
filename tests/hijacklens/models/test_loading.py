"""Loading a model from anywhere: the same numbers, the same tokens, and one clear error."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import rough, tiny_model, tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ConvBertConfig,
    ConvBertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2Tokenizer,
    HeliumConfig,
    HeliumForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OlmoConfig,
    OlmoForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hijacklens.engine.engine import next_token_logprobs
from hijacklens.errors import InputError
from hijacklens.files import CACHE_VARIABLE
from hijacklens.models.hooked import unnamed_hooks
from hijacklens.models.loading import load_model

TEXTS = [
    "The Eiffel Tower is in the city of",
    "Do not think of Guam. The Eiffel Tower is in the city of",
    "Rome",
    "Zürich 北京",
]

SHAPE = {"vocab_size": 420, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def save(family: str, path: Path) -> Path:
    """A folder as save_pretrained writes it."""
    tiny_model(family).save_pretrained(path)
    tiny_tokenizer(family).save_pretrained(path)
    return path


def tiny(family: str = "gpt2", **options):
    return load_model(tiny_model(family), tokenizer=tiny_tokenizer(family), **options)


def test_a_model_prints_as_one_line():
    model = tiny()
    assert str(model) == repr(model)
    assert len(str(model).splitlines()) == 1
    assert "GPT2LMHeadModel as a TransformerBridge, 2 layers" in str(model)


def same_logits(bridge, plain, tokenizer) -> None:
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            expected = plain(ids).logits
            assert expected.std() > 0.3  # a difference would show
            torch.testing.assert_close(bridge(ids), expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- the same numbers and tokens


def test_a_model_in_memory_gives_the_logits_of_the_plain_one(bridge, plain, family):
    same_logits(bridge, plain, tiny_tokenizer(family))
    assert not bridge.training
    assert bridge.cfg.model_name == type(tiny_model(family)).__name__


def test_a_folder_gives_the_logits_of_the_plain_model(folder, plain, family):
    loaded = load_model(folder)
    same_logits(loaded, plain, tiny_tokenizer(family))
    assert not loaded.training
    assert loaded.cfg.model_name == f"tiny-{family}"
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())


def test_tokens_are_those_of_the_tokenizers_default_call(bridge, family):
    for tokenizer in (tiny_tokenizer(family), bridge.tokenizer):
        for text in TEXTS:
            assert bridge.to_tokens(text).tolist() == [tokenizer(text).input_ids]


def test_tokens_of_a_folder_are_those_of_its_tokenizer(folder):
    loaded, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert loaded.to_tokens(text).tolist() == [tokenizer(text).input_ids]
        assert loaded.tokenizer(text).input_ids == tokenizer(text).input_ids


def test_the_users_tokenizer_is_left_as_it_was(family):
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    settings, special = dict(tokenizer.init_kwargs), tokenizer.special_tokens_map
    ids = tokenizer(TEXTS[0]).input_ids
    load_model(tiny_model(family), tokenizer=tokenizer)
    assert tokenizer.init_kwargs == settings
    assert tokenizer.special_tokens_map == special
    assert tokenizer(TEXTS[0]).input_ids == ids


def test_a_tokenizer_that_was_never_saved_serves_too(family, plain):
    saved = tiny_tokenizer(family)
    fresh = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(saved.backend_tokenizer), **saved.special_tokens_map
    )
    loaded = load_model(tiny_model(family), tokenizer=fresh)
    same_logits(loaded, plain, fresh)
    assert loaded.to_tokens(TEXTS[0]).tolist() == [saved(TEXTS[0]).input_ids]


def test_another_tokenizer_may_take_the_place_of_a_folders(tmp_path):
    folder = save("gemma", tmp_path / "model")
    other = copy.deepcopy(tiny_tokenizer("llama"))
    assert load_model(folder, tokenizer=other).to_tokens("Rome").tolist() == [
        other("Rome").input_ids
    ]


@pytest.mark.parametrize("form", ["path", "text", "relative", "home"])
def test_a_folder_may_be_named_in_every_way(form, tmp_path, monkeypatch):
    folder = save("gpt2", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = {"path": folder, "text": str(folder), "relative": "./mine", "home": "~/mine"}[form]
    assert load_model(model).cfg.model_name == "mine"


def test_the_old_keyword_still_works(tmp_path):
    with pytest.warns(FutureWarning, match="source= is now called model="):
        assert load_model(source=save("gpt2", tmp_path / "mine")).cfg.model_name == "mine"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_the_dtype(dtype, expected, tmp_path):
    for loaded in (
        tiny("llama", dtype=dtype),
        load_model(save("llama", tmp_path / "m"), dtype=dtype),
    ):
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
        assert loaded(torch.tensor([[1, 2]])).dtype == expected


def test_a_family_that_rotates_in_float32_runs_in_bfloat16():
    config = OlmoConfig(**SHAPE, intermediate_size=32, pad_token_id=None)
    plain = rough(OlmoForCausalLM(config)).to(torch.bfloat16)
    plain.set_attn_implementation("eager")
    loaded = load_model(
        copy.deepcopy(plain), tokenizer=tiny_tokenizer("gpt2"), dtype="bfloat16", device="cpu"
    )
    ids = torch.tensor([tiny_tokenizer("gpt2")(TEXTS[1]).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), plain(ids).logits, atol=0.02, rtol=0)
    assert not unnamed_hooks(loaded)


def test_a_model_saved_in_half_precision_is_cast_to_the_dtype(tmp_path):
    tiny_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer("gpt2").save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}


def test_loading_leaves_the_log_level_alone():
    root = logging.getLogger()
    for level in (logging.DEBUG, logging.WARNING):
        before = root.level
        root.setLevel(level)
        try:
            tiny()
            assert root.level == level
        finally:
            root.setLevel(before)


def test_loading_is_quiet(tmp_path, capfd):
    load_model(save("llama", tmp_path))
    capfd.readouterr()
    load_model(tmp_path)
    assert capfd.readouterr().out == ""


# ---------------------------------------------------------------- refusals


def refused(*args, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_model(*args, **options)
    assert len(str(caught.value)) < 1_200
    return str(caught.value)


def has(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text


def test_a_hub_id_offline_says_what_to_do():
    has(
        refused("someone/no-such-model"),
        "cannot load the model 'someone/no-such-model'",
        "hub cannot be reached",
        "local folder",
        "HF_HUB_OFFLINE",
        "smollm2-135m, gemma3-270m",
    )


def test_a_short_name_offline_lists_the_packaged_models():
    has(refused("smollm"), "'smollm'", "smollm2-135m")


@pytest.mark.parametrize("name", ["smolm2-135m", "gemma3-270", "SmolLM2-135M"])
def test_a_misspelt_packaged_name_is_reported_without_the_hub(name, hub):
    has(refused(name), repr(name), "did you mean the packaged")
    assert not hub.requests


def test_a_name_that_no_hub_can_have():
    has(refused("not a model!"), "'not a model!'", "owner/name", "smollm2-135m")


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c", "~nosuchuser/model"])
def test_a_missing_folder(name):
    has(refused(name), repr(name), "model folder", "config.json")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    has(refused(str(tmp_path / "model.gguf")), "cannot load the model", "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing else")
    has(refused(str(tmp_path / "model.gguf")), "cannot load the model", "model.gguf")
    (tmp_path / "model.bin").write_text("")
    has(refused(str(tmp_path / "model.bin")), "is a file", "config.json", "or a .gguf file")


def write_gguf(path: Path) -> None:
    """Write a LLaMA of one layer and a tokenizer of bytes as llama.cpp does."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in {
        writer.add_context_length: 64,
        writer.add_embedding_length: 32,
        writer.add_block_count: 1,
        writer.add_feed_forward_length: 48,
        writer.add_head_count: 2,
        writer.add_head_count_kv: 2,
        writer.add_layer_norm_rms_eps: 1e-5,
        writer.add_rope_dimension_count: 16,
        writer.add_rope_freq_base: 10_000.0,
        writer.add_tokenizer_model: "gpt2",
        writer.add_tokenizer_pre: "default",
        writer.add_token_list: [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<end>"],
        writer.add_token_types: [1] * 257 + [3],
        writer.add_token_merges: ["a b"],
        writer.add_vocab_size: 258,
        writer.add_bos_token_id: 257,
        writer.add_eos_token_id: 257,
    }.items():
        add(value)
    shapes = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes |= {"attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"token_embd": (258, 32), "output": (258, 32), "output_norm": (32,)}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        # Small enough that rounding differs by less than 1e-5 between processors.
        writer.add_tensor(f"{name}.weight", draw.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_logits_of_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    origin = {"pretrained_model_name_or_path": tmp_path, "gguf_file": "tiny.gguf"}
    plain = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
    for options, name in ({}, "tiny"), ({"name": "mine"}, "mine"):  # the second from the cache
        bridge = load_model(tmp_path / "tiny.gguf", **options)
        assert bridge.cfg.model_name == name
        assert bridge.original_model.config._commit_hash.startswith("tiny.gguf, sha256 ")
        same_logits(bridge, plain, AutoTokenizer.from_pretrained(**origin))
    with pytest.raises(InputError, match=r"the file .* has no revisions"):
        load_model(tmp_path / "tiny.gguf", revision="main")
    with pytest.raises(InputError, match=r"the folder .* has no revisions"):
        load_model(tmp_path, revision="main")


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{}"}], ids=["empty", "no config"])
def test_a_folder_without_a_model(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    has(refused(tmp_path), str(tmp_path), "no config.json", "save_pretrained")


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def test_a_folder_without_weights(tmp_path):
    folder = without(save("llama", tmp_path), "model.safetensors")
    has(refused(folder), str(folder), "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_folder_without_a_tokenizer(family, tmp_path):
    """Of some families transformers then makes a tokenizer that has only special tokens."""
    tiny_model(family).save_pretrained(tmp_path)
    has(refused(tmp_path), str(tmp_path), "it has no tokenizer. Save one there")


def test_a_tokenizer_must_be_one_with_a_vocabulary():
    has(refused(tiny_model("gpt2"), tokenizer="gpt2"), "'gpt2', a str", "from_pretrained")
    has(refused(tiny_model("gpt2"), tokenizer=GPT2Tokenizer()), "it has no tokenizer")


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "odd"}'], ids=repr)
def test_a_folder_with_a_bad_config(config, tmp_path):
    folder = save("llama", tmp_path)
    (folder / "config.json").write_text(config)
    has(refused(folder), str(folder))


def test_weights_cut_short(tmp_path):
    folder = save("llama", tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    has(refused(folder), str(folder), "one of its files is damaged")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_weights_that_lack_a_parameter_are_refused(name, tmp_path):
    # transformers would draw it at random, and every load would score differently.
    folder = save("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    has(refused(folder), str(folder), name)


def in_memory(plain, where: str, tmp_path: Path) -> dict:
    """Arguments that load a plain model from memory or from a folder."""
    if where == "memory":
        return {"model": plain, "tokenizer": tiny_tokenizer("gpt2")}
    plain.save_pretrained(tmp_path)
    tiny_tokenizer("gpt2").save_pretrained(tmp_path)
    return {"model": tmp_path}


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        pytest.param(
            lambda: HeliumForCausalLM(
                HeliumConfig(**SHAPE, num_key_value_heads=2, head_dim=16, intermediate_size=32)
            ),
            ["TransformerLens has no bridge for its architecture", "HeliumForCausalLM"],
            id="unknown to TransformerLens",
        ),
        pytest.param(
            lambda: PhiForCausalLM(PhiConfig(**SHAPE, intermediate_size=32, qk_layernorm=True)),
            ["TransformerLens has no hooks for this configuration of a PhiForCausalLM"],
            id="an option unknown to TransformerLens",
        ),
        pytest.param(
            lambda: ConvBertModel(ConvBertConfig(**SHAPE, intermediate_size=32)),
            ["a ConvBertModel is no causal language model", "no layer that gives logits"],
            id="without logits, of a class without decoders",
        ),
        pytest.param(
            lambda: GPT2Model(tiny_model("gpt2").config),
            ["a GPT2Model is no causal language model", "AutoModelForCausalLM"],
            id="without logits",
        ),
        pytest.param(
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=420, d_model=32, d_ff=32, num_layers=1, num_heads=2)
            ),
            ["a T5ForConditionalGeneration is no causal language model", "encoder"],
            id="encoder and decoder",
        ),
    ],
)
def test_a_model_without_hooks_for_its_architecture(plain, reason):
    text = refused(plain(), tokenizer=tiny_tokenizer("gpt2"))
    has(text, "cannot load the model", *reason)


def test_a_folder_of_an_architecture_without_causal_models(tmp_path):
    plain = ConvBertModel(ConvBertConfig(**SHAPE, intermediate_size=32))
    text = refused_long(**in_memory(plain, "folder", tmp_path))
    has(text, "cannot load the model", "TransformerLens has no bridge for its architecture")


def refused_long(*args, **options) -> str:
    """As `refused`, where the error lists the architectures there are."""
    with pytest.raises(InputError) as caught:
        load_model(*args, **options)
    return str(caught.value)


def test_a_model_whose_configuration_names_no_architecture():
    class Mine(GPT2LMHeadModel):
        """A class of the user's."""

    plain = tiny_model("gpt2")
    mine = Mine(copy.deepcopy(plain.config)).eval()
    mine.load_state_dict(plain.state_dict())
    mine.config.architectures = None
    same_logits(load_model(mine, tokenizer=tiny_tokenizer("gpt2")), plain, tiny_tokenizer("gpt2"))
    assert mine.config.architectures is None


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_the_language_part_of_a_multimodal_model_works_and_nothing_is_installed(
    kind, where, tmp_path, monkeypatch
):
    # TransformerLens runs pip for the image processor that this folder lacks.
    monkeypatch.setattr(subprocess, "check_call", installed := Mock())
    text = tiny_model("llama" if kind == "llava" else "gemma3").config
    side = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**side, intermediate_size=16, image_size=16, patch_size=8)
    if kind == "llava":
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
        plain = LlavaForConditionalGeneration(config).eval()
    else:
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        plain = Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.17)
    loaded = load_model(**in_memory(copy.deepcopy(plain), where, tmp_path))
    same_logits(loaded, plain, tiny_tokenizer("gpt2"))
    assert not installed.called


@pytest.mark.parametrize("base", [True, False], ids=["with base weights", "alone"])
def test_an_adapter_in_a_folder_is_never_ignored(base, tmp_path):
    if base:
        save("llama", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    has(refused(tmp_path), str(tmp_path), "adapter", "merge_and_unload()")


def test_a_module_that_is_no_plain_model_is_refused_with_a_cure():
    class PeftModel(torch.nn.Module):
        def merge_and_unload(self):
            """As in peft."""

    has(refused(PeftModel()), "PeftModel", "model.merge_and_unload()")
    has(refused(torch.nn.Linear(2, 2)), "a Linear is not a Hugging Face model")
    has(refused(tiny()), "has hooks already")


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    mark = tmp_path / "was-run"
    folder = tmp_path / "model"
    save("llama", folder)
    (folder / "odd.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    odd = {
        "model_type": "odd",
        "architectures": ["OddForCausalLM"],
        "auto_map": {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model"},
    }
    (folder / "config.json").write_text(json.dumps(odd))
    text = refused(folder)
    assert not mark.exists()
    has(text, str(folder), "code", "trust_remote_code=True", "--trust-remote-code")


def test_a_model_in_memory_needs_a_tokenizer():
    has(refused(tiny_model("gpt2")), "needs its tokenizer", "tokenizer=")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        pytest.param(
            {"dtype": "fp16"}, ["unknown dtype 'fp16'", "bfloat16, float16, float32"], id="dtype"
        ),
        pytest.param({"dtype": torch.float64}, ["unknown dtype 'float64'"], id="torch dtype"),
        pytest.param({"device": "gpu"}, ["unknown device 'gpu'", "cuda:N"], id="device"),
        pytest.param({"device": ""}, ["unknown device ''"], id="empty device"),
        pytest.param({"device": "cuda:99"}, ["'cuda:99'", "this machine has"], id="no such GPU"),
        pytest.param({"devices": 0}, ["devices is 0"], id="no devices"),
        pytest.param({"devices": 99}, ["over 99 GPUs", "this machine has"], id="many devices"),
    ],
)
@pytest.mark.parametrize("source", ["memory", "name"])
def test_a_bad_option_is_refused_before_anything_is_read(source, options, parts):
    if source == "memory":
        has(refused(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), **options), *parts)
    else:
        has(refused("someone/lm", **options), *parts)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device")
def test_a_device_that_torch_was_built_without():
    has(refused(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), device="mps"), "mps")


def test_a_device_and_a_number_of_devices_exclude_each_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    has(refused("someone/lm", device="cuda:0", devices=2), "either a device or", "not both")


def test_a_model_in_memory_cannot_be_spread(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    has(refused(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), devices=2), "memory")


def test_a_misspelt_packaged_name_gets_a_suggestion():
    assert "Did you mean the packaged 'smollm2-135m'?" in refused("smollm")
    assert "Did you mean" not in refused("some-other-model")


def test_a_wrapper_is_told_from_the_model_in_it():
    plain = tiny_model("llama")
    has(refused(torch.nn.DataParallel(plain)), "DataParallel wraps", "the model in it, .module.")
    compiled = torch.compile(plain, backend="eager")
    has(refused(compiled), "OptimizedModule wraps", "the model in it, ._orig_mod.")


def test_an_embedding_of_unknown_size_is_refused():
    plain = tiny_model("llama")
    plain.model.embed_tokens = torch.nn.Sequential(plain.model.embed_tokens)  # as an adapter does
    with pytest.raises(InputError, match=r"is a Sequential.*merge it first"):
        load_model(plain, tokenizer=tiny_tokenizer("llama"))


@pytest.mark.slow
def test_a_model_that_compiles_itself_gives_its_own_numbers():
    tokenizer, compiled = tiny_tokenizer("llama"), tiny_model("llama")
    compiled.compile(backend="eager")
    model = load_model(compiled, tokenizer=tokenizer, device="cpu")
    plain = load_model(tiny_model("llama"), tokenizer=tokenizer, device="cpu")
    ids = tuple(tokenizer("Rome is in").input_ids)
    torch.testing.assert_close(next_token_logprobs(model, ids), next_token_logprobs(plain, ids))
