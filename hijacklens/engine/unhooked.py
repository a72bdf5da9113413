"""A hooked model without its hooks: the same weights in the modules of transformers.

Hook points cost about two per cent of a forward pass on a CPU, and as much again because attention
scores with a hook must be stored, which rules out fused kernels. `unhooked` removes the modules
that TransformerLens puts around those of Hugging Face. Rows, masks, positions and caches stay the
same, and so do the numbers (contract 1). The hooked model is not touched: modules are copied,
weights are shared.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PretrainedConfig

from hijacklens.models.hooked import HookedModel, unnamed_hooks


def unhooked(model: HookedModel) -> torch.nn.Module | None:
    """Return the plain model under a hooked one, or None if it might compute something else.

    It is None with hooks on the model, in compatibility mode (weights are folded), and if the
    hooked model computes with weights that the plain one does not have, such as changed ones.

    Note:
        Costs a copy of every module without its weights, some 20 ms.
    """
    if not isinstance(model, TransformerBridge) or model.compatibility_mode:
        return None
    hooked: Any = model.original_model
    if getattr(hooked, "hf_device_map", None) or unnamed_hooks(model):
        return None
    configs: dict[int, PretrainedConfig] = {}
    plain = _without_bridges(hooked, configs)
    fused = bool(getattr(hooked, "_supports_sdpa", False))
    for config in configs.values():
        # Fused attention does not compute soft caps.
        if fused and getattr(config, "attn_logit_softcapping", None) is None:
            config._attn_implementation = "sdpa"
    weights = {id(weight) for weight in plain.parameters()}
    weights |= {id(weight) for part in hooked.modules() for weight in _split(part)}
    return plain if all(id(weight) in weights for weight in model.parameters()) else None


def logits_of(
    plain: torch.nn.Module,
    tokens: Int[Tensor, "batch query"],
    at_row: Int[Tensor, " read"],
    at_position: Int[Tensor, " read"],
    **forward: Any,
) -> Float[Tensor, "read vocab"]:
    """Return the logits of a plain model at given positions; no others are unembedded.

    See also `hijacklens.probe.logits_at`.
    """

    def select(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][at_row, at_position][None]

    unembedding: Any = plain.get_output_embeddings()  # type: ignore[operator]
    handle = unembedding.register_forward_pre_hook(select)
    try:
        with torch.inference_mode():
            return plain(input_ids=tokens, use_cache=False, **forward).logits[0]
    finally:
        handle.remove()


def _without_bridges(
    module: torch.nn.Module, configs: dict[int, PretrainedConfig]
) -> torch.nn.Module:
    """Copy a tree of modules and its configs, sharing the weights and leaving out the hooks."""
    while isinstance(module, GeneralizedComponent):
        module = module.original_component  # type: ignore[assignment]
    plain = copy.copy(module)
    plain._modules = {
        name: None if child is None else _without_bridges(child, configs)
        for name, child in module._modules.items()
    }
    plain._forward_hooks, plain._forward_pre_hooks = OrderedDict(), OrderedDict()
    config = vars(plain).get("config")
    if isinstance(config, PretrainedConfig):
        if id(config) not in configs:
            configs[id(config)] = copy.deepcopy(config)
        plain.config = configs[id(config)]  # type: ignore[assignment]
    return plain


def _split(part: torch.nn.Module) -> list[Tensor]:
    """Return the weights that TransformerLens split off a joint matrix of the plain model.

    Return none if they were changed afterwards, since the plain model does not have the change.
    """
    split = getattr(part, "split_qkv_matrix", None)
    if split is None:
        return []
    with torch.device("meta"):  # a new layer draws random weights, which are not needed
        layers = split(part.original_component)
    pairs = [
        (fresh, used)
        for layer, name in zip(layers, ("q", "k", "v"), strict=True)
        for fresh, used in zip(
            layer.parameters(), getattr(part, name).original_component.parameters(), strict=True
        )
    ]
    same = all(fresh.device == used.device and torch.equal(fresh, used) for fresh, used in pairs)
    return [used for _, used in pairs] if same else []
