"""Arguments: what is given to a public function, checked and made plain.

Annotations say what is allowed; these say it to someone who gave something else. NumPy's and
torch's numbers are numbers, `True` is not one, and a text is not several texts.

>>> whole_number("limit", 3, least=1), number("factor", 1), several("names", ["a"], "['a', 'b']")
(3, 1.0, ('a',))
>>> choice("rule", "frist", ("first", "sum", "mean"))
Traceback (most recent call last):
    ...
hijacklens.errors.InputError: unknown rule 'frist'; did you mean 'first'? Allowed: first, mean, sum.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

from hijacklens.errors import InputError, unknown

T = TypeVar("T")
MOST = 2**63 - 1
"""The largest whole number that tables and generators hold."""
SHOWN = 80
"""Characters of a value that an error shows."""


def shown(given: object) -> str:
    """A value as an error shows it: on one line, its end left out if it is long."""
    text = " ".join(repr(given).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def whole_number(name: str, given: Any, *, least: int = 0, most: int = MOST) -> int:
    """A whole number of any type that counts, as a plain int.

    Args:
        name: What it is called where it was given, e.g. `"limit"`.
        given: The value received.
        least: The smallest that is allowed.
        most: The largest.

    Raises:
        InputError: It is no whole number (`True`, `2.0` and `"2"` are none), or outside its range.
    """
    found = operator.index(given) if is_whole(given) else None
    if found is None or not least <= found <= most:
        up_to = f" and at most {most}" if found is not None and found > most else ""
        raise InputError(
            f"{name} is {shown(given)}; give a whole number of at least {least}{up_to}."
        )
    return found


def is_whole(given: Any) -> bool:
    """Whether something counts: a whole number of any type, an array or tensor of one too."""
    try:
        operator.index(given)
    except (TypeError, ValueError):
        return False
    return not isinstance(given, bool)


def number(name: str, given: Any, *, least: float | int = -math.inf) -> float:
    """A finite number of any type, as a plain float.

    Raises:
        InputError: It is none (a text is none), not finite, or below `least`.
    """
    try:
        found = math.nan if isinstance(given, (str, bytes, bool)) else float(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not (math.isfinite(found) and found >= least):
        at_least = "" if least == -math.inf else f" of at least {least:g}"
        raise InputError(f"{name} is {shown(given)}; give a finite number{at_least}.")
    return found


def several(name: str, given: Any, example: str) -> tuple[Any, ...]:
    """Several values as a tuple; one text is not several.

    Args:
        name: What they are called where they were given.
        given: The value received.
        example: What to write, e.g. `"[0.01, 0.001]"`.

    Raises:
        InputError: It is a text, or nothing that can be gone through.
    """
    found: Any = None
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        try:
            found = tuple(given)
        except TypeError:  # a tensor or array without dimensions
            found = None
    if found is None:
        raise InputError(f"{name} is {shown(given)}; give several, such as {example}.")
    return found


def choice(name: str, given: Any, allowed: Iterable[str], hint: str = "") -> str:
    """One of some names.

    Raises:
        InputError: It is none of them, or no text.
    """
    names = tuple(allowed)
    if not isinstance(given, str) or given not in names:
        raise unknown(name, given, names, hint)
    return given


def one_of_type(name: str, given: Any, kind: type[T], example: str) -> T:
    """A value of a type.

    Args:
        name: What it is called where it was given.
        given: The value received.
        kind: The type that it has to have.
        example: Where one comes from, e.g. `"hl.atlas()"`.

    Raises:
        InputError: It is of another type.
    """
    if not isinstance(given, kind):
        raise InputError(
            f"{name} is {shown(given)}, a {type(given).__name__}; give a {kind.__name__}, such as "
            f"{example}."
        )
    return given
