"""Contract 1: readings equal plain Hugging Face forward passes of single prefixes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.models import load_model
from hijacklens.scoring import engine
from hijacklens.scoring.engine import next_token_logprobs, read

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
    check(plain, read(model, wanted, batch_tokens=batch_tokens), wanted)


def test_limit_on_reads_gives_the_same_numbers(pair, monkeypatch):
    plain, model = pair
    monkeypatch.setattr(engine, "READ_VALUES", 3 * model.cfg.d_vocab)
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
    check(plain, read(model, wanted, batch_tokens=30), wanted)


@pytest.fixture(scope="module")
def gpt2_pair():
    plain = tiny_model("gpt2", seed=1)
    return plain, load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer("gpt2"), device="cpu")


def test_prefixes_are_read_on_the_way(gpt2_pair):
    _, model = gpt2_pair
    rows = list(engine._rows({(1, 2): (), (1, 2, 3): (), (1, 2, 4): (), (5,): (), (1,): ()}))
    assert [row.ids for row in rows] == [(1, 2, 3), (1, 2, 4), (5,)]
    assert sorted(read for row in rows for read in row.reads) == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4),
        (5,),
    ]
    shares = []
    read(model, {(1, 2): {1}, (3, 4, 5): {2}}, batch_tokens=1, advance=shares.append)
    assert shares == pytest.approx([3 / 5, 2 / 5])


def test_only_read_positions_are_unembedded(gpt2_pair):
    _, model = gpt2_pair
    shapes = []
    point = model.hook_dict["unembed.hook_out"]
    handle = point.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    try:
        read(model, {tuple(range(50)): {1}, tuple(range(60, 100)): {1}})
    finally:
        handle.remove()
    assert shapes == [(1, 2, model.cfg.d_vocab)]


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
    bare = read(model, {(1, 2): {1}})[1, 2].logprobs[1]
    hook = ("blocks.0.hook_mlp_out", lambda value, hook: value * 0)
    with model.hooks(fwd_hooks=[hook]):
        ablated = read(model, {(1, 2): {1}})[1, 2].logprobs[1]
    assert abs(ablated - bare) > 1e-3
    assert read(model, {(1, 2): {1}})[1, 2].logprobs[1] == bare


def test_bad_input(gpt2_pair):
    _, model = gpt2_pair
    with pytest.raises(InputError, match="empty prefix"):
        read(model, {(): {1}})
    with pytest.raises(InputError, match="at least 1 token, not -5"):
        read(model, {(1,): {1}}, batch_tokens=-5)
    model.train()
    try:
        with pytest.raises(InputError, match="scoring needs a model in evaluation mode"):
            read(model, {(1,): {1}})
    finally:
        model.eval()
