"""Hooks on scores and patterns of attention that TransformerLens leaves to transformers.

TransformerLens rebuilds the attention of most families, so that hooks on scores and patterns can
change them. In the others (GPT-Neo, GPT-J, OPT, Llama 4, Gemma 4, ...) it calls the module of
transformers and shows its weights afterwards. Eager attention of transformers is a softmax of
scores in each of these modules, so there the hooks act on the argument and on the result of it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import AttentionBridge

SOFTMAXES = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)
NAME = re.compile(r"blocks\.(\d+)\.attn\.hook_(attn_scores|pattern)")

Edit: TypeAlias = tuple[HookPoint, Callable[..., Any]]


def delegated_attention(model: Any, name: str) -> AttentionBridge | None:
    """Return the attention whose scores or pattern a hook is on, if transformers computes it."""
    match = NAME.fullmatch(name)
    if match is None or not hasattr(model, "blocks"):
        return None
    attention = getattr(model.blocks[int(match[1])], "attn", None)
    whole = isinstance(attention, AttentionBridge)
    return attention if whole and type(attention).forward is AttentionBridge.forward else None


@contextmanager
def edited(
    points: Mapping[str, HookPoint],
    hooks: Sequence[tuple[str, Callable[..., Any], AttentionBridge]],
) -> Iterator[None]:
    """Run the body with hooks on the scores and patterns of delegated attention.

    Args:
        points: The hook points of the model.
        hooks: Name, function and attention of each hook; they act in this order.
    """
    edits: dict[AttentionBridge, dict[str, list[Edit]]] = defaultdict(lambda: defaultdict(list))
    for name, function, attention in hooks:
        edits[attention][name.rsplit("_", 1)[-1]].append((points[name], function))
    if not edits:
        yield
        return
    mode, handles = _Softmax(), []
    try:
        for attention, of_layer in edits.items():
            module: Any = attention.original_component
            handles += [
                module.register_forward_pre_hook(mode.entering(of_layer), with_kwargs=True),
                module.register_forward_hook(mode.leave, always_call=True),
            ]
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Softmax(TorchFunctionMode):
    """Passes scores and weights of the attention that runs through its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.edits: Mapping[str, Sequence[Edit]] = {}
        self.rows = 0

    def entering(self, edits: Mapping[str, Sequence[Edit]]) -> Callable[..., None]:
        """Return a hook before the attention whose edits these are."""

        def enter(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.edits, self.rows = edits, len(hidden)

        return enter

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """End the attention."""
        self.edits = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # A softmax over a matrix is that of a router (JetMoE).
        if func not in SOFTMAXES or not self.edits or args[0].dim() < 3:
            return func(*args, **kwargs)
        edits, self.edits = self.edits, {}
        scores, *others = args
        shape = scores.shape
        if scores.dim() == 3:  # XGLM puts rows and heads into one axis
            scores = scores.unflatten(0, (self.rows, -1))
        scores = _through(edits.get("scores", ()), scores).reshape(shape)
        weights = func(scores, *others, **kwargs)
        if len(shape) == 3:
            weights = weights.unflatten(0, (self.rows, -1))
        return _through(edits.get("pattern", ()), weights).reshape(shape)


def _through(edits: Sequence[Edit], value: Tensor) -> Tensor:
    for point, function in edits:
        new = function(value, hook=point)
        value = value if new is None else new
    return value
