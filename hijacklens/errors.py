"""The one error for bad input, and checks of arguments that raise it.

Every check of a user's input raises `InputError` with a message that names the value received,
what is allowed and the next step. The command line prints that message without a traceback and
exits with status 2. Any other exception is a bug and keeps its traceback.

>>> whole_number("limit", 2.5, least=1)
Traceback (most recent call last):
hijacklens.errors.InputError: limit is 2.5; give a whole number of at least 1.
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import BoundArguments, Parameter, Signature, signature
from itertools import count
from linecache import getline
from traceback import walk_tb
from typing import Any, TypeVar, cast

MOST_NAMES = 24
"""Allowed names that an error lists; a model has hundreds of hooks."""
MOST_CHARACTERS = 2_000
"""Length of a message; the value received may be a complete file."""
LONGEST_COMPARED = 200
"""Characters of a name to compare with the allowed names, as the cost grows with their square."""
MOST = 2**63 - 1
"""The largest whole number that tables and random generators can store."""
SHOWN = 80
"""Characters of a value that an error shows."""

PACKAGES = ("hijacklens", "probes", "analyses")

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


class InputError(ValueError):
    r"""Unusable input.

    The message is one line of printable text of at most `MOST_CHARACTERS`, so that the content of
    a file or a name can neither flood a terminal nor send it control codes. A long one
    loses its middle.

    >>> InputError("the name 'a\x1b[2J\nb' is taken")
    InputError("the name 'a\\x1b[2J b' is taken")
    """

    def __init__(self, message: str) -> None:
        text = "".join(c if c.isprintable() else _visible(c) for c in str(message))
        if len(text) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2 - 3
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the message, which says what to do, and the user's line."""
        frames = walk_tb(self.__traceback__)
        lines = [
            getline(frame.f_code.co_filename, number).strip()
            for frame, number in frames
            if frame.f_globals.get("__name__") == "__main__"
        ]
        return [f"{type(self).__name__}: {self}", *(f"in: {line}" for line in lines[-1:])]


def _visible(character: str) -> str:
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")


def unknown(what: str, name: object, allowed: Iterable[str], hint: str = "") -> InputError:
    """Return the error for a name that does not exist, with the nearest name that does.

    Args:
        what: The kind of thing, e.g. `"scheme"`.
        name: The value received.
        allowed: The names that exist.
        hint: One more sentence on what to do.

    Example:
        >>> unknown("rule", "frist", ["first", "sum", "mean"])
        InputError("unknown rule 'frist'; did you mean 'first'? Allowed: first, mean, sum.")
    """
    names = sorted(map(str, allowed))
    near = get_close_matches(str(name)[:LONGEST_COMPARED], names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    listed = ", ".join(each or "'' (an empty name)" for each in names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        listed += f" and {len(names) - MOST_NAMES} more"
    text = f"unknown {what} {name!r}{guess} Allowed: {listed or 'none exist here'}."
    return InputError(f"{text} {hint}".rstrip())


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the caller's own code that led here, such as a cell of a notebook."""
    level = outside = 2
    for level in count(2):
        try:
            module = sys._getframe(level - 1).f_globals.get("__name__", "")
        except ValueError:  # no further frame
            break
        if module.partition(".")[0] in PACKAGES:
            outside = level + 1
    warnings.warn(message, category, stacklevel=outside)


def bound(
    name: str, form: Signature, arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> BoundArguments:
    """Match the arguments of a call with the parameters of the function called `name`.

    Raises:
        InputError: The function has no such keyword, lacks an argument, or has too many.
    """
    try:
        return form.bind(*arguments, **keywords)
    except TypeError as error:
        known = [each for each in form.parameters.values() if each.name != "self"]
        needed = ", ".join(each.name for each in known if each.default is Parameter.empty)
        hint = f"It needs {needed or 'none'}."
        names = {each.name for each in known}
        if not any(each.kind is Parameter.VAR_KEYWORD for each in known):
            for keyword in keywords.keys() - names:
                raise unknown(f"argument of {name}", keyword, names, hint) from None
        raise InputError(f"{name}: {error}. {hint}") from None


def strict(made: Function) -> Function:
    """Let a call of a function or class with wrong arguments raise an `InputError` (`bound`)."""
    is_class, form = isinstance(made, type), signature(made)
    inner = cast("Any", made).__init__ if is_class else made

    @wraps(inner)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return inner(*arguments, **keywords)
        except TypeError:  # if the arguments are right, it is of another kind
            bound(made.__name__, form, arguments[is_class:], keywords)
            raise

    if not is_class:
        return cast("Function", call)
    cast("Any", made).__init__ = call
    return made


def shown(value: object) -> str:
    """Return a value as an error shows it: on one line, cut off if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def is_text(value: object) -> bool:
    """Return whether a value is text that UTF-8 can hold, without half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def utf8(name: str, value: Any, example: str) -> str:
    """Return a text that UTF-8 can hold.

    Raises:
        InputError: It is not a text, or has bytes that are not UTF-8.
    """
    if not is_text(one_of_type(name, value, str, example)):
        raise InputError(f"{name} is {shown(value)}, which is not UTF-8 text. Write it in UTF-8.")
    return value


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number of any type, in an array or tensor too."""
    try:
        operator.index(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def whole_number(name: str, value: Any, *, least: int = 0, most: int = MOST) -> int:
    """Return a whole number of any type as an int.

    Raises:
        InputError: The value is not a whole number (`True`, `2.0` and `"2"` are refused), or is
            out of range.
    """
    number = operator.index(value) if is_whole(value) else None
    if number is None or not least <= number <= most:
        up_to = f" and at most {most}" if number is not None and number > most else ""
        raise InputError(
            f"{name} is {shown(value)}; give a whole number of at least {least}{up_to}."
        )
    return number


def number(name: str, value: Any, *, least: float | int = -math.inf) -> float:
    """Return a finite number of any type as a float.

    Raises:
        InputError: The value is not a finite number (text is refused), or is below `least`.
    """
    try:
        result = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        result = math.nan
    if not (math.isfinite(result) and result >= least):
        at_least = "" if least == -math.inf else f" of at least {least:g}"
        raise InputError(f"{name} is {shown(value)}; give a finite number{at_least}.")
    return result


def fraction_margin(name: str, value: Any) -> None:
    """Refuse, with an `InputError`, a margin of a fraction that is not between 0 and 1."""
    if not 0 < number(name, value) < 1:
        raise InputError(f"{name} is {shown(value)}; give a number between 0 and 1, such as 0.05.")


def several(name: str, values: Any, example: str) -> tuple[Any, ...]:
    """Return several values as a tuple; `example` says what to write, e.g. `"[0.01, 0.001]"`.

    Raises:
        InputError: It is a text, or cannot be iterated over.
    """
    try:
        if not isinstance(values, (str, bytes)):
            return tuple(values)
    except TypeError:  # no iterable, or a tensor or array without dimensions
        pass
    raise InputError(f"{name} is {shown(values)}; give several, such as {example}.")


def choice(name: str, value: Any, allowed: Iterable[str], hint: str = "") -> str:
    """Return a name that is among the allowed ones.

    Raises:
        InputError: The value is not text, or not one of the allowed names.
    """
    names = tuple(allowed)
    if not isinstance(value, str) or value not in names:
        raise unknown(name, value, names, hint)
    return value


def one_of_type(name: str, value: Any, kind: type[T], example: str) -> T:
    """Return a value of the type `kind`; `example` says where to get one, e.g. `"hl.atlas()"`.

    Raises:
        InputError: It has another type.
    """
    if not isinstance(value, kind):
        raise InputError(
            f"{name} is {shown(value)}, a {type(value).__name__}; give a {kind.__name__}, such as "
            f"{example}."
        )
    return value
