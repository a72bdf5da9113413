"""What a model computes: everything that its forward pass depends on, except the values of tensors.

`computation_of` walks the modules of the plain model, below the wrappers of TransformerLens. Its
digest covers the class of every module with the code of its methods and of the functions that they
call, the names of children, `training`, and every attribute that is a number, text, function,
configuration or container of these. Two models with equal digests and equal tensors compute the
same. The digest does not depend on names, on `requires_grad`, on the device, or on what a forward
pass stores. For code from no installed package it also covers the values that the code refers to:
globals, defaults, class attributes, captured variables, and what it uses of other such modules.

Some changes have no key, because a function may depend on anything: hooks and replaced methods.
They are listed in `Computation.unkeyed`. Hooks that TransformerLens, transformers and accelerate
install themselves are not listed.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PreTrainedTokenizerBase
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hijacklens.models.additions import (
    ATTENTION,
    hooks_on,
    hooks_on_all_modules,
    is_own,
    own_attention,
    replaced_methods,
)
from hijacklens.models.exclusive import held
from hijacklens.models.python_code import (
    Described,
    captured,
    code_digest,
    digest_of,
    is_installed,
    is_written,
    module_name,
    names_in,
)

FRAMEWORK = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation")
FRAMEWORK += ("transformers.utils", "transformers.integrations")
"""Modules with large base classes, of which only the calls are hashed."""

CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")

UNUSED = {
    ATTENTION,  # it is described by its function
    *("_commit_hash", "_name_or_path", "name_or_path", "base_model_name_or_path", "revision"),
    *("model_name", "tokenizer_name", "tokenizer", "_tokenizer", "transformers_version"),
    *("architectures", "device", "dtype", "torch_dtype", "use_cache", "n_params", "seed"),
    *("generation_config", "loss_type", "_loss_function", "gradient_checkpointing"),
    *("_is_hf_initialized", "_hf_peft_config_loaded", "_output_capturing_hooks_installed"),
    *("all_tied_weights_keys", "_no_split_modules", "_skip_keys_device_placement"),
    *("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan", "_tp_size", "_device_mesh"),
    *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_save"),
    *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"),
    *("hf_device_map", "_hf_hook", "_old_forward", "warnings_issued", "_compiled_call_impl"),
}
"""Attributes and settings that do not change logits."""

CACHED = ("_cached", "long_inv_freq")
"""Endings of the names of attributes that a forward pass fills."""
STATES = ("_state", "_states")
"""The same, in modules of installed packages."""
USED = {"dtype", "torch_dtype", "seed"}
"""Attributes that other modules may compute with, although they are in `UNUSED`."""

STATELESS = (
    *(weakref.ref, logging.Logger, logging.LoggerAdapter, types.ModuleType),
    *(type(threading.Lock()), type(threading.RLock()), PreTrainedTokenizerBase),
    *(types.MemberDescriptorType, types.GetSetDescriptorType),
)
"""Types of attributes that no logit depends on."""

_MODULE_FIELDS = set(vars(torch.nn.Module())) - {"training"}


@dataclass(frozen=True, slots=True)
class Computation:
    """What a model computes with its tensors."""

    digest: str
    """SHA-256, equal before and after a forward pass, for two loads, and under another name."""
    unkeyed: tuple[str, ...]
    """What the digest cannot cover, one phrase each, such as `a forward hook (f) on model.norm`."""


def computation_of(model: Any) -> Computation:
    """Return what a model computes, apart from the values of its tensors.

    Args:
        model: A hooked model, or the plain model before it is wrapped.

    Note:
        Costs some 40 ms for 30 layers; no tensor is read.
    """
    with held(model):
        walk = _walk(model)
    text = json.dumps(walk.lines, sort_keys=True)
    return Computation(hashlib.sha256(text.encode()).hexdigest(), tuple(sorted(walk.unkeyed)))


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Return every tensor that a forward pass reads, by name.

    These are parameters, buffers (also those that are not saved), tensors that are plain
    attributes, and copies that TransformerLens computes with. A rotary frequency that the model
    replaces by the length of its input is given as it is for short inputs.
    """
    with held(model):  # a run with probes replaces some modules meanwhile
        return _walk(model, code=False).tensors


@dataclass(slots=True)
class _Walk:
    """What has been found so far."""

    code: bool = True
    """Whether to describe classes and functions, too; they hold no tensors."""
    lines: list[Described] = field(default_factory=list)
    unkeyed: set[str] = field(default_factory=set)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    known: dict[Any, tuple[Any, Described]] = field(default_factory=dict)
    """Id of an object -> the object, kept alive, and its description."""
    by_value: bool = False
    """Whether code refers to what is described: then tensors are described by their values, and
    every name counts."""

    def describe(self, value: Any, where: str) -> Described:
        """Describe the value of an attribute; note what has no key."""
        if value is None or isinstance(value, (bool, int, float, str)):
            # A subclass, such as an Enum, equals its plain value.
            return value.value if isinstance(value, enum.Enum) else value
        if isinstance(value, Tensor):
            return self.tensor(value, where)
        if isinstance(value, (np.ndarray, np.generic)):
            return [str(value.dtype), value.shape, value.tobytes().hex()]
        if isinstance(value, (list, tuple, Mapping)):
            if self.by_value:
                return self.once(value, lambda: self.items(value, where))
            return self.items(value, where)
        if isinstance(value, Set):
            return sorted(str(item) for item in value)
        if isinstance(value, (torch.dtype, torch.device, complex, bytes, range, slice, enum.Enum)):
            return None if isinstance(value, torch.device) else repr(value)
        if isinstance(value, STATELESS):
            return None
        return self.once(value, lambda: self._describe_object(value, where))

    def once(self, value: Any, describe: Callable[[], Described], key: Any = None) -> Described:
        """Describe an object when it is first met."""
        key = id(value) if key is None else key
        if key not in self.known:
            self.known[key] = (value, "itself")  # ends a cycle
            self.known[key] = (value, describe())
        return self.known[key][1]

    def items(self, value: Any, where: str) -> Described:
        """Describe what a container holds."""
        if isinstance(value, Mapping):
            return self.fields({str(key): item for key, item in value.items()}, where)
        return [self.describe(item, f"{where}[{i}]") for i, item in enumerate(value)]

    def tensor(self, value: Tensor, where: str) -> Described:
        """Note a tensor, or the parts of one that is packed; describe what is attached to it."""
        if value.device.type == "meta":
            self.unkeyed.add(f"the weights {where}, which are not in memory")
        elif flatten := getattr(value, "__tensor_flatten__", None):
            names, context = flatten()
            parts = {name: self.describe(getattr(value, name), f"{where}.{name}") for name in names}
            return [parts, self.describe(context, f"{where}.context")]
        elif self.by_value:
            octets = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return [str(value.dtype), value.shape, hashlib.sha256(octets.tobytes()).hexdigest()]
        else:
            self.tensors[where] = value
        return self.fields(vars(value), where)

    def fields(
        self, values: Mapping[str, Any], where: str, used: Set[str] = frozenset()
    ) -> dict[str, Described]:
        """Describe attributes or the items of a mapping, without those that are not used."""
        return {
            name: self.describe(value, f"{where}.{name}" if where else name)
            for name, value in values.items()
            if self.by_value or name in used or name not in UNUSED
        }

    def reference(self, value: Any, names: Sequence[str], where: str) -> Described:
        """Describe what code from no installed package refers to.

        Args:
            value: The value of a name.
            names: The names that the code looks up, also in modules.
            where: What it is called if it has no description.
        """
        if isinstance(value, types.ModuleType):
            if is_installed(value.__name__):
                return None
            used = [name for name in names if name in vars(value)]
            return self.once(
                value,
                lambda: [self.reference(getattr(value, x), names, f"{where}.{x}") for x in used],
                key=(id(value), names),
            )
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, (type, types.FunctionType)) and is_installed(value.__module__):
            return [value.__module__, value.__qualname__]
        before, self.by_value = self.by_value, True
        try:
            return self.describe(value.fget if isinstance(value, property) else value, where)
        finally:
            self.by_value = before

    def _describe_object(self, value: Any, where: str) -> Described:
        if isinstance(value, torch.nn.Module):
            self.module(value, where)
            return f"module {where}"
        if isinstance(value, type):
            return self.kind(value)
        if isinstance(value, partial):
            return ["partial", *(self.describe(part, where) for part in value.__reduce__()[2][:3])]
        if isinstance(value, types.MethodType):
            return [self.describe(value.__func__, where), self.describe(value.__self__, where)]
        if isinstance(value, types.FunctionType):
            held_there = {
                name: self.describe(cell, f"{where}.{name}") for name, cell in captured(value)
            }
            return [self.function(value), held_there]
        attributes = _attributes(value)
        if isinstance(value, types.BuiltinFunctionType) or (
            not attributes and is_installed(type(value).__module__)
        ):
            if not callable(value) and not hasattr(value, "__dict__"):
                self.unkeyed.add(f"the attribute {where}, a {type(value).__name__}")
            return [value.__module__, getattr(value, "__qualname__", type(value).__qualname__)]
        to_dict = getattr(value, "to_dict", None)
        settings = to_dict() if to_dict else attributes
        chosen = {name: getattr(value, name) for name in _IMPLEMENTATIONS if hasattr(value, name)}
        return [self.kind(type(value)), self.fields({**settings, **chosen}, where)]

    def kind(self, cls: type) -> Described:
        """Describe a class: its name, and its methods and settings with those of its bases."""
        if not self.code:
            return None
        key = ("code", id(cls))  # the object may be described as a value, too
        if key not in self.known:
            self.known[key] = (cls, cls.__qualname__)
            parts: list[Described] = []
            for base in cls.__mro__[:-1]:
                module = base.__module__
                names = CALLS if module.startswith(FRAMEWORK) else tuple(vars(base))
                own = {name: vars(base)[name] for name in names if name in vars(base)}
                if is_installed(module):
                    described = {name: self.member(value) for name, value in own.items()}
                else:
                    described = {
                        name: self.reference(value, (), f"{base.__qualname__}.{name}")
                        for name, value in own.items()
                        if name not in UNUSED - USED and is_written(name, value)
                    }
                kept = {name: value for name, value in described.items() if value is not None}
                parts.append([module_name(base), base.__qualname__, kept])
            self.known[key] = (cls, digest_of(parts))
        return self.known[key][1]

    def member(self, value: Any) -> Described:
        """Describe a function or number that a class or a function refers to, or return None."""
        if isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        while not isinstance(value, types.FunctionType) and hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        return self.function(value) if isinstance(value, types.FunctionType) else None

    def function(self, function: types.FunctionType) -> Described:
        """Describe a function by its code and the functions that it calls or has captured."""
        if not self.code:
            return None
        key = ("code", id(function))
        if key not in self.known:
            self.known[key] = (function, function.__qualname__)
            package = function.__module__.partition(".")[0] if function.__module__ else ""
            called: dict[str, Described] = {}
            names, here = names_in(function.__code__), function.__qualname__
            known, own = function.__globals__, not is_installed(function.__module__)
            for name in names:
                other = known.get(name, sys.modules.get(name))
                if own and (name in known or name in sys.modules):
                    called[name] = self.reference(other, names, f"{here}: {name}")
                # The functions of torch are the same in every model.
                elif isinstance(other, types.FunctionType):
                    torch_own = str(other.__module__).startswith("torch.") and package != "torch"
                    called[name] = other.__qualname__ if torch_own else self.function(other)
            inside = {
                name: self.reference(value, names, f"{here}: {name}") if own else self.member(value)
                for name, value in captured(function)
            }
            defaults: list[Described] = [
                self.reference(value, names, f"{here}: a default")
                if own
                else repr(value)
                if isinstance(value, (bool, int, float, str))
                else None
                for value in (
                    *(function.__defaults__ or ()),
                    *(function.__kwdefaults__ or {}).values(),
                )
            ]
            code = code_digest(function.__code__)
            self.known[key] = (function, digest_of([code, called, inside, defaults]))
        return self.known[key][1]

    def module(self, module: torch.nn.Module, path: str) -> None:
        """Describe a module and its children."""
        while isinstance(module, GeneralizedComponent) and module.original_component is not None:
            module = module.original_component
        if isinstance(module, HookPoint):
            return
        if id(module) in self.known and self.known[id(module)][1] != "itself":
            self.lines.append([path, self.known[id(module)][1]])  # shared with another parent
            return
        self.known[id(module)] = (module, f"module {path}")
        passing, tensors = _passing_state(module), {**module._parameters, **module._buffers}
        self.known |= {id(tensor): (tensor, "tensor") for tensor in tensors.values()}
        own = {name: value for name, value in vars(module).items() if name not in _MODULE_FIELDS}
        if "_hf_hook" in own:  # of accelerate, which replaces `forward` to move tensors
            own.pop("forward", None)
        installed = is_installed(type(module).__module__)
        filled = (*CACHED, *STATES) if installed else CACHED
        own = {
            name: value
            for name, value in own.items()
            if not name.endswith(filled)
            and not isinstance(getattr(type(module), name, None), cached_property)
        }
        own |= {name: passing.get(name, tensor) for name, tensor in tensors.items()}
        used = frozenset() if installed else USED
        self.lines.append([path, self.kind(type(module)), self.fields(own, path, used)])
        prefix = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                self.module(child, prefix + name)


_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
"""Settings of a configuration that `to_dict` leaves out."""


def _walk(model: Any, *, code: bool = True) -> _Walk:
    walk = _Walk(code)
    plain = getattr(model, "original_model", model)
    walk.module(plain, "")
    for name in ("sdpa", "eager"):  # the attention of the plain modules, and of the hooked ones
        walk.lines.append([name, walk.member(ALL_ATTENTION_FUNCTIONS.get(name))])
        if is_own(mask := ALL_MASK_ATTENTION_FUNCTIONS.get(name)):
            walk.lines.append(["mask", name, walk.describe(mask, f"the mask function {name}")])
    if own := own_attention(model):
        walk.lines.append(["attention", walk.describe(own, "the attention function")])
    if plain is not model:
        walk.lines.append(walk.fields({"cfg": vars(model.cfg)}, "bridge"))
        walk.lines.append(getattr(model, "compatibility_mode", None))
        for path, module in plain.named_modules():  # parts that TransformerLens has split off
            if id(module) not in walk.known and not isinstance(
                module, (GeneralizedComponent, HookPoint)
            ):
                walk.module(module, f"bridge.{path}")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) not in walk.known:
                walk.tensors[f"bridge.{name}"] = tensor
    walk.unkeyed.update(hooks_on(model), hooks_on_all_modules(), replaced_methods(model))
    return walk


def _passing_state(module: torch.nn.Module) -> dict[str, Any]:
    """Return the frequencies that a rotary embedding replaces in a forward pass, for short inputs.

    With dynamic scaling and longrope they depend on the longest input so far.
    """
    kinds: Any = getattr(module, "rope_type", "")
    kinds = kinds if isinstance(kinds, Mapping) else {"": kinds}
    state: dict[str, Any] = {}
    for layers, kind in kinds.items():
        prefix = f"{layers}_" if layers else ""
        longest: Any = getattr(module, "original_max_seq_len", None)
        cached = getattr(module, f"{prefix}max_seq_len_cached", longest)
        if kind == "longrope" or ("dynamic" in str(kind) and cached != longest):
            state[f"{prefix}inv_freq"] = getattr(module, f"{prefix}original_inv_freq")
    return state


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, also of one with `__slots__`."""
    slots = (name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ()))
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**held, **getattr(value, "__dict__", {})}
