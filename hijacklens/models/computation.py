"""What a model computes: everything that its forward pass depends on, except the values of tensors.

`computation_of` walks the modules of the plain model, below the wrappers of TransformerLens. Its
digest covers the class of every module with the code of its methods and of the functions that they
call, the names of children, `training`, and every attribute that is a number, text, function,
configuration or container of these. Two models with equal digests and equal tensors compute the
same. The digest does not depend on names, on `requires_grad`, on the device, or on what a forward
pass leaves behind.

Some changes have no key, because a function may depend on anything: hooks and replaced methods.
They are listed in `Computation.unkeyed`. Hooks that TransformerLens, transformers and accelerate
install themselves are not listed.
"""

from __future__ import annotations

import enum
import hashlib
import json
import logging
import threading
import types
import weakref
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PreTrainedTokenizerBase
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hijacklens.models.exclusive import held

Described: TypeAlias = Any
"""A value that JSON can write, the same in every process."""

LIBRARIES = {"hijacklens", "transformer_lens", "transformers", "accelerate"}
"""Packages whose own hooks do not change what a model computes."""

FRAMEWORK = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation")
FRAMEWORK += ("transformers.utils", "transformers.integrations")
"""Modules with large base classes, of which only the calls are hashed."""

CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")

ATTENTION = "_hijacklens_attention"
"""Attribute of a plain model: the implementation of attention before it got hook points."""

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

CACHED = ("_cached", "long_inv_freq", "_state", "_states")
"""Endings of the names of attributes that a forward pass fills."""

STATELESS = (
    *(weakref.ref, logging.Logger, logging.LoggerAdapter, types.ModuleType),
    *(type(threading.Lock()), type(threading.RLock()), PreTrainedTokenizerBase),
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
    known: dict[int, tuple[Any, Described]] = field(default_factory=dict)
    """Id of an object -> the object, kept alive, and its description."""

    def describe(self, value: Any, where: str) -> Described:
        """Describe the value of an attribute; note what has no key."""
        if value is None or isinstance(value, (bool, int, float, str)):
            # A subclass, such as an Enum, equals its plain value.
            return value.value if isinstance(value, enum.Enum) else value
        if isinstance(value, Tensor):
            return self.tensor(value, where)
        if isinstance(value, (np.ndarray, np.generic)):
            return [str(value.dtype), value.shape, value.tobytes().hex()]
        if isinstance(value, (list, tuple)):
            return [self.describe(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            return self.fields({str(key): item for key, item in value.items()}, where)
        if isinstance(value, Set):
            return sorted(str(item) for item in value)
        if isinstance(value, (torch.dtype, torch.device, complex, bytes, range, slice, enum.Enum)):
            return None if isinstance(value, torch.device) else repr(value)
        if isinstance(value, STATELESS):
            return None
        if id(value) not in self.known:
            self.known[id(value)] = (value, "itself")  # ends a cycle
            self.known[id(value)] = (value, self._describe_object(value, where))
        return self.known[id(value)][1]

    def tensor(self, value: Tensor, where: str) -> Described:
        """Note a tensor, or the parts of one that is packed; describe what is attached to it."""
        if value.device.type == "meta":
            self.unkeyed.add(f"the weights {where}, which are not in memory")
        elif flatten := getattr(value, "__tensor_flatten__", None):
            names, context = flatten()
            parts = {name: self.describe(getattr(value, name), f"{where}.{name}") for name in names}
            return [parts, self.describe(context, f"{where}.context")]
        else:
            self.tensors[where] = value
        return self.fields(vars(value), where)

    def fields(self, values: Mapping[str, Any], where: str) -> dict[str, Described]:
        """Describe attributes or the items of a mapping, without those that are not used."""
        return {
            name: self.describe(value, f"{where}.{name}" if where else name)
            for name, value in values.items()
            if name not in UNUSED
        }

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
            captured = {
                name: self.describe(cell, f"{where}.{name}") for name, cell in _captured(value)
            }
            return [self.function(value), captured]
        builtin = isinstance(value, types.BuiltinFunctionType)
        if builtin or not (attributes := _attributes(value)):
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
        if id(cls) not in self.known:
            self.known[id(cls)] = (cls, cls.__qualname__)
            parts: list[Described] = []
            for base in cls.__mro__[:-1]:
                module = base.__module__
                names = CALLS if module.startswith(FRAMEWORK) else tuple(vars(base))
                own = {name: vars(base)[name] for name in names if name in vars(base)}
                described = {name: self.member(value) for name, value in own.items()}
                kept = {name: value for name, value in described.items() if value is not None}
                parts.append([_module_name(base), base.__qualname__, kept])
            self.known[id(cls)] = (cls, _digest(parts))
        return self.known[id(cls)][1]

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
        if id(function) not in self.known:
            self.known[id(function)] = (function, function.__qualname__)
            package = function.__module__.partition(".")[0] if function.__module__ else ""
            called: dict[str, Described] = {}
            for name in _names(function.__code__):
                other = function.__globals__.get(name)
                # The functions of torch are the same in every model.
                if isinstance(other, types.FunctionType):
                    torch_own = str(other.__module__).startswith("torch.") and package != "torch"
                    called[name] = other.__qualname__ if torch_own else self.function(other)
            captured = {name: self.member(value) for name, value in _captured(function)}
            defaults = [
                repr(value) if isinstance(value, (bool, int, float, str)) else None
                for value in (
                    *(function.__defaults__ or ()),
                    *(function.__kwdefaults__ or {}).values(),
                )
            ]
            code = _code_digest(function.__code__)
            self.known[id(function)] = (function, _digest([code, called, captured, defaults]))
        return self.known[id(function)][1]

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
        own = {name: value for name, value in own.items() if not name.endswith(CACHED)}
        own |= {name: passing.get(name, tensor) for name, tensor in tensors.items()}
        self.lines.append([path, self.kind(type(module)), self.fields(own, path)])
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
    walk.unkeyed.update(hooks_on(model), _hooks_on_all_modules(), _replaced_methods(model))
    return walk


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


def _hooks_on_all_modules() -> list[str]:
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


def _replaced_methods(model: Any) -> Iterator[str]:
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


def is_of_library(hook: Any) -> bool:
    """Return whether a function comes from a library that hooks models itself."""
    return package_of(hook) in LIBRARIES


def package_of(function: Any) -> str:
    """Return the name of the package that defines a function."""
    return str(getattr(function, "__module__", "")).partition(".")[0]


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


def _captured(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Return the variables that a function has captured, with their names."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]


@cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that code and the functions inside it look up, sorted."""
    inner = (
        name
        for const in code.co_consts
        if isinstance(const, types.CodeType)
        for name in _names(const)
    )
    return tuple(sorted({*code.co_names, *inner}))


@cache
def _code_digest(code: types.CodeType) -> str:
    """Hash what code does; file and line do not count."""
    return _digest([code.co_code.hex(), _constant(code.co_consts), code.co_names, code.co_varnames])


def _constant(value: Any) -> Described:
    if isinstance(value, types.CodeType):
        return _code_digest(value)
    if isinstance(value, tuple):
        return [_constant(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(repr(item) for item in value)
    return repr(value)


def _module_name(cls: type) -> str:
    """Return the module of a class; code that comes with a model is in a folder named after it."""
    name = cls.__module__
    return name.rpartition(".")[2] if name.startswith("transformers_modules.") else name


def _digest(value: Described) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
