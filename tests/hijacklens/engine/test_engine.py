"""Contract 1: readings equal plain Hugging Face forward passes of single prefixes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.engine import batch_size
from hijacklens.engine.engine import next_token_logprobs, read
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError
from hijacklens.models.loading import load_model

PROMPTS = [
    "The Eiffel Tower is in the city of",
    "Do not think of Guam. The Eiffel Tower is in the city of",
    "Do not think of Guam. Do not think of Guam. The Eiffel Tower is in the city of",
    "Rome is",
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A plain Hugging Face model and the hooked one made of its copy."""
    plain = tiny_model(request.param)
    tokenizer = tiny_tokenizer(request.param)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tokenizer, device="cpu")


def plain_logprobs(plain, ids):
    with torch.no_grad():
        return plain(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def check(plain, readings, wanted, tolerance=1e-4):
    for prefix, tokens in wanted.items():
        expected = plain_logprobs(plain, prefix)
        reading = readings[prefix]
        assert set(reading.logprobs) == set(tokens)
        for token, value in reading.logprobs.items():
            assert abs(value - float(expected[token])) < tolerance
        assert reading.top_logprob == pytest.approx(float(expected.max()), abs=tolerance)
        assert float(expected[reading.top_token]) == pytest.approx(float(expected.max()), abs=1e-4)


def wanted_for(tokenizer):
    wanted = {}
    for i, prompt in enumerate(PROMPTS):
        ids = tuple(tokenizer(prompt).input_ids)
        wanted[ids] = {1, 2 + i}
        wanted[(*ids, 300)] = {7}  # a second target token, which runs the prompt along
        wanted[(*ids, 301 + i, 5)] = {8, 9}
    return wanted


def test_readings_equal_plain_forward_passes(pair):
    plain, model = pair
    wanted = wanted_for(model.tokenizer)
    check(plain, read(model, wanted), wanted)


@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_any_batch_size_gives_the_same_numbers(pair, batch_tokens):
    plain, model = pair
    wanted = wanted_for(model.tokenizer)
    check(plain, read(model, wanted, ReadOptions(batch_tokens=batch_tokens)), wanted)


def test_limit_on_reads_gives_the_same_numbers(pair, monkeypatch):
    plain, model = pair
    monkeypatch.setattr(batch_size, "READ_VALUES", 3 * model.cfg.d_vocab)
    wanted = wanted_for(model.tokenizer)
    check(plain, read(model, wanted), wanted)


def test_next_token_logprobs_equal_plain(pair):
    plain, model = pair
    ids = tuple(model.tokenizer(PROMPTS[1]).input_ids)
    torch.testing.assert_close(
        next_token_logprobs(model, ids), plain_logprobs(plain, ids), atol=1e-4, rtol=0
    )


ids = st.lists(st.integers(0, 255), min_size=1, max_size=12).map(tuple)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(ids, st.sets(st.integers(0, 255), max_size=3), min_size=1, max_size=8))
def test_random_sets_of_prefixes(gpt2_pair, wanted):
    plain, model = gpt2_pair
    # Beginnings of what is asked for are asked for too, so that rows share their reads.
    wanted |= {prefix[: len(prefix) // 2]: {3} for prefix in wanted if len(prefix) > 1}
    check(plain, read(model, wanted, ReadOptions(batch_tokens=30)), wanted)


@pytest.fixture(scope="module")
def gpt2_pair():
    plain = tiny_model("gpt2", seed=1)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("gpt2"), device="cpu")


def test_progress_sums_to_one(gpt2_pair):
    _, model = gpt2_pair
    fractions, kept = [], {}
    wanted = {(1, 2): {1}, (1,): {2}, (3, 4, 5): {2}}

    def finished(readings, fraction):
        kept.update(readings)
        fractions.append(fraction)

    found = read(model, wanted, ReadOptions(sharing="plain", batch_tokens=1), finished)
    assert fractions == pytest.approx([3 / 5, 2 / 5])
    assert kept == found


def test_only_read_positions_are_unembedded(gpt2_pair, monkeypatch):
    _, model = gpt2_pair
    shapes = []
    unembedding = model.unembed.original_component
    real = unembedding.forward

    def seen(x):
        shapes.append(real(x).shape)
        return real(x)

    # Not by a hook: with one on it, the model would be run without sharing.
    monkeypatch.setattr(unembedding, "forward", seen)
    wanted = {tuple(range(50)): {1}, tuple(range(60, 100)): {1}, (*range(40), 7, 8): {2}}
    sharings = [
        read(model, wanted, ReadOptions(sharing=sharing)).accounting.sharing
        for sharing in ("plain", "packed", "cached")
    ]
    assert sharings == ["plain", "packed", "cached"]
    reads = [shape[1] for shape in shapes if shape[1]]
    assert sum(reads) == 9 and all(shape[::2] == (1, model.cfg.d_vocab) for shape in shapes)


def test_no_hook_or_gradient_is_left_behind(gpt2_pair):
    plain, model = gpt2_pair
    read(model, {(1, 2): {1}})
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    want = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        own = name.replace("._original_component", "")
        if own in want:
            assert torch.equal(parameter, want[own])


def test_hooks_that_are_on_the_model_act(gpt2_pair):
    _, model = gpt2_pair
    wanted = {(1, 2): {1}}
    bare = read(model, wanted)[1, 2].logprobs[1]
    hook = ("blocks.0.hook_mlp_out", lambda value, hook: value * 0)
    with model.hooks(fwd_hooks=[hook]):
        ablated = read(model, wanted, ReadOptions(sharing="packed"))
    assert abs(ablated[1, 2].logprobs[1] - bare) > 1e-3
    # They may go by positions in a row.
    assert (ablated.accounting.sharing, ablated.accounting.why) == (
        "plain",
        "hooks that are not probes are on it",
    )
    assert read(model, wanted)[1, 2].logprobs[1] == bare


def test_bad_input(gpt2_pair):
    _, model = gpt2_pair
    with pytest.raises(InputError, match="empty prefix"):
        read(model, {(): {1}})
    with pytest.raises(InputError, match="batch size must be at least 1 token, not -5"):
        read(model, {(1,): {1}}, ReadOptions(batch_tokens=-5))
    with pytest.raises(InputError, match="pack size must be at least 1 token, not 0"):
        read(model, {(1,): {1}}, ReadOptions(pack_tokens=0))
    with unchecked(), pytest.raises(InputError, match=r"unknown sharing 'fast'.*cached.*plain"):
        read(model, {(1,): {1}}, ReadOptions(sharing="fast"))
    model.train()
    try:
        with pytest.raises(InputError, match="scoring needs a model in evaluation mode"):
            read(model, {(1,): {1}})
    finally:
        model.eval()
