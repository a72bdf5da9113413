"""What must be the same after a probe: weights to the bit, and every hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def state(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks_on(model: Any) -> int:
    """Hooks of TransformerLens and of torch, over all modules."""
    lens = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())
    return lens + sum(
        len(module._forward_hooks) + len(module._backward_hooks) + len(module._forward_pre_hooks)
        for module in model.modules()
    )


@contextmanager
def left_as_it_was(model: Any, ids: Tensor) -> Iterator[None]:
    """Check that the body leaves weights, hooks and logits bit for bit as they were."""
    with torch.no_grad():  # the first run puts on hooks of transformers and TransformerLens
        model.run_with_cache(ids)
        before, count, out = state(model), hooks_on(model), model(ids)
    yield
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hooks_on(model) == count
    with torch.no_grad():
        assert torch.equal(model(ids), out)
