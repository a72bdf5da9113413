"""The way of values through a model: what W_V is given, and where the attention output can change.

    blocks.L.attn.v.hook_in      bridge and one-layer model: the exact input of W_V
    blocks.L.ln1.hook_normalized HookedTransformer: the input before the weight and bias of the norm
    blocks.L.attn.hook_out       bridge: the attention output, before a norm behind it
    blocks.L.hook_attn_out       one-layer model and HookedTransformer
    blocks.L.ln1_post            HookedTransformer of Gemma-2: has hooks inside the norm only

Models differ here and nowhere else in the value probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, HookFunction, NamedHook
from probes.values.matrices import norm_affine

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
