"""Which tokens of the bare and of the hijacked prompt of a fact correspond.

    bare       <s>                              The  Eiffel  Tower  is
    hijacked   <s>  Do not think of Guam .      The  Eiffel  Tower  is

The tokens of the query correspond one to one: those that end at the same character, counted from
the end of the prompt. Where the query's first words are cut differently behind a space, the
smallest groups of tokens that cover the same characters correspond. A token of the hijacking
sentences has no partner.

Every token stands in exactly one span here, so that sums over spans are sums over tokens:

    bos        the beginning-of-sequence token
    hijack     the hijacking sentences, without
    mention    the targets (or the words near them) that a hijacking sentence names
    separator  spaces that are tokens of their own
    query      the bare query, without
    subject    its subject, and
    last       its last token, at which the answer is read
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hijacklens.facts.fact import Fact
from hijacklens.tokens import LocatedPrompt, touched

SPANS = ("bos", "hijack", "mention", "separator", "query", "subject", "last")


@dataclass(frozen=True, slots=True)
class Unit:
    """A token of the hijacked prompt, and the one of the bare prompt that it corresponds to.

    Several where the two prompts cut the same characters differently, none where the other prompt
    has no such token.
    """

    span: str
    """One of `SPANS`."""
    token: str
    """As text, without spaces around it; a special token by its name."""
    bare: tuple[int, ...]
    """Positions in the bare prompt."""
    hijacked: tuple[int, ...]


def align(
    bare: LocatedPrompt, hijacked: LocatedPrompt, fact: Fact, tokenizer: Any
) -> tuple[Unit, ...]:
    """All tokens of both prompts of a fact, in the order of the hijacked one, each once."""
    named = _mentions(hijacked, fact)
    ends = set(_ends(bare)) & set(_ends(hijacked))
    sides = (_groups(bare, ends), _groups(hijacked, ends))
    units = [
        Unit(
            _span(hijacked, places, named),
            _text(hijacked, places, tokenizer),
            sides[0].pop(key, ()),
            places,
        )
        for key, places in sides[1].items()
    ]
    alone = [
        Unit(_span(bare, places, ()), _text(bare, places, tokenizer), places, ())
        for places in sides[0].values()
    ]
    return (*alone, *units)


def _ends(prompt: LocatedPrompt) -> list[int]:
    """Where tokens from the query on end, counted from the end of the text: 0 for the last."""
    start = min(prompt.spans["query"])
    return [end - len(prompt.text) for _, end in prompt.offsets[start:]]


def _groups(prompt: LocatedPrompt, ends: set[int]) -> dict[tuple[str, int], tuple[int, ...]]:
    """Key that both prompts have for the same tokens -> positions, in their order."""
    start, in_hijack = min(prompt.spans["query"]), set(prompt.spans["hijack"])
    bos = set(prompt.spans["bos"])
    found: dict[tuple[str, int], list[int]] = {}
    separators = 0
    for i, (_, end) in enumerate(prompt.offsets):
        if i >= start:
            to_end = end - len(prompt.text)
            key = ("query", min(common for common in ends if common >= to_end))
        elif i in in_hijack:
            key = ("hijack", i)
        elif i in bos:
            key = ("bos", i)
        else:
            key = ("separator", separators)
            separators += 1
        found.setdefault(key, []).append(i)
    return {key: tuple(places) for key, places in found.items()}


def _mentions(prompt: LocatedPrompt, fact: Fact) -> tuple[int, ...]:
    words = {fact.target_true, fact.target_false, fact.near_true, fact.near_false}
    longest_first = sorted(filter(None, words), key=len, reverse=True)
    pattern = "|".join(re.escape(word.strip()) for word in longest_first)
    found = re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", prompt.text)
    named = touched(prompt.text, prompt.offsets, [match.span() for match in found])
    return tuple(sorted(set(named) & set(prompt.spans["hijack"])))


def _span(prompt: LocatedPrompt, places: Sequence[int], named: Sequence[int]) -> str:
    for span, held in (
        ("last", prompt.spans["last"]),
        ("subject", prompt.spans["subject"]),
        ("query", prompt.spans["query"]),
        ("mention", named),
        ("hijack", prompt.spans["hijack"]),
        ("bos", prompt.spans["bos"]),
    ):
        if set(places) & set(held):
            return span
    return "separator"


def _text(prompt: LocatedPrompt, places: Sequence[int], tokenizer: Any) -> str:
    stretches = [prompt.offsets[i] for i in places]
    text = prompt.text[min(a for a, _ in stretches) : max(b for _, b in stretches)].strip()
    return text or str(tokenizer.convert_ids_to_tokens(prompt.ids[places[0]]))
