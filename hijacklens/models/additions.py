"""What users put on a model: hooks, replaced methods, and their own functions of attention."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformer_lens.hook_points import HookPoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hijacklens.models.exclusive import held
from hijacklens.models.python_code import is_of_library

ATTENTION = "_hijacklens_attention"
"""Attribute of a plain model: the implementation of attention before it got hook points."""


def hooks_on(model: Any) -> tuple[str, ...]:
    """Return the hooks that the user has put on a model, one phrase each."""
    with held(model):  # the hooks of another thread's probes are not the user's
        return tuple(
            f"a {kind} ({_name(hook)}) {where}"
            for where, module in _places(model)
            for kind, hook in users_hooks(module)
        )


def users_hooks(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over the hooks that the user has put on one module or hook point, with their kind."""
    if isinstance(module, HookPoint):
        for handle in module.fwd_hooks:
            hook = getattr(handle, "user_hook", None)
            if not (handle.is_permanent and is_of_library(hook)):
                yield "hook", hook
    for kind in ("forward_hook", "forward_pre_hook"):
        for hook in getattr(module, f"_{kind}s").values():
            if not is_of_library(hook):
                yield kind, hook


def hooks_on_all_modules() -> list[str]:
    """Return the hooks that the user has put on all modules of torch, one phrase each."""
    everywhere = torch.nn.modules.module
    hooks = (
        *everywhere._global_forward_hooks.values(),
        *everywhere._global_forward_pre_hooks.values(),
    )
    return [
        f"a hook ({_name(hook)}) on all modules of torch"
        for hook in hooks
        if not is_of_library(hook)
    ]


def replaced_methods(model: Any) -> Iterator[str]:
    """Iterate over the methods that were replaced on one module, one phrase each."""
    for where, module in _places(model):
        for attribute, value in () if isinstance(module, HookPoint) else vars(module).items():
            if (
                isinstance(value, (types.FunctionType, types.MethodType, partial))
                and callable(getattr(type(module), attribute, None))
                and not is_of_library(value)
                and "_hf_hook" not in vars(module)
            ):
                yield f"the replaced method {attribute} ({_name(value)}) {where}"


def _places(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Iterate over all modules of a model, its wrappers included, with where they are."""
    yield "on the model", model
    for path, module in getattr(model, "original_model", model).named_modules():
        parts = [part for part in path.split(".") if part != "_original_component"]
        name = module.name if isinstance(module, HookPoint) else ".".join(parts)
        yield (f"on {name}" if name else "on the model"), module


def is_own(function: Any) -> bool:
    """Return whether a function is the user's."""
    while isinstance(function, partial):
        function = function.func
    return function is not None and not is_of_library(function)


def attention_of(model: Any) -> str | None:
    """Return the implementation of attention in the plain model; hooked modules are eager."""
    plain = getattr(model, "original_model", model)
    name = getattr(getattr(plain, "config", None), "_attn_implementation", None)
    return getattr(plain, ATTENTION, name) if name == "eager" else name


def own_attention(model: Any) -> Any:
    """Return the user's function that computes attention in the plain model, or None."""
    function = ALL_ATTENTION_FUNCTIONS.get(attention_of(model) or "")
    return function if is_own(function) else None


def _name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))
