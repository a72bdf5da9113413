"""Renamed keywords, functions and classes: old names work for one release, with a warning.

>>> @renamed(dim="d_model")
... def width(*, d_model: int) -> int:
...     return d_model
>>> width(d_model=16)
16
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any, cast

from hijacklens.errors import Function as Function
from hijacklens.errors import InputError, strict, warn


def renamed(**new_names: str) -> Callable[[Function], Function]:
    """Let a function or class take keywords by their old names, too.

    Args:
        new_names: Old name -> new name. The new name `argument.field` is a field of a frozen
            dataclass; the old keyword changes that field of the argument's default value.

    Raises:
        InputError: On a call that gives a keyword under both names, or wrong arguments.

    Warns:
        FutureWarning: On a call that uses an old name.
    """

    def decorate(function: Function) -> Function:
        parameters = signature(function).parameters
        checked = function if hasattr(function, "__wrapped__") else strict(function)

        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            old_values = {old: keywords.pop(old) for old in new_names if old in keywords}
            renamed_values: dict[str, Any] = {}
            for old, value in old_values.items():
                argument, _, record_field = new_names[old].partition(".")
                if argument in keywords:
                    raise InputError(f"{argument} is given twice, also by its old name {old}.")
                spelling = f"{argument}="
                if record_field:
                    default = renamed_values.get(argument, parameters[argument].default)
                    spelling += f"{type(default).__name__}({record_field}=...)"
                    value = replace(default, **{record_field: value})
                warn(
                    f"{old}= is now called {spelling}; the next release drops the old name.",
                    FutureWarning,
                )
                renamed_values[argument] = value
            return checked(*args, **keywords, **renamed_values)

        return cast("Function", call)

    return decorate


def with_new_names(record: Mapping[str, Any], new_names: Mapping[str, str]) -> dict[str, Any]:
    """Return a saved record with every old name replaced by the new one.

    Raises:
        InputError: A value is given under both names.
    """
    for old, new in new_names.items():
        if old in record and new in record:
            raise InputError(f"{new} is given twice, also by its old name {old}.")
    return {new_names.get(name, name): value for name, value in record.items()}


def old_names(module: str, **new_names: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module whose functions or classes have new names.

    Warns:
        FutureWarning: When an old name is looked up.
    """

    def get(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = new_names[name]
        warn(
            f"{module}.{name} is now called {new}; the next release drops the old name.",
            FutureWarning,
        )
        return getattr(sys.modules[module], new)

    return get
