"""Hooks are temporary and always removed; hooks of others stay."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

from hijacklens.errors import InputError
from hijacklens.models.hooked import (
    HookedLanguageModel,
    HookedModel,
    device_of,
    hooked,
    require_eval,
)
from hijacklens.models.loading import load_model

IDS = torch.tensor([[5, 9, 300, 42, 7]])
RESIDUAL = "blocks.0.hook_resid_post"
PATTERN = "blocks.1.attn.hook_pattern"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    loaded = load_model(
        tiny_model(request.param), tokenizer=tiny_tokenizer(request.param), device="cpu"
    )
    with torch.no_grad():  # the first run puts on torch hooks of transformers and TransformerLens
        loaded.run_with_cache(IDS)
    return loaded


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks_on(model) -> int:
    """Hooks of TransformerLens and of torch, over all modules."""
    lens = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())
    return lens + sum(
        len(module._forward_hooks) + len(module._backward_hooks) + len(module._forward_pre_hooks)
        for module in model.modules()
    )


@pytest.fixture
def untouched(model):
    """After the test the model is bit for bit the same."""
    before, count, out = state(model), hooks_on(model), logits(model)
    yield
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hooks_on(model) == count
    assert torch.equal(logits(model), out)


def zero(activation, hook):
    return torch.zeros_like(activation)


def test_the_loaded_model_is_a_hooked_language_model(model):
    assert isinstance(model, HookedModel)
    assert isinstance(model, HookedLanguageModel)
    assert device_of(model) == torch.device("cpu")


def test_a_plain_model_is_not():
    assert not isinstance(tiny_model("gpt2"), HookedModel)
    assert not isinstance(object(), HookedLanguageModel)


def test_a_hook_acts_inside_the_body_alone(model, untouched):
    plain = logits(model)
    with hooked(model, [(RESIDUAL, zero)]) as same:
        assert same is model
        changed = logits(model)
    assert not torch.allclose(changed, plain, atol=1e-2)
    with torch.no_grad():
        expected = model.run_with_hooks(IDS, fwd_hooks=[(RESIDUAL, zero)])
    assert torch.equal(changed, expected)
    assert torch.equal(logits(model), plain)


def test_a_hook_sees_its_activation_and_its_point(model, untouched):
    seen = {}

    def look(activation, hook):
        seen[hook.name] = activation.detach().clone()

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
    with hooked(model, [(name, look) for name in names]):
        out = logits(model)
    assert [pattern.shape for pattern in seen.values()] == [(1, 4, 5, 5)] * 2
    for pattern in seen.values():
        assert torch.allclose(pattern.sum(-1), torch.ones(1, 4, 5), atol=1e-5)
        assert torch.equal(pattern.triu(1), torch.zeros_like(pattern))
    assert torch.equal(out, logits(model))  # a hook that returns nothing changes nothing


@pytest.mark.parametrize("name", ["hook_q", "hook_k", "hook_v", "hook_z"])
def test_a_hook_on_a_short_name_acts_as_run_with_hooks_does(model, name, untouched):
    shapes = []

    def one_head(activation, hook):
        shapes.append(activation.shape)
        changed = activation.clone()
        changed[:, :, 0] = 0
        return changed

    hook = (f"blocks.0.attn.{name}", one_head)
    with hooked(model, [hook]):
        ours = logits(model)
    with torch.no_grad():
        theirs = model.run_with_hooks(IDS, fwd_hooks=[hook])
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, logits(model), atol=1e-3)
    heads = 4 if name in ("hook_q", "hook_z") or model.cfg.n_key_value_heads is None else 2
    assert {tuple(shape)[:3] for shape in shapes} == {(1, 5, heads)}


def test_hooks_act_in_their_order(model, untouched):
    def add(activation, hook):
        return activation + 1

    def double(activation, hook):
        return activation * 2

    seen = []

    def look(activation, hook):
        seen.append(activation.clone())

    with hooked(model, [(RESIDUAL, look), (RESIDUAL, add), (RESIDUAL, double), (RESIDUAL, look)]):
        logits(model)
    assert torch.equal(seen[1], (seen[0] + 1) * 2)


def test_no_hooks_change_nothing(model, untouched):
    plain = logits(model)
    with hooked(model, []):
        assert torch.equal(logits(model), plain)


def test_contexts_nest(model, untouched):
    plain = logits(model)
    with hooked(model, [(RESIDUAL, lambda x, hook: x * 2)]):
        outer = logits(model)
        with hooked(model, [(PATTERN, lambda x, hook: x * 0)]):
            assert not torch.equal(logits(model), outer)
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["in the body", "in a hook"])
def test_hooks_come_off_after(error, where, model, untouched):
    def fail(activation, hook):
        raise error("stop")

    function = fail if where == "in a hook" else zero
    with pytest.raises(error), hooked(model, [(RESIDUAL, zero), (PATTERN, function)]):
        logits(model)
        raise error("stop")


def test_hooks_come_off_when_putting_one_on_fails(model, untouched, monkeypatch):
    def fail(function, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.hook_dict[PATTERN], "add_hook", fail)
    with pytest.raises(KeyboardInterrupt), hooked(model, [(RESIDUAL, zero), (PATTERN, zero)]):
        pytest.fail("the body must not run")


def test_the_hooks_of_others_stay(model):
    point = model.hook_dict[RESIDUAL]
    point.add_hook(lambda x, hook: x + 1)
    point.add_hook(lambda x, hook: x * 3, is_permanent=True)
    theirs = list(point.fwd_hooks)
    before = logits(model)
    try:
        with hooked(model, [(RESIDUAL, zero)]):
            assert len(point.fwd_hooks) == 3
        assert list(point.fwd_hooks) == theirs
        assert torch.equal(logits(model), before)
        with pytest.raises(RuntimeError), hooked(model, [(RESIDUAL, zero)]):
            raise RuntimeError
        assert list(point.fwd_hooks) == theirs
    finally:
        model.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("then_fail", [False, True])
def test_a_body_that_resets_all_hooks_does_no_harm(then_fail, model, untouched):
    with pytest.raises(RuntimeError) if then_fail else hooked(model, []):  # noqa: SIM117
        with hooked(model, [(RESIDUAL, zero)]):
            model.reset_hooks()
            if then_fail:
                raise RuntimeError


def test_running_with_hooks_inside_keeps_both_apart(model, untouched):
    with hooked(model, [(RESIDUAL, lambda x, hook: x * 2)]):
        doubled = logits(model)
        with torch.no_grad():
            model.run_with_hooks(IDS, fwd_hooks=[(PATTERN, zero)])
            _, cache = model.run_with_cache(IDS)
        assert torch.equal(logits(model), doubled)
        assert PATTERN in cache


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("blocks.0.hook_resid_pots", "blocks.0.hook_resid_post"),
        ("blocks.9.hook_resid_post", "blocks."),
        ("nowhere", None),
        ("", None),
    ],
)
def test_an_unknown_name_is_refused_before_any_hook_is_on(name, guess, model, untouched):
    with pytest.raises(InputError) as caught, hooked(model, [(RESIDUAL, zero), (name, zero)]):
        pytest.fail("the body must not run")
    text = str(caught.value)
    assert f"unknown hook {name!r}" in text
    assert "model.hook_dict" in text
    if guess:
        assert f"did you mean '{guess}" in text


def test_an_unknown_name_is_answered_in_a_few_lines():
    # GPT-2 XL has over two thousand hooks; a message that lists them all would hide the error.
    large = load_model(tiny_model("gpt2", layers=12), tokenizer=tiny_tokenizer("gpt2"))
    with pytest.raises(InputError) as caught, hooked(large, [("blocks.0.hook_resid_pots", zero)]):
        pytest.fail("the body must not run")
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize("training", [False, True])
def test_a_model_in_training_mode_is_refused(training, model):
    # The plain model below may be in a loop of training.
    getattr(model, "original_model", model).train(training)
    try:
        if training:
            with pytest.raises(InputError) as caught:
                require_eval(model, operation="hijack")
            assert str(caught.value).startswith("hijack needs a model in evaluation mode")
            assert "model.eval()" in str(caught.value)
        else:
            require_eval(model, operation="hijack")
    finally:
        model.eval()
    require_eval(model, operation="hijack")
