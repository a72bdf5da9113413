"""The one error that bad input gets.

Every check of a user's input raises `InputError` with a message that names the value received,
what is allowed and the next step. The command line prints that message without a traceback and
exits with status 2; anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST_NAMES = 24
"""How many allowed names an error lists; a model has hundreds of hooks."""


class InputError(ValueError):
    """Input that cannot be used; the message says what was given, what is allowed, what to do."""


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
    names = sorted(allowed)
    near = get_close_matches(str(given), names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    listed = ", ".join(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        listed += f" and {len(names) - MOST_NAMES} more"
    text = f"unknown {what} {given!r}{guess} Allowed: {listed}."
    return InputError(f"{text} {hint}".rstrip())
