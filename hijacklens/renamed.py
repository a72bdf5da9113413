"""Keyword arguments that were renamed: the old name works for one release, with a warning.

>>> @renamed(dim="d_model")
... def width(*, d_model: int) -> int:
...     return d_model
>>> width(d_model=16)
16
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from hijacklens.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(**new_names: str) -> Callable[[Function], Function]:
    """Let a function or class take keywords by their old names, too.

    Args:
        new_names: Old name -> new name.

    Raises:
        InputError: On a call that gives a keyword under both names.

    Warns:
        FutureWarning: On a call that uses an old name.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            for old in new_names.keys() & keywords.keys():
                new = new_names[old]
                if new in keywords:
                    raise InputError(f"{new} is given twice, also by its old name {old}.")
                warnings.warn(
                    f"{old}= is now called {new}=; the next release drops the old name.",
                    FutureWarning,
                    stacklevel=2,
                )
                keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return cast("Function", call)

    return decorate
