"""Which tokens of the bare and of the hijacked prompt of a fact correspond.

    bare       <s>                              The  Eiffel  Tower  is
    hijacked   <s>  Do not think of Guam .      The  Eiffel  Tower  is

The tokens of the query correspond one to one; where the query's first words are cut differently
behind a space, the smallest groups of tokens that cover the same characters do
(`hijacklens.prompts.correspondence.groups`). A token of the hijacking sentences has no partner.

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hijacklens.prompts.correspondence import groups
from hijacklens.prompts.tokens import LocatedPrompt

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


def align(bare: LocatedPrompt, hijacked: LocatedPrompt, tokenizer: Any) -> tuple[Unit, ...]:
    """All tokens of both prompts of a fact, in the order of the hijacked one, each once."""
    units = []
    for group in groups(bare, hijacked):
        prompt, places = (hijacked, group.target) if group.target else (bare, group.source)
        text = _text(prompt, places, tokenizer)
        units.append(Unit(_span(prompt, places), text, group.source, group.target))
    return tuple(units)


def _span(prompt: LocatedPrompt, places: Sequence[int]) -> str:
    for span in ("last", "subject", "query", "mention", "hijack", "bos"):
        if set(places) & set(prompt.spans[span]):
            return span
    return "separator"


def _text(prompt: LocatedPrompt, places: Sequence[int], tokenizer: Any) -> str:
    stretches = [prompt.offsets[i] for i in places]
    text = prompt.text[min(a for a, _ in stretches) : max(b for _, b in stretches)].strip()
    return text or str(tokenizer.convert_ids_to_tokens(prompt.ids[places[0]]))
