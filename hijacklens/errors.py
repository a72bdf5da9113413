"""The one error that bad input gets.

Every check of a user's input raises `InputError` with a message that names the value received,
what is allowed and the next step. The command line prints that message without a traceback and
exits with status 2; anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

MOST_NAMES = 24
"""How many allowed names an error lists; a model has hundreds of hooks."""

MOST_CHARACTERS = 2_000
"""Length of a message; a value that was given may be a whole file."""

LONGEST_COMPARED = 200
"""Characters of a given name that is compared with the allowed ones, which takes their square."""


class InputError(ValueError):
    r"""Input that cannot be used; the message says what was given, what is allowed, what to do.

    The message is one line of printable text of at most `MOST_CHARACTERS`, whatever was given:
    what a file or a name holds can neither fill a terminal nor steer it.

    >>> InputError("the name 'a\x1b[2J\nb' is taken")
    InputError("the name 'a\\x1b[2J b' is taken")
    """

    def __init__(self, message: str) -> None:
        """Take the message, made one line, without control characters, its middle left out."""
        text = "".join(c if c.isprintable() else _visible(c) for c in str(message))
        if len(text) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2 - 3
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)


def _visible(character: str) -> str:
    """A space for a line end or another space, an escape for what no terminal should be sent."""
    if character.isspace():
        return " "
    return character.encode("unicode_escape").decode("ascii")


def unknown(what: str, given: object, allowed: Iterable[str], hint: str = "") -> InputError:
    """The error for a name that is not in a list of names, with the nearest ones first.

    Args:
        what: The kind of thing that was named, e.g. `"scheme"`.
        given: The value received.
        allowed: The names that exist.
        hint: One more sentence on what to do.

    Example:
        >>> unknown("rule", "frist", ["first", "sum", "mean"])
        InputError("unknown rule 'frist'; did you mean 'first'? Allowed: first, mean, sum.")
    """
    names = sorted(map(str, allowed))
    near = get_close_matches(str(given)[:LONGEST_COMPARED], names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    listed = ", ".join(name or "'' (an empty name)" for name in names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        listed += f" and {len(names) - MOST_NAMES} more"
    text = f"unknown {what} {given!r}{guess} Allowed: {listed or 'none, there is none here'}."
    return InputError(f"{text} {hint}".rstrip())


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
