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
