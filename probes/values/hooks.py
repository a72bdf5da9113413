"""The hooks by which other value matrices and OV circuits act, layer by layer.

    W_V      x -> hook_v                       values of a key/value head become x @ M + b_V
    W_V W_O  hook_z                            W_V T W_O: the output z of a head goes through T
             x, hook_pattern -> hook_z, output any M: a head writes pattern @ (x @ M) after W_O

x is the input of W_V. Hooks pass activations on within one forward pass and keep none after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, HookFunction, NamedHook
from hijacklens.probe import Placed
from probes.anatomy.matrices import kv_head_of, value_bias
from probes.anatomy.norms import NORM_AFTER, norm_at

INPUT, PATTERN, VALUES, WRITTEN = "the input of W_V", "the pattern", "values", "the addition"
LEFT, MARK = "the part of z that stays", "the mark in z"
AGREEMENT = 0.03
"""Largest relative difference between a head's output and its pattern times its values, since
bfloat16 rounds."""


def value_hooks(
    model: HookedModel, layer: int, new: Mapping[int, Tensor], *, keep_bias: bool
) -> Sequence[NamedHook]:
    """Return hooks that give key/value heads of a layer other value matrices [d_model, d_head]."""
    passed: dict[str, Tensor] = {}
    biases = {head: value_bias(model, layer, head) for head in new} if keep_bias else {}

    def write(values: Tensor, hook: Any) -> Tensor:  # [batch, pos, kv_head, d_head]
        x = _take(passed, INPUT, hook)
        values = values.clone()
        for head, matrix in new.items():
            value = x @ matrix.to(x)
            values[:, :, head] = value + biases[head].to(value) if head in biases else value
        return values

    return [_value_input(model, layer, passed), (f"blocks.{layer}.attn.hook_v", write)]


def inner_hooks(
    model: HookedModel, layer: int, new: Mapping[int, Tensor], *, keep_bias: bool
) -> Sequence[NamedHook]:
    """Return hooks that give query heads of a layer OV circuits W_V T W_O, T [d_head, d_head].

    Unless T is a number times the identity, W_V W_O has to be the circuit of the model: nothing
    may come between values and z but the pattern.
    """
    passed: dict[str, Tensor] = {}
    biases = {head: value_bias(model, layer, kv_head_of(model, head)) for head in new}
    biases = {head: bias for head, bias in biases.items() if bias.any()}
    mixing = [h for h, T in new.items() if not torch.equal(T, T[0, 0] * torch.eye(len(T)).to(T))]

    def map_output(z: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_head]
        pattern = _take(passed, PATTERN, hook) if biases or mixing else z
        values = _take(passed, VALUES, hook) if mixing else z
        for head in mixing:
            rows, v = pattern[:, head].to(z), values[:, :, kv_head_of(model, head)].to(z)
            if rows.shape[-1] == v.shape[1]:  # values of the past are not here
                _check_output(z[:, :, head], rows @ v, layer, head)
        z = z.clone()
        for head, matrix in new.items():
            bias = torch.zeros((), dtype=z.dtype, device=z.device)
            if head in biases:  # the rows of a pattern need not sum to one: see knock-outs
                bias = pattern[:, head].sum(-1, keepdim=True).to(z) * biases[head].to(z)
            mapped = (z[:, :, head] - bias) @ matrix.to(z)
            z[:, :, head] = mapped + bias if keep_bias else mapped
        return z

    attn = f"blocks.{layer}.attn"
    reading: list[NamedHook] = [(f"{attn}.hook_v", _keep(passed, VALUES))] if mixing else []
    if biases or mixing:
        reading.append((f"{attn}.hook_pattern", _keep(passed, PATTERN)))
    return [*reading, (f"{attn}.hook_z", map_output)]


def circuit_hooks(
    model: HookedModel, layer: int, new: Mapping[int, Tensor], *, keep_bias: bool
) -> Sequence[NamedHook]:
    """Return hooks that give query heads of a layer other OV circuits [d_model, d_model]."""
    passed: dict[str, Tensor] = {}
    kv_heads = {head: kv_head_of(model, head) for head in new}
    biases = {head: value_bias(model, layer, kv_heads[head]) for head in new} if keep_bias else {}
    heads = list(new)

    def put_mark(z: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_head]
        x, values, pattern = (_take(passed, name, hook) for name in (INPUT, VALUES, PATTERN))
        written = torch.zeros((), dtype=x.dtype, device=x.device)  # becomes [batch, pos, d_model]
        left = torch.zeros_like(z[:, :, heads])
        for i, (head, matrix) in enumerate(new.items()):
            rows = pattern[:, head].to(x)  # [batch, query, key]
            _check_output(z[:, :, head], rows @ values[:, :, kv_heads[head]].to(x), layer, head)
            written = written + rows @ (x @ matrix.to(x))
            if head in biases:
                left[:, :, i] = rows.sum(-1, keepdim=True) * biases[head].to(x)
        # No multiple of the mark is the mark, and no z of the model is like it: so `settle`, and
        # another circuit for this head, see every change.
        mark = torch.where(z < 0, 1 - z, -1 - z)[:, :, heads]
        passed.update({WRITTEN: written, LEFT: left, MARK: mark})
        z = z.clone()
        z[:, :, heads] = mark
        return z

    def settle(z: Tensor, hook: Any) -> Tensor:
        left, marked = _take(passed, LEFT, hook), _take(passed, MARK, hook)
        for i, head in enumerate(heads):
            if not torch.equal(z[:, :, head], marked[:, :, i]):
                raise InputError(
                    f"replace_circuit: a later probe changes z of head {head} in layer {layer}, "
                    "which is only a part of what the new circuit writes; leave one of them out."
                )
        z = z.clone()
        z[:, :, heads] = left
        return z

    attn = f"blocks.{layer}.attn"
    return [
        _value_input(model, layer, passed),
        (f"{attn}.hook_v", _keep(passed, VALUES)),
        (f"{attn}.hook_pattern", _keep(passed, PATTERN)),
        (f"{attn}.hook_z", put_mark),
        (f"{attn}.hook_z", Placed(settle, "last")),
        *_add_to_output(model, layer, passed),
    ]


def _value_input(model: HookedModel, layer: int, passed: dict[str, Tensor]) -> NamedHook:
    """Return a hook that reads exactly what W_V of a layer receives.

    It refuses models that compute separate inputs for queries, keys and values, that ungroup their
    key/value heads, and HookedTransformers with a norm after attention.
    """
    config = model.cfg
    for option in ("use_split_qkv_input", "use_attn_in", "ungroup_grouped_query_attention"):
        if getattr(config, option, False):
            raise InputError(
                f"value probes need a model with its usual computation, and this one has "
                f"{option} on; call model.set_{option}(False) first."
            )
    for part in ("v", "kv_b_proj"):
        direct = f"blocks.{layer}.attn.{part}.hook_in"
        if direct in model.hook_dict:
            return direct, _keep(passed, INPUT)
    if getattr(config, "original_architecture", None) in NORM_AFTER:
        raise InputError(
            "value probes do not support the HookedTransformer of OLMo 2 and 3, whose first norm "
            "follows attention; load the model with hijacklens.load_model."
        )
    normalised = f"blocks.{layer}.ln1.hook_normalized"
    norm = norm_at(model, f"blocks.{layer}.ln1")
    if norm is None or normalised not in model.hook_dict:
        return f"blocks.{layer}.hook_resid_pre", _keep(passed, INPUT)  # a model without norms
    dtype = next(iter(model.parameters())).dtype
    return normalised, _keep(passed, INPUT, lambda x: (x * norm.weight + norm.bias).to(dtype))


def _add_to_output(
    model: HookedModel, layer: int, passed: dict[str, Tensor]
) -> Sequence[NamedHook]:
    """Return hooks that add `passed[WRITTEN]` to the attention output, before a norm after it.

    They come first, since a probe on the attention output acts on all that its heads write.
    """

    def add(output: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        return output + passed.pop(WRITTEN).to(output)

    outputs = [f"blocks.{layer}.attn.o.hook_out", f"blocks.{layer}.attn.hook_out"]
    if getattr(model.cfg, "use_attn_result", False):  # W_O is then applied head by head
        del outputs[0]
    if direct := next((name for name in outputs if name in model.hook_dict), None):
        return [(direct, Placed(add, "first"))]
    norm = f"blocks.{layer}.ln1_post"
    if f"{norm}.hook_scale" not in model.hook_dict:
        return [(f"blocks.{layer}.hook_attn_out", Placed(add, "first"))]

    # This RMS norm has hooks only on its scale [batch, pos, 1] and on its result.
    def normalise_again(normalised: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        output = add(normalised * passed.pop("scale"), hook)
        return output / (output.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()

    return [
        (f"{norm}.hook_scale", Placed(_keep(passed, "scale"), "first")),
        (f"{norm}.hook_normalized", Placed(normalise_again, "first")),
    ]


def _check_output(z: Tensor, expected: Tensor, layer: int, head: int) -> None:
    # Changes to the pattern or the values after our hooks have read them would be lost.
    if (expected - z).norm() > AGREEMENT * expected.norm() + 1e-6:
        raise InputError(
            f"replace_circuit: what head {head} of layer {layer} puts out is not its pattern times "
            "its values. Either the model gates, clips or norms them, and W_V W_O is not its "
            "circuit (use values.replace), or a probe changes them: list probes that change "
            "attention or values before replace_circuit, and none that changes z of this head."
        )


def _keep(
    passed: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor] = lambda x: x
) -> HookFunction:
    def hook_function(activation: Tensor, hook: Any) -> None:
        passed[name] = change(activation)

    return hook_function


def _take(passed: dict[str, Tensor], name: str, hook: Any) -> Tensor:
    if name not in passed:
        raise InputError(
            f"{name} was not seen before {hook.name}; value probes do not support this kind of "
            "model."
        )
    return passed.pop(name)
