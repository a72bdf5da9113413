"""The key of stored readings changes with everything that changes a reading."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from hijacklens.models import identity
from hijacklens.models.computation import tensors_of
from hijacklens.models.identity import hash_of_tensors, identify
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe
from hijacklens.store.fingerprint import fingerprint_of


def load(family="gpt2", **options):
    options = {"device": "cpu", "tokenizer": tiny_tokenizer(family), **options}
    return load_model(tiny_model(family), **options)


def fingerprint(model, **options):
    return fingerprint_of(model, identify(model), **options)


def checksum(model):
    return hash_of_tensors(tensors_of(model))


@pytest.fixture(scope="module")
def gpt2():
    return load()


def test_the_key_has_all_that_readings_depend_on_and_no_more(gpt2):
    base = fingerprint(gpt2)
    other = {
        "architecture": "Other",
        "parameters": 1,
        "arithmetic": "float16",
        "weights": "",
        "computation": "",
        "tokenizer": "",
        "probes": ("p",),
        "spans": ("hijack",),
    }
    for name, value in other.items():
        assert replace(base, **{name: value}).key != base.key, name
    about = {"model": "renamed", "revision": "main", "versions": "torch 9", "unkeyed": ("a hook",)}
    assert replace(base, **about).key == base.key
    assert {field.name for field in fields(base)} == {*other, *about}
    # Values do not run into each other.
    assert replace(base, probes=("a", "b")).key != replace(base, probes=("a, b",)).key
    assert replace(base, probes=("a",), spans=()).key != replace(base, probes=(), spans=("a",)).key


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_loaded_again_and_used_is_the_same_fingerprint(family):
    one, two = load(family), load(family)
    before = fingerprint(one)
    one(torch.tensor([[1, 2, 3]]))
    assert fingerprint(one) == before == fingerprint(two)
    assert before.unkeyed == ()


def test_a_folder_under_another_name_is_the_same_fingerprint(tmp_path):
    for name in ("a", "b"):
        tiny_model("gpt2").save_pretrained(tmp_path / name)
        tiny_tokenizer("gpt2").save_pretrained(tmp_path / name)
    one, two = (fingerprint(load_model(tmp_path / name, device="cpu")) for name in ("a", "b"))
    assert (one.model, two.model) == ("a", "b")
    assert one.key == two.key


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_change_of_any_weight_shows(gpt2, data):
    before = checksum(gpt2)
    parameters = dict(gpt2.named_parameters())
    parameter = parameters[data.draw(st.sampled_from(sorted(parameters)))]
    place = tuple(data.draw(st.integers(0, size - 1)) for size in parameter.shape)
    value = parameter.data[place].clone()
    for changed in (torch.nextafter(value, value + 1), -value):
        parameter.data[place] = changed
        assert checksum(gpt2) != before
    parameter.data[place] = value
    assert checksum(gpt2) == before


def test_signs_of_many_weights_show(gpt2):
    before = checksum(gpt2)
    weight = gpt2.original_model.transformer.h[1].mlp.c_proj.weight
    weight.data[:, 1::2] *= -1
    assert checksum(gpt2) != before
    weight.data[:, 1::2] *= -1
    assert checksum(gpt2) == before


def test_two_weights_that_trade_places_show(gpt2):
    before = checksum(gpt2)
    edited = copy.deepcopy(gpt2)
    (weight,) = (
        parameter
        for name, parameter in edited.named_parameters()
        if parameter.shape == (len(edited.tokenizer), 32)
    )
    with torch.no_grad():
        weight[[3, 4]] = weight[[4, 3]]
    assert checksum(edited) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.complex64])
@pytest.mark.parametrize("length", [0, 1, 3, 7])
def test_tensors_of_any_length_dtype_and_layout(dtype, length):
    values = torch.arange(length).to(dtype)
    before = hash_of_tensors({"w": values})
    for place in range(length):
        changed = values.clone()
        changed[place] += 1
        assert hash_of_tensors({"w": changed}) != before
    shifted = torch.cat([torch.ones(1, dtype=dtype), values])[1:]
    spread = torch.stack([values, values], 1)[:, 1]
    assert hash_of_tensors({"w": shifted}) == hash_of_tensors({"w": spread}) == before
    assert hash_of_tensors({"w": values.reshape(1, length)}) != before
    assert hash_of_tensors({"v": values}) != before
    tied = hash_of_tensors({"v": values, "w": values})
    assert tied == hash_of_tensors({"w": values.clone(), "v": values}) != before


def test_tensors_of_several_blocks(monkeypatch):
    values = torch.arange(100.0)
    monkeypatch.setattr(identity, "BLOCK", 64)
    before = hash_of_tensors({"w": values})
    for place in (0, 15, 16, 99):
        changed = values.clone()
        changed[place] *= -1
        changed[place] += 1
        assert hash_of_tensors({"w": changed}) != before


def test_what_a_model_computes_with_its_weights_is_part_of_it():
    base = fingerprint(load("gemma2"))

    def changed(**options):
        plain = tiny_model("gemma2")
        for name, value in options.items():
            setattr(plain.config, name, value)
        return fingerprint(load_model(plain, tokenizer=tiny_tokenizer("gemma2"), device="cpu"))

    assert changed().key == base.key
    assert changed(rms_norm_eps=1e-3).key != base.key
    assert changed(final_logit_softcapping=None).key != base.key
    assert changed(sliding_window=4).weights == base.weights
    assert changed(sliding_window=4).key != base.key


def test_the_arithmetic_is_part_of_it(gpt2):
    base = fingerprint(gpt2)
    assert base.arithmetic == "float32"
    assert fingerprint(load(dtype="bfloat16")).arithmetic == "bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = fingerprint(gpt2)
    assert lowered.arithmetic == "float32, autocast bfloat16"
    assert lowered.key != base.key
    torch.set_float32_matmul_precision("high")
    try:
        assert fingerprint(gpt2).arithmetic == "float32, matmul high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert fingerprint(gpt2) == base


def test_probes_are_part_of_it_in_their_order(gpt2):
    one, two = HookProbe("one", []), HookProbe("two", [], spans=("hijack",))
    keys = {
        fingerprint(gpt2, probes=probes, spans=spans).key
        for probes, spans in [
            ((), ()),
            ((one,), ()),
            ((two,), ("hijack",)),
            ((one, two), ("hijack",)),
            ((two, one), ("hijack",)),
        ]
    }
    assert len(keys) == 5
