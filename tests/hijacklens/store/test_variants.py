"""One store for many models that differ in one thing: none of them gets the readings of another."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count, islice
from types import MethodType

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokenizer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaForCausalLM

from hijacklens.engine.reading import Reading
from hijacklens.models.computation import tensors_of
from hijacklens.models.identity import identify
from hijacklens.models.loading import load_model
from hijacklens.store.database import StoreWarning
from hijacklens.store.fingerprint import fingerprint_of
from hijacklens.store.store import open_store
from probes import attention, values

REQUESTS = {(1, 2, 3): {4}, (1, 2, 3, 5): {6, 7}}


def deepseek():
    """A mixture of experts whose router has a bias that is a buffer."""
    config = DeepseekV3Config(
        vocab_size=len(tiny_tokenizer("llama")), hidden_size=16, intermediate_size=16,
        moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, kv_lora_rank=8,
        q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=0, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config)


class Quantised(nn.Module):
    """A linear layer whose weight is a buffer, and its scale a plain attribute."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) * self.scale).T


def quantised():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Quantised(layer.mlp.down_proj)
    return model


def dynamic():
    config = tiny_model("llama").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


MODELS = {
    **{family: partial(tiny_model, family) for family in ("gpt2", "llama", "gemma3")},
    "deepseek": deepseek,
    "quantised": quantised,
    "dynamic": dynamic,
}


def load(name, **options):
    tokenizer = tiny_tokenizer(name if name in ("gpt2", "gemma3") else "llama")
    return load_model(MODELS[name](), **{"tokenizer": tokenizer, "device": "cpu", **options})


def parts(model):
    """Path -> module of transformers, without the wrappers of TransformerLens."""
    return {
        path.replace("._original_component", "").replace("_original_component", ""): module
        for path, module in model.original_model.named_modules()
        if not isinstance(module, (HookPoint, GeneralizedComponent))
    }


@contextmanager
def values_of(tensor, change):
    before = tensor.detach().clone()
    tensor.data.copy_(change(before))
    assert not torch.equal(tensor, before)
    yield
    tensor.data.copy_(before)


def last_digit(tensor):
    """The tensor with one value changed as little as its dtype allows."""
    changed = tensor.clone(memory_format=torch.contiguous_format)
    flat = changed.view(-1)
    integral = not changed.is_floating_point()
    one = torch.tensor(3.0e38, dtype=torch.float32).to(changed.dtype)
    flat[-1] = flat[-1] ^ 1 if integral else torch.nextafter(flat[-1], one)
    return changed


def odd_columns(tensor):
    changed = tensor.clone()
    changed[:, 1::2] *= -1
    return changed


@contextmanager
def attribute(owner, name, value):
    before = vars(owner)[name]
    vars(owner)[name] = value
    yield
    vars(owner)[name] = before


@contextmanager
def child(parent, name, module):
    before = parent._modules[name]
    parent._modules[name] = module
    yield
    parent._modules[name] = before


@contextmanager
def put_on(owner, name, value):
    setattr(owner, name, value)
    yield
    delattr(owner, name)


@contextmanager
def patched(owner, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@contextmanager
def removed_afterwards(put):
    handle = put()
    yield
    handle.remove()


def nearby(value):
    """The nearest other value of a setting."""
    if isinstance(value, bool):
        return not value
    return math.nextafter(value, math.inf) if isinstance(value, float) else value + 1


def variants(model):
    """Yield what is changed, and a context manager in which it is."""
    memory = set()
    for name, tensor in tensors_of(model).items():
        if tensor.untyped_storage().data_ptr() in memory:
            continue  # tied, or a part
        memory.add(tensor.untyped_storage().data_ptr())
        yield f"the last digit of {name}", values_of(tensor, last_digit)
        if tensor.dim() == 2 and tensor.is_floating_point():
            yield f"signs of {name}", values_of(tensor, odd_columns)
    seen = set()
    for path, module in parts(model).items():
        for name, value in vars(module).items():
            key = (type(module), name)
            unused = name.startswith("_") or name.endswith("_cached") or name == "training"
            if isinstance(value, (bool, int, float)) and not unused and key not in seen:
                seen.add(key)
                if name != "gradient_checkpointing":
                    yield f"{name} of {path}", attribute(module, name, nearby(value))
        if type(module) not in seen:
            seen.add(type(module))
            kind, forward = type(module), type(module).forward
            yield f"another class of {path}", patched(module, "__class__", type("It", (kind,), {}))
            yield f"forward of {kind}", patched(kind, "forward", lambda *a, f=forward: f(*a))
            yield f"forward on {path}", put_on(module, "forward", MethodType(forward, module))
            yield (
                f"a hook on {path}",
                removed_afterwards(partial(module.register_forward_hook, lambda *given: None)),
            )
            parent, _, name = path.rpartition(".")
            owner = parts(model)[parent]
            if name in owner._modules and not isinstance(module, nn.Embedding):
                yield f"{path} is no more", child(owner, name, nn.Identity())
    config = model.original_model.config
    for name, value in config.to_dict().items():
        if isinstance(value, float) and name in vars(config):
            yield f"{name} of the configuration", attribute(config, name, nearby(value))
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        other = {**rope, "rope_theta": nearby(rope["rope_theta"])}
        yield "the base of the rotary embedding", attribute(config, "rope_parameters", other)
    yield "attention", patched(config, "_attn_implementation", "sdpa")
    yield (
        "a hook on a hook point",
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: None)]),
    )
    yield (
        "a hook on all modules",
        removed_afterwards(partial(register_module_forward_hook, lambda *given: None)),
    )


@contextmanager
def readings_of(path, model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # what has no key is not stored
        with open_store(path, lambda: fingerprint_of(model, identify(model), **options)) as store:
            yield store


ALL = [pytest.param(name, 7, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize(("name", "every"), [("llama", 20), *ALL])
def test_no_variant_gets_the_readings_of_another(name, every, tmp_path):
    path, model, numbers = tmp_path / "s.sqlite", load(name), count(1)

    def keep(**options):
        """Look up a variant that is not stored, and keep readings of its own."""
        with readings_of(path, options.pop("model", model), **options) as store:
            assert store.find(REQUESTS) == {}
            number = -float(next(numbers))
            own = {
                prefix: Reading(dict.fromkeys(tokens, number), 0, number)
                for prefix, tokens in REQUESTS.items()
            }
            store.keep(own)
        return own

    original = keep()
    wrong = []
    for changed, change in islice(variants(model), 0, None, every):
        with ExitStack() as stack:
            stack.enter_context(change)
            try:
                keep()
            except AssertionError:
                wrong.append(changed)
    assert wrong == []
    assert next(numbers) > 100 / every
    for factor in (0.1, np.nextafter(0.1, 1)):
        keep(probes=[values.replace(values.scaled(float(factor)))])
    keep(probes=[attention.knock_out(source="last", target="first")], spans=("last", "first"))
    keep(model=load(name, dtype="bfloat16"))
    if name != "gpt2":
        keep(model=load(name, tokenizer=tiny_tokenizer("gpt2")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keep()
    # Nothing is lost: the model and an equal one under another name find what is theirs.
    copy = load(name)
    copy.cfg.model_name = "another name"
    for same in (model, copy):
        with readings_of(path, same) as store:
            assert store.find(REQUESTS) == original
