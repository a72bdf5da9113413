"""The hooks by which other value matrices and OV circuits act, layer by layer.

    W_V      x -> hook_v                       the values of a kv head become x @ M + b_V
    W_V W_O  hook_z                            W_V T W_O: what a head has gathered goes through T
             x, hook_pattern -> hook_z, output any M: a head writes pattern @ (x @ M) behind W_O

x is what W_V is given. Activations are handed on within one forward pass and not kept after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, HookFunction, NamedHook
from probes.values.matrices import kv_head_of, value_bias
from probes.values.path import add_to_output, value_input

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
