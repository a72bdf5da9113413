"""Spans: how one says which tokens are meant, by name, by text, by index or by token.

    hijack               a named stretch; which names there are depends on what the model reads
    text:Eiffel Tower    every occurrence of a text in the prompt
    at:0  at:-1  at:2..5 positions, from the start or (negative) from the end, both ends included
    token:17             every occurrence of a token id
    all                  every token
    hijack+subject       either of them; `text:` takes the rest of the line, so it comes last

Prompts have these names; the contexts of the concept task have those of
`hijacklens.one_layer.spans`.

    bos       the beginning-of-sequence token, if the model has one
    hijack    the hijacking sentences
    mention   the words in them that name a target of the fact, or a word near it
    query     the bare query, and its `subject`
    last      its last token, at which the answer is read
    target    the tokens of a longer target that the model is given to score the next one

>>> atoms("hijack+at:-1")
('hijack', 'at:-1')
>>> positions("at:-2..-1", 5)
(3, 4)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hijacklens.errors import InputError

EVERYWHERE = "all"
TEXT, AT, TOKEN = "text:", "at:", "token:"
OTHER_FORMS = "Other forms: text:WORDS, at:I, at:I..J, token:ID; join several with +."
FORMS = "a name, text:WORDS, at:I, at:I..J, token:ID, all, or several joined by +"


def atoms(span: str) -> tuple[str, ...]:
    """The parts of a span that `+` joins.

    Raises:
        InputError: A part is empty, is no position or token id where one has to be, or is a range
            that runs backwards.
    """
    if not isinstance(span, str):
        raise InputError(f"a span is a text ({FORMS}), not {span!r}.")
    head, mark, text = span.partition(TEXT)
    parts = [part.strip() for part in head.split("+")]
    if mark:
        if parts.pop():
            raise InputError(f"cannot read the span {span!r}; allowed: {FORMS}.")
        parts.append(f"{TEXT}{text}")
    for part in parts:
        bare = part in ("", TEXT)
        wrong_token = part.startswith(TOKEN) and not re.fullmatch(r"token:\d+", part)
        if bare or wrong_token or (part.startswith(AT) and not _is_place(part)):
            raise InputError(f"cannot read the span {span!r}; allowed: {FORMS}.")
    return tuple(dict.fromkeys(parts))


def _is_place(part: str) -> bool:
    """Whether `at:I` or `at:I..J` can be read; a range that is empty in every prompt cannot."""
    if re.fullmatch(r"at:-?\d+(\.\.-?\d+)?", part) is None:
        return False
    first, _, last = part.removeprefix(AT).partition("..")
    start, end = int(first), int(last or first)
    return start <= end or (start >= 0) != (end >= 0)


def depends_on_place(atom: str) -> bool:
    """Whether one has to know where a token stands, and not only which one it is."""
    return atom != EVERYWHERE and not atom.startswith(TOKEN)


def placed_atoms(spans: Iterable[str]) -> tuple[str, ...]:
    """The parts of several spans that depend on where a token stands, each once."""
    found = (atom for span in spans for atom in atoms(span))
    return tuple(sorted({atom for atom in found if depends_on_place(atom)}))


def positions(atom: str, length: int) -> tuple[int, ...]:
    """The positions that `at:I..J` names among `length` tokens; those outside are left out."""
    first, _, last = atom.removeprefix(AT).partition("..")
    start, end = int(first), int(last or first)
    start, end = (place + length if place < 0 else place for place in (start, end))
    return tuple(range(max(start, 0), min(end, length - 1) + 1))
