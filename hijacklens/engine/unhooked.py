"""A hooked model without its hooks: the same weights in the modules that transformers has for it.

Where nothing is pointed at a model, its hook points only cost: about two per cent of a forward
pass on a CPU, and as much again because attention scores with a hook have to be written out, so
that none of the fused kernels can be used. `unhooked` takes the modules of TransformerLens away
from around those of Hugging Face. Rows, masks, positions and caches stay the same, and so do the
numbers (contract 1). The hooked model is not touched: modules are copied, weights are shared.
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
    """The plain model under a hooked one, or None where that might compute something else.

    It is None with hooks on the model, in compatibility mode (weights are folded), and where the
    hooked model computes with weights that the plain one does not have, changed ones for example.

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
    for config in configs.values():
        if _takes_fused(hooked, config):
            config._attn_implementation = "sdpa"
    own = {id(weight) for weight in plain.parameters()}
    own |= {id(weight) for part in hooked.modules() for weight in _split(part)}
    return plain if all(id(weight) in own for weight in model.parameters()) else None


def logits_of(
    plain: torch.nn.Module,
    tokens: Int[Tensor, "batch query"],
    at_row: Int[Tensor, " read"],
    at_position: Int[Tensor, " read"],
    **forward: Any,
) -> Float[Tensor, "read vocab"]:
    """Logits of a plain model at chosen places; only those are unembedded (cf. `logits_at`)."""

    def keep_read(module: torch.nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        return given[0][at_row, at_position][None]

    unembedding: Any = plain.get_output_embeddings()  # type: ignore[operator]
    handle = unembedding.register_forward_pre_hook(keep_read)
    try:
        with torch.inference_mode():
            return plain(input_ids=tokens, use_cache=False, **forward).logits[0]
    finally:
        handle.remove()


def _without_bridges(
    module: torch.nn.Module, configs: dict[int, PretrainedConfig]
) -> torch.nn.Module:
    """A copy of a tree of modules, with weights shared, hooks left behind and configs copied."""
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


def _takes_fused(hooked: Any, config: PretrainedConfig) -> bool:
    """Whether fused attention computes all that a model's own does."""
    softcap = getattr(config, "attn_logit_softcapping", None)
    return bool(getattr(hooked, "_supports_sdpa", False)) and softcap is None


def _split(part: torch.nn.Module) -> list[Tensor]:
    """The weights that TransformerLens split off a joint matrix of the plain model.

    None of them where they were changed after that, as the plain model would not know of it.
    """
    split = getattr(part, "split_qkv_matrix", None)
    if split is None:
        return []
    with torch.device("meta"):  # for the weights that a new layer draws at random, then drops
        made = split(part.original_component)
    pairs = [
        (fresh, used)
        for layer, name in zip(made, ("q", "k", "v"), strict=True)
        for fresh, used in zip(
            layer.parameters(), getattr(part, name).original_component.parameters(), strict=True
        )
    ]
    same = all(fresh.device == used.device and torch.equal(fresh, used) for fresh, used in pairs)
    return [used for _, used in pairs] if same else []
