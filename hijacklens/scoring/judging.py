r"""Judge what a model says: the true target, the false one, another answer, or a refusal.

The first name in the answer decides. A name is a target or one of its aliases, as complete words:
case, accents and white space do not count, and a word of six letters or more may have one letter
wrong, missing or too many. A name is passed over if a longer name contains it there ("York" in
"New York", if both are names), and if it is denied ("not Rome", "instead of Rome").

>>> from hijacklens.facts.fact import Fact
>>> fact = Fact(case_id=0, relation_id="P1376", subject="Spain", template="The capital of {} is",
...             target_true="Madrid", target_false="Rome", aliases_false=("Roma",))
>>> [judge(text, fact) for text in (" Madrid.", "not Rome but Madrd", "ROMA", "Romania", "Sorry.")]
['true', 'true', 'false', 'other', 'refused']
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

from hijacklens.facts.fact import Fact

Judgement: TypeAlias = Literal["true", "false", "other", "refused"]
JUDGEMENTS: tuple[Judgement, ...] = get_args(Judgement)
LONG = 6
"""Letters of a word that may be misspelt; shorter ones have too many neighbours."""
_DENIED = re.compile(
    r"(\bnot|cannot|n't|\bnever|\bno longer|\binstead of|\brather than)\b"
    r"((?!\bbut\b)[^.,;:!?\n]){0,24}$"
)
_REFUSAL = re.compile(
    r"\b(i|we) (do not|don't|cannot|can't|could not|couldn't|am not|won't|will not)\b"
    r"|\bi('m| am) (sorry|not|unable)\b|^\W*sorry\b|\bas an? (ai|language model)\b"
    r"|\b(i apologi[sz]e|unable to|no information|not (sure|certain|known)|is unknown)\b"
)
_UNSPACED = re.compile("[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\ua4cf\uf900-\ufaff]")


def judge(text: str, fact: Fact, others: Collection[str] = ()) -> Judgement:
    """Judge one answer to a fact.

    Args:
        text: The answer.
        fact: Its targets and their aliases are the names.
        others: Further names, such as the targets of other facts, that may contain a target.
    """
    answer = _plain(text)
    sides = {
        "true": {_plain(name) for name in (fact.target_true, *fact.aliases_true)},
        "false": {_plain(name) for name in (fact.target_false, *fact.aliases_false)},
    }
    names = set.union(*sides.values())
    known = _all_plain(frozenset(others)) - names
    found = [
        (start, -end, side)
        for side, side_names in sides.items()
        for name in side_names
        for start, end in _occurrences(name, answer)
        if answer[start:end] not in known and not _DENIED.search(answer[:start])
    ]
    longer = [
        span
        for other in (known | names if found else ())
        if any(name in other for name in names)
        for span in _occurrences(other, answer)
    ]
    free = [
        (start, end, side)
        for start, end, side in found
        if not any(a <= start and -end <= b and b - a > -end - start for a, b in longer)
    ]
    if free:
        return "true" if min(free)[2] == "true" else "false"
    return "refused" if _REFUSAL.search(answer) else "other"


@lru_cache(maxsize=64)
def _all_plain(texts: frozenset[str]) -> frozenset[str]:
    return frozenset(map(_plain, texts))


@lru_cache(maxsize=100_000)
def _plain(text: str) -> str:
    """Return a text in lower case, without accents and with plain apostrophes."""
    parts = unicodedata.normalize("NFKD", text.strip().replace("\u2019", "'")).casefold()
    kept = "".join(c for c in parts if not unicodedata.combining(c))
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", kept))


def _occurrences(name: str, text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of a name in a text, as complete words; if none, with a letter wrong."""
    if not name:
        return
    if _UNSPACED.search(name):  # scripts without spaces have no word boundaries
        yield from (match.span() for match in re.finditer(re.escape(name), text))
        return
    words = name.split()
    pattern = r"[\s-]".join(map(re.escape, words))
    exact = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text)]
    yield from exact
    if exact or max(map(len, words)) < LONG:
        return
    tokens = [
        (match.group(), *match.span()) for match in re.finditer(r"[^\W_]+(?:[.'][^\W_]+)*", text)
    ]
    for i in range(len(tokens) - len(words) + 1):
        window = tokens[i : i + len(words)]
        pairs = list(zip(words, (word for word, *_ in window), strict=True))
        wrong = [(a, b) for a, b in pairs if a != b]
        if len(wrong) == 1 and len(wrong[0][0]) >= LONG and _one_edit(*wrong[0]):
            yield window[0][1], window[-1][2]


def _one_edit(name: str, word: str) -> bool:
    """Return whether one letter is wrong, missing, too many, or swapped with the next one."""
    i = next((i for i, (a, b) in enumerate(zip(name, word, strict=False)) if a != b), None)
    if i is None:  # "Russia" is no misspelt "Russian"
        return False
    swapped = word[i : i + 2] == name[i : i + 2][::-1] and name[i + 2 :] == word[i + 2 :]
    return swapped or name[i + 1 :] in (word[i:], word[i + 1 :]) or name[i:] == word[i + 1 :]
