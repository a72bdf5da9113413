"""Spans: how to select tokens, by name, text, position or token id.

    hijack               a named part of a prompt or context
    text:Eiffel Tower    every occurrence of a text in the prompt
    at:0  at:-1  at:2..5 positions, from the start or (negative) from the end, both ends included
    token:17             every occurrence of a token id
    all                  every token
    hijack+subject       either of them; `text:` takes the rest of the line, so it comes last

Prompts have the names below; contexts of the concept task have those of
`hijacklens.one_layer.spans`.

    bos       the special tokens that the tokenizer adds at the start, if any
    opening   the neutral text before everything else, if there is one
    hijack    the hijacking sentences
    mention   the words in the sentences that name a target of the fact, or a near word
    query     the bare query
    subject   the subject of the fact, in the query
    last      the last token, at which the answer is read
    target    the first tokens of a longer target, when the next ones are scored
    template  in a chat, what the template adds: headers of turns, and turns without the above

`bos`, `opening`, `hijack`, `query` and `template` partition the tokens of a prompt; the others are
parts of them (`hijacklens.prompts.tokens.locate` states the rule).

>>> atoms("hijack+at:-1")
('hijack', 'at:-1')
>>> positions("at:-2..-1", 5)
(3, 4)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from hijacklens.errors import InputError, is_text, unknown

EVERYWHERE = "all"
TEXT, AT, TOKEN = "text:", "at:", "token:"
OTHER_FORMS = "Other forms: text:WORDS, at:I, at:I..J, token:ID; join several with +."
NAMES = (
    *("all", "bos", "opening", "hijack", "mention", "query", "subject", "last", "target"),
    *("template", "context", "cluster", "own", "label"),
)
"""The names that prompts and contexts have."""
FORMS = "a name, text:WORDS, at:I, at:I..J, token:ID, all, or several joined by +"


def atoms(span: str) -> tuple[str, ...]:
    """Return the parts of a span that `+` joins.

    Raises:
        InputError: A part is empty, has no valid position or token id, or is a backward range.
    """
    if not is_text(span):
        raise InputError(f"a span is a text ({FORMS}), not {span!r}.")
    head, mark, text = span.partition(TEXT)
    parts = [part.strip() for part in head.split("+")]
    if mark:
        if parts.pop():
            raise InputError(f"cannot read the span {span!r}; allowed: {FORMS}.")
        parts.append(f"{TEXT}{text}")
    for part in parts:
        empty = part in ("", TEXT)
        wrong_token = part.startswith(TOKEN) and not re.fullmatch(r"token:\d+", part)
        if empty or wrong_token or (part.startswith(AT) and not _is_range(part)):
            raise InputError(f"cannot read the span {span!r}; allowed: {FORMS}.")
    return tuple(dict.fromkeys(parts))


def check_span(span: str) -> str:
    """Return a span; refuse an unreadable one, and a name that is nearly one of `NAMES`.

    Layouts may have other names, which are looked up when the probe runs.

    Raises:
        InputError: As above.
    """
    for part in atoms(span):
        if part not in NAMES and get_close_matches(part, NAMES, n=1, cutoff=0.8):
            raise unknown("span", part, NAMES, OTHER_FORMS)
    return span


def _is_range(part: str) -> bool:
    """Return whether `at:I` or `at:I..J` is valid; a range that is always empty is not."""
    if re.fullmatch(r"at:-?\d+(\.\.-?\d+)?", part) is None:
        return False
    start, end = _ends(part)
    return start <= end or (start >= 0) != (end >= 0)


def depends_on_place(atom: str) -> bool:
    """Return whether an atom depends on the position of a token, not only on its id."""
    return atom != EVERYWHERE and not atom.startswith(TOKEN)


def placed_atoms(spans: Iterable[str]) -> tuple[str, ...]:
    """Return the atoms of several spans that depend on positions, each once."""
    every = {atom for span in spans for atom in atoms(span)}
    return tuple(sorted(atom for atom in every if depends_on_place(atom)))


def positions(atom: str, length: int) -> tuple[int, ...]:
    """Return the positions of `at:I..J` among `length` tokens, without those outside."""
    start, end = (end + length if end < 0 else end for end in _ends(atom))
    return tuple(range(max(start, 0), min(end, length - 1) + 1))


def _ends(atom: str) -> tuple[int, int]:
    first, _, last = atom.removeprefix(AT).partition("..")
    return int(first), int(last or first)
