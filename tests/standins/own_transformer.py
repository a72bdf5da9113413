"""A small HookedTransformer, as users of TransformerLens 3 bring their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def own_transformer(**settings: Any) -> Any:
    """Return one with random weights in evaluation mode; skip under TransformerLens 4."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("HookedTransformer was removed in TransformerLens 4.0")
    shape = {"n_layers": 2, "d_model": 16, "n_ctx": 96, "d_head": 8, "n_heads": 4, "d_mlp": 24}
    options = {**shape, "act_fn": "gelu", "d_vocab": 40, **settings}
    model = HookedTransformer(HookedTransformerConfig(**options, seed=0, device="cpu"))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model.eval()
