"""The hooks by which other value matrices and OV circuits act, layer by layer.

    W_V      x -> hook_v                       the values of a kv head become x @ M + b_V
    W_V W_O  hook_z                            W_V T W_O: what a head has gathered goes through T
             x, hook_pattern -> hook_z, output any M: a head writes pattern @ (x @ M) behind W_O

x is what W_V is given. Activations are handed on within one forward pass and not kept after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, HookFunction, NamedHook
from probes.values.matrices import kv_head_of, norm_affine, value_bias

Receive: TypeAlias = Callable[[Float[Tensor, "batch pos d_model"]], object]

NORM_BEHIND = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")

Addition: TypeAlias = Callable[[], Float[Tensor, "batch pos d_model"]]


def value_input(model: HookedModel, layer: int, receive: Receive) -> NamedHook:
    """The hook that hands `receive` what W_V of a layer is given, exactly; it changes nothing.

    Raises:
        InputError: The model computes the inputs of queries, keys and values apart or ungroups its
            key/value heads, or is a HookedTransformer whose norm stands behind attention.
    """
    config = model.cfg
    for option in ("use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention"):
        if getattr(config, option, False):
            raise InputError(
                f"value probes need a model that is computed as it usually is, and this one has "
                f"{option} on; call model.set_{option}(False) first."
            )
    direct = f"blocks.{layer}.attn.v.hook_in"
    if direct in model.hook_dict:
        return direct, _hand_over(receive)
    if getattr(config, "original_architecture", None) in NORM_BEHIND:
        raise InputError(
            "value probes do not know the HookedTransformer of OLMo 2 and 3, whose first norm "
            "stands behind attention; load the model with hijacklens.load_model."
        )
    blocks: Any = getattr(model, "blocks", None)
    normalised = f"blocks.{layer}.ln1.hook_normalized"
    if normalised not in model.hook_dict:
        return f"blocks.{layer}.hook_resid_pre", _hand_over(receive)  # a model without norms
    weight, bias = norm_affine(model, blocks[layer].ln1)
    return normalised, _hand_over(lambda x: receive(x.to(weight.dtype) * weight + bias))


def add_to_output(model: HookedModel, layer: int, addition: Addition) -> Sequence[NamedHook]:
    """Hooks that add something to the attention output of a layer, before a norm behind it.

    Args:
        model: Any hooked model.
        layer: The layer.
        addition: Called once in each forward pass, when the pattern of the layer is known.
    """
    direct = f"blocks.{layer}.attn.hook_out"
    if direct in model.hook_dict:
        return [(direct, _add(addition))]
    if f"blocks.{layer}.ln1_post.hook_scale" not in model.hook_dict:
        return [(f"blocks.{layer}.hook_attn_out", _add(addition))]
    return _inside_norm(model, layer, addition)


def _inside_norm(model: HookedModel, layer: int, addition: Addition) -> Sequence[NamedHook]:
    """Add to the input of a norm (RMS) that has hooks only on its scale and on its result."""
    scales: list[Tensor] = []

    def keep_scale(scale: Tensor, hook: Any) -> None:  # [batch, pos, 1]
        scales.append(scale)

    def normalise_again(normalised: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        whole = normalised * scales.pop() + addition().to(normalised)
        return whole / (whole.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()

    norm = f"blocks.{layer}.ln1_post"
    return [(f"{norm}.hook_scale", keep_scale), (f"{norm}.hook_normalized", normalise_again)]


def _hand_over(receive: Receive) -> HookFunction:
    def hook_function(activation: Tensor, hook: Any) -> None:
        receive(activation)

    return hook_function


def _add(addition: Addition) -> HookFunction:
    def hook_function(output: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        return output + addition().to(output)

    return hook_function


AGREEMENT = 0.03
"""How far a head's output may be from its pattern times its values, relative: bfloat16 rounds."""


def value_hooks(
    model: HookedModel, layer: int, new: Mapping[int, Tensor], *, keep_bias: bool
) -> Sequence[NamedHook]:
    """Hooks that give kv heads of a layer other value matrices [d_model, d_head]."""
    held: dict[str, Tensor] = {}
    biases = {head: value_bias(model, layer, head) for head in new} if keep_bias else {}

    def write(values: Tensor, hook: Any) -> Tensor:  # [batch, pos, kv_head, d_head]
        x = _take(held, "the input of W_V", hook)
        values = values.clone()
        for head, matrix in new.items():
            value = x @ matrix.to(x)
            values[:, :, head] = value + biases[head].to(value) if head in biases else value
        return values

    reading = value_input(model, layer, partial(held.__setitem__, "the input of W_V"))
    return [reading, (f"blocks.{layer}.attn.hook_v", write)]


def inner_hooks(
    model: HookedModel, layer: int, new: Mapping[int, Tensor], *, keep_bias: bool
) -> Sequence[NamedHook]:
    """Hooks that give query heads of a layer the OV circuits W_V T W_O, T [d_head, d_head]."""
    held: dict[str, Tensor] = {}
    biases = {head: value_bias(model, layer, kv_head_of(model, head)) for head in new}
    biases = {head: bias for head, bias in biases.items() if bias.any()}

    def map_output(z: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_head]
        pattern = _take(held, "the pattern", hook) if biases else z
        z = z.clone()
        for head, matrix in new.items():
            bias = torch.zeros((), dtype=z.dtype, device=z.device)
            if head in biases:  # the rows of a pattern need not sum to one: see knock-outs
                bias = pattern[:, head].sum(-1, keepdim=True).to(z) * biases[head].to(z)
            mapped = (z[:, :, head] - bias) @ matrix.to(z)
            z[:, :, head] = mapped + bias if keep_bias else mapped
        return z

    attn = f"blocks.{layer}.attn"
    reading = [(f"{attn}.hook_pattern", _keep(held, "the pattern"))] if biases else []
    return [*reading, (f"{attn}.hook_z", map_output)]


def circuit_hooks(
    model: HookedModel, layer: int, new: Mapping[int, Tensor], *, keep_bias: bool
) -> Sequence[NamedHook]:
    """Hooks that give query heads of a layer other OV circuits [d_model, d_model]."""
    held: dict[str, Tensor] = {}
    kv_heads = {head: kv_head_of(model, head) for head in new}
    biases = {head: value_bias(model, layer, kv_heads[head]) for head in new} if keep_bias else {}

    def leave_biases(z: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_head]
        x = _take(held, "the input of W_V", hook)
        values, pattern = _take(held, "values", hook), _take(held, "the pattern", hook)
        z = z.clone()
        written = torch.zeros_like(x)  # [batch, pos, d_model]
        for head, matrix in new.items():
            rows = pattern[:, head].to(x)  # [batch, query, key]
            _check_output(z[:, :, head], rows @ values[:, :, kv_heads[head]].to(x), layer, head)
            written = written + rows @ (x @ matrix.to(x))
            z[:, :, head] = 0
            if head in biases:
                z[:, :, head] = rows.sum(-1, keepdim=True) * biases[head].to(x)
        held["written"] = written
        return z

    attn = f"blocks.{layer}.attn"
    return [
        value_input(model, layer, partial(held.__setitem__, "the input of W_V")),
        (f"{attn}.hook_v", _keep(held, "values")),
        (f"{attn}.hook_pattern", _keep(held, "the pattern")),
        (f"{attn}.hook_z", leave_biases),
        *add_to_output(model, layer, lambda: held.pop("written")),
    ]


def _check_output(z: Tensor, seen: Tensor, layer: int, head: int) -> None:
    # A probe that changes the pattern or the values after we have seen them would be lost.
    if (seen - z).norm() > AGREEMENT * seen.norm() + 1e-6:
        raise InputError(
            f"replace_circuit: what head {head} of layer {layer} puts out is not its pattern times "
            "its values. List probes that change attention or values before replace_circuit, and "
            "none that changes z of this head."
        )


def _keep(held: dict[str, Tensor], name: str) -> HookFunction:
    def hook_function(activation: Tensor, hook: Any) -> None:
        held[name] = activation

    return hook_function


def _take(held: dict[str, Tensor], name: str, hook: Any) -> Tensor:
    if name not in held:
        raise InputError(
            f"{name} was not seen before {hook.name}; value probes do not know this kind of model."
        )
    return held.pop(name)
