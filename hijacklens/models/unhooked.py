"""A hooked model without its hooks: the same weights in the modules of transformers.

Hook points cost about two per cent of a forward pass on a CPU, and as much again because attention
scores with a hook must be stored, which rules out fused kernels. `unhooked` removes the modules
that TransformerLens puts around those of Hugging Face and keeps everything else, such as adapters
and the user's own hooks. The hooked model is not touched: modules are copied, weights are shared.
`hijacklens.models.verification` checks that the numbers are those of the plain model.

With probes, the hooked model runs, and `PlainBlocks` removes hook points only in the layers that no
hook acts on.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PretrainedConfig

from hijacklens.models.additions import ATTENTION, users_hooks
from hijacklens.models.exclusive import held
from hijacklens.models.hooked import HookedModel
from hijacklens.models.python_code import is_of_library, package_of

_WRAPPERS = (TransformerBridge, GeneralizedComponent)
_REMOVED = "_hijacklens_removed"
"""Attribute of a module with hook points that was taken off its model."""
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.")


def unhooked(model: HookedModel, attention: str | None = None) -> torch.nn.Module | None:
    """Return the plain model under a hooked one, or None if it might compute something else.

    It is None with hooks on the hook points, in compatibility mode (weights are folded), and for a
    model that is spread over several devices.

    Args:
        model: A hooked model.
        attention: The implementation of attention, such as `sdpa`; by default that of the model.

    Note:
        Costs a copy of every module without its weights, some 20 ms.
    """
    if not isinstance(model, TransformerBridge) or model.compatibility_mode:
        return None
    hooked: Any = model.original_model
    left_out = (part for part in model.modules() if isinstance(part, (HookPoint, *_WRAPPERS)))
    if getattr(hooked, "hf_device_map", None) or any(any(users_hooks(part)) for part in left_out):
        return None
    configs: dict[int, PretrainedConfig] = {}
    plain = _without_bridges(hooked, configs)
    for config in configs.values() if attention else ():
        config._attn_implementation = attention
    return plain


def remove_hook_points(plain: torch.nn.Module) -> None:
    """Take the hook points of TransformerLens off a plain model, and give it its attention again.

    A hooked model over it is of no use then (`has_lost_hook_points`).
    """
    removed = False
    for module in list(plain.modules()):
        if isinstance(module, GeneralizedComponent):
            vars(module)[_REMOVED] = removed = True
            continue
        module._modules |= {name: _original(child) for name, child in module._modules.items()}
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for i in [i for i, hook in hooks.items() if package_of(hook) == "transformer_lens"]:
                del hooks[i]
    if removed and (attention := getattr(plain, ATTENTION, None)):
        plain.set_attn_implementation(attention)  # type: ignore[operator]


def has_lost_hook_points(model: HookedModel) -> bool:
    """Return whether the Hugging Face model under a hooked model was loaded again."""
    return isinstance(model, TransformerBridge) and any(
        _REMOVED in vars(module) for module in model.modules()
    )


@dataclass(frozen=True, slots=True)
class PlainBlocks:
    """The plain modules that can replace the blocks of a hooked model, layer by layer."""

    places: tuple[tuple[dict[str, torch.nn.Module | None], str, torch.nn.Module], ...] = ()
    """For each layer the children of the module that holds its block, the name of the block among
    them, and the plain block."""

    @classmethod
    def of(cls, model: HookedModel, attention: str | None) -> PlainBlocks:
        """Copy the blocks of a hooked model; none if the copies might compute something else.

        Args:
            model: A hooked model.
            attention: As for `unhooked`, which is what this costs.
        """
        with held(model):  # while another thread runs it, the blocks are not in their places
            plain = unhooked(model, attention)
            whole: Any = getattr(model, "original_model", None)
            blocks = getattr(model, "blocks", ())
            paths = {} if plain is None else {x: path for path, x in whole.named_modules()}
            if plain is None or not all(block in paths for block in blocks):
                return NO_PLAIN_BLOCKS
            places = []
            for block in blocks:
                above, _, name = paths[block].rpartition(".")
                below = plain.get_submodule(paths[block].replace("_original_component.", ""))
                places.append((whole.get_submodule(above)._modules, name, below))
            return cls(tuple(places))

    @contextmanager
    def where_no_hook_acts(self, names: Iterable[str]) -> Iterator[None]:
        """Run the body with plain blocks in all layers but those of the named hooks."""
        hooked = {int(match[1]) for name in names if (match := _IN_BLOCK.match(name))}
        idle = [place for layer, place in enumerate(self.places) if layer not in hooked]
        if not idle:
            yield
            return
        before = [children[name] for children, name, _ in idle]
        try:
            for children, name, plain in idle:
                children[name] = plain
            with _no_cudnn_attention():
                yield
        finally:
            for (children, name, _), block in zip(idle, before, strict=True):
                children[name] = block


NO_PLAIN_BLOCKS = PlainBlocks()
"""With these every layer keeps its hook points."""


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
        with torch.inference_mode(), _no_cudnn_attention():
            return plain(input_ids=tokens, use_cache=False, **forward).logits[0]
    finally:
        handle.remove()


@contextmanager
def _no_cudnn_attention() -> Iterator[None]:
    """Leave out the attention of cuDNN, which prepares itself anew for every shape of a batch.

    On an H200 that took 60 ms a shape, and more than the rest of a run of GPT-2 in bfloat16.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _without_bridges(
    module: torch.nn.Module, configs: dict[int, PretrainedConfig]
) -> torch.nn.Module:
    """Copy a tree of modules and its configs, sharing the weights and leaving out hook points."""
    module = _original(module)
    # Not copy.copy, which refuses parametrised modules.
    plain = type(module).__new__(type(module))
    vars(plain).update(vars(module))
    # What module.compile() left runs the original module, without the hooks of the copy.
    vars(plain).pop("_compiled_call_impl", None)
    plain._modules = {
        name: None if child is None else _without_bridges(child, configs)
        for name, child in module._modules.items()
    }
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = vars(module)[kind].items()
        vars(plain)[kind] = OrderedDict((i, hook) for i, hook in hooks if not is_of_library(hook))
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:  # a replaced method
            vars(plain)[name] = MethodType(value.__func__, plain)
    config = vars(plain).get("config")
    if isinstance(config, PretrainedConfig):
        if id(config) not in configs:
            configs[id(config)] = copy.deepcopy(config)
        plain.config = configs[id(config)]  # type: ignore[assignment]
    return plain


def _original(module: Any) -> Any:
    """Return the module of transformers in a module of TransformerLens."""
    while isinstance(module, GeneralizedComponent):
        module = module.original_component
    return module
