"""Who wrote Python code, and what it does, as a digest."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

Described: TypeAlias = Any
"""A value that JSON can write, the same in every process."""

LIBRARIES = {"hijacklens", "transformer_lens", "transformers", "accelerate"}
"""Packages whose own hooks do not change what a model computes."""
INSTALLED = {"site-packages", "dist-packages"}
"""Folders in which pip installs packages."""


def is_of_library(hook: Any) -> bool:
    """Return whether a function comes from a library that hooks models itself."""
    return package_of(hook) in LIBRARIES


def package_of(function: Any) -> str:
    """Return the name of the package that defines a function."""
    return str(getattr(function, "__module__", "")).partition(".")[0]


@cache
def is_installed(module: str | None) -> bool:
    """Return whether code is that of a package or of Python, which only new versions change."""
    package = (module or "").partition(".")[0]
    if package in LIBRARIES or package in sys.stdlib_module_names:
        return True
    found = sys.modules.get(package)
    places = [getattr(found, "__file__", None), *getattr(found, "__path__", ())]
    return any(INSTALLED & set(Path(place).parts) for place in places if place)


def is_written(name: str, value: Any) -> bool:
    """Return whether an attribute of a class was written by its author, and not by Python."""
    by_python = name == "_abc_impl" or (name.startswith("__") and name.endswith("__"))
    return not by_python or isinstance(value, types.FunctionType)


def captured(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Return the variables that a function has captured, with their names."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]


@cache
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that code and the functions inside it look up, sorted."""
    inner = (
        name
        for const in code.co_consts
        if isinstance(const, types.CodeType)
        for name in names_in(const)
    )
    return tuple(sorted({*code.co_names, *inner}))


@cache
def code_digest(code: types.CodeType) -> str:
    """Hash what code does; file and line do not count."""
    return digest_of(
        [code.co_code.hex(), _constant(code.co_consts), code.co_names, code.co_varnames]
    )


def _constant(value: Any) -> Described:
    if isinstance(value, types.CodeType):
        return code_digest(value)
    if isinstance(value, tuple):
        return [_constant(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(repr(item) for item in value)
    return repr(value)


def module_name(cls: type) -> str:
    """Return the module of a class; code that comes with a model is in a folder named after it."""
    name = cls.__module__
    return name.rpartition(".")[2] if name.startswith("transformers_modules.") else name


def digest_of(value: Described) -> str:
    """Return the SHA-256 of a description."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
