"""Plain Hugging Face forward passes whose attention is changed by additive 4-D masks alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

HIDDEN = torch.finfo(torch.float32).min


def layer_kinds(plain: Any) -> list[str]:
    """For each layer `full_attention` or `sliding_attention`."""
    config = plain.config
    kinds = getattr(config, "layer_types", None)
    return list(kinds) if kinds else ["full_attention"] * config.num_hidden_layers


def visible(plain: Any, length: int, kind: str) -> Tensor:
    """Which keys a query sees in a kind of layer, [query, key]."""
    place = torch.arange(length)
    distance = place[:, None] - place[None, :]
    seen = distance >= 0
    return seen & (distance < plain.config.sliding_window) if kind.startswith("sl") else seen


def everywhere_masked(plain: Any, ids: list[int], removed: Tensor) -> Tensor:
    """Logits [pos, vocab] with pairs [query, key] removed in all layers, by the model's own API."""

    def masked(kind: str) -> Tensor:
        seen = visible(plain, len(ids), kind) & ~removed
        return torch.zeros(seen.shape).masked_fill(~seen, HIDDEN)[None, None]

    kinds = ("full_attention", "sliding_attention")
    windowed = kinds[1] in layer_kinds(plain)
    mask = {kind: masked(kind) for kind in kinds} if windowed else masked(kinds[0])
    at = torch.arange(len(ids))[None]  # OPT would count positions by its mask
    with torch.no_grad():
        return plain(torch.tensor([ids]), attention_mask=mask, position_ids=at).logits[0]


def added(plain: Any, ids: list[int], bias: Mapping[int, Tensor]) -> Tensor:
    """Logits [pos, vocab] with a bias [head, query, key] on the scores of some layers."""
    gpt2 = plain.config.model_type == "gpt2"
    layers = plain.transformer.h if gpt2 else plain.model.layers
    with ExitStack() as stack, torch.no_grad():
        for i, values in bias.items():
            seen = visible(plain, len(ids), layer_kinds(plain)[i])
            mask = values.clamp(min=HIDDEN).masked_fill(~seen, HIDDEN)[None]

            def give(module: Any, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
                return args, {**kwargs, "attention_mask": mask}

            attention = layers[i].attn if gpt2 else layers[i].self_attn
            handle = attention.register_forward_pre_hook(give, with_kwargs=True)
            stack.callback(handle.remove)
        return plain(torch.tensor([ids])).logits[0]
