"""Without probes the engine runs the plain model under the hooked one, where that is the same."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hijacklens.engine.engine import next_token_logprobs, read
from hijacklens.engine.forward import Pass
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError
from hijacklens.models.agreement import agreement_of, plain_blocks_of
from hijacklens.models.computation import tensors_of
from hijacklens.models.delegated import SOFTMAXES
from hijacklens.models.loading import load_model
from hijacklens.models.unhooked import NO_PLAIN_BLOCKS, PlainBlocks, unhooked
from hijacklens.models.verification import check
from hijacklens.probe import HookProbe

SENTENCE = (11, 12, 13, 14, 15, 16)
WANTED = {SENTENCE * dose + query: {1, 2} for dose in range(3) for query in ((21, 22), (21, 24))}
HOOKS = {
    "no hook": [],
    "a hook before the blocks": ["hook_embed"],
    "a hook in the first layer": ["blocks.0.hook_resid_post"],
    "hooks in the last layer": ["blocks.1.attn.hook_pattern", "blocks.1.mlp.hook_out"],
    "hooks in all layers": ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"],
}


def loaded(family):
    plain = copy.deepcopy(tiny_model(family))
    return load_model(plain, tokenizer=tiny_tokenizer(family), device="cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return loaded(request.param)


def same_as_hooked(model):
    for prefix, reading in read(model, WANTED).items():
        expected = next_token_logprobs(model, prefix)
        for token, value in reading.logprobs.items():
            assert value == pytest.approx(float(expected[token]), abs=1e-4)


def test_it_shares_weights_and_leaves_the_hooked_model_as_it_was(model):
    before = [(id(module), dict(vars(module))) for module in model.original_model.modules()]
    config = model.original_model.config
    settings, attention = config.to_dict(), config._attn_implementation
    plain = unhooked(model, agreement_of(model).attention)
    assert not any(isinstance(module, GeneralizedComponent) for module in plain.modules())
    weights = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in plain.parameters()} & weights
    softcap = getattr(plain.config, "attn_logit_softcapping", None)
    assert plain.config._attn_implementation == ("eager" if softcap else "sdpa")
    read(model, WANTED)
    assert [(id(m), dict(vars(m))) for m in model.original_model.modules()] == before
    assert (config.to_dict(), config._attn_implementation) == (settings, attention)


def idle(names):
    """A probe that looks at activations and changes none."""
    return HookProbe("idle", [(name, lambda value, hook: None) for name in names], packs=True)


@pytest.mark.parametrize("sharing", ["plain", "packed", "cached"])
def test_hook_points_change_no_number(model, sharing):
    plain = read(model, WANTED, ReadOptions(sharing=sharing))
    children = [list(module._modules.items()) for module in model.original_model.modules()]
    for names in HOOKS.values():
        hooked = read(model, WANTED, ReadOptions(probes=[idle(names)], sharing=sharing))
        assert hooked.accounting.sharing == plain.accounting.sharing == sharing
        for prefix, reading in plain.items():
            assert reading.logprobs == pytest.approx(hooked[prefix].logprobs, abs=1e-4)
    assert [list(module._modules.items()) for module in model.original_model.modules()] == children


class Attentions(TorchFunctionMode):
    """Counts fused attention and the softmax of eager attention."""

    fused = eager = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.fused += func is torch.nn.functional.scaled_dot_product_attention
        self.eager += func in SOFTMAXES and args[0].dim() == 4
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("names", HOOKS.values(), ids=HOOKS)
def test_attention_is_eager_only_in_layers_with_hooks(names):
    model = loaded("llama")
    layers = {name.split(".")[1] for name in names if name.startswith("blocks")}
    run = Pass.of(model, [idle(names)], (), operation="a test")
    with Attentions() as counted:
        run.after(SENTENCE)
    assert (counted.fused, counted.eager) == (2 - len(layers), len(layers))


def test_another_thread_identifies_the_hooked_model():
    model = loaded("gpt2")  # its bridge has separate matrices
    names, found = list(tensors_of(model)), []
    with ThreadPoolExecutor(1) as pool:

        def look(value, hook):
            found.append(pool.submit(lambda: list(tensors_of(model))))
            time.sleep(0.05)

        probe = HookProbe("looks", [("blocks.0.hook_resid_post", look)])
        read(model, WANTED, ReadOptions(probes=[probe]))
        assert found and all(future.result() == names for future in found)


def test_plain_blocks_that_compute_something_else_are_not_used(monkeypatch):
    model = loaded("llama")
    assert plain_blocks_of(model).places
    first, last = PlainBlocks.of(model, None).places
    exchanged = PlainBlocks(((*first[:2], last[2]), (*last[:2], first[2])))
    monkeypatch.setattr(PlainBlocks, "of", lambda *given: exchanged)
    assert "differ" in check(model).plain_blocks
    assert plain_blocks_of(model) is NO_PLAIN_BLOCKS


def test_blocks_return_after_an_error():
    model = loaded("llama")
    children = [list(module._modules.items()) for module in model.original_model.modules()]

    def fail(value, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(model, WANTED, ReadOptions(probes=[HookProbe("fails", [("hook_embed", fail)])]))
    assert [list(module._modules.items()) for module in model.original_model.modules()] == children


def test_hooks_on_the_model_act():
    model = loaded("llama")
    before = read(model, WANTED)
    model.add_hook("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0)
    assert unhooked(model) is None
    same_as_hooked(model)
    assert read(model, WANTED)[SENTENCE * 2 + (21, 22)] != before[SENTENCE * 2 + (21, 22)]
    model.reset_hooks()
    assert read(model, WANTED) == before
    handle = model.original_model.lm_head.register_forward_hook(lambda *given: given[-1] * 0)
    assert unhooked(model) is None
    handle.remove()
    assert unhooked(model) is not None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("in_place", [True, False])
def test_changed_weights_count(family, in_place):
    """In GPT-2 the hooked model has matrices of its own, which may be views of the plain one's."""
    model = loaded(family)
    before = read(model, WANTED)
    value = model.blocks[0].attn.v.original_component
    if in_place:
        with torch.no_grad():
            value.weight.mul_(3)
    else:
        value.weight = torch.nn.Parameter(3 * value.weight.detach())
        if family == "gpt2":
            with pytest.raises(InputError, match="changed after loading"):
                read(model, WANTED)
            return
    same_as_hooked(model)
    assert read(model, WANTED) != before


def test_compatibility_mode_is_run_with_hooks():
    model = loaded("llama")
    model.enable_compatibility_mode(disable_warnings=True)
    assert unhooked(model) is None
    same_as_hooked(model)
