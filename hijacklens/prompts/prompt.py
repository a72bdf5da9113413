"""Prompts with named spans: hijacking sentences, then the query of a fact.

The text at dose k is `" ".join([sentence] * k + [query])`, after the opening if there is one. A
prompt has its spans in characters; `hijacklens.prompts.tokens.locate` converts them to positions.

>>> from hijacklens.facts.fact import Fact
>>> fact = Fact(case_id=0, relation_id="P131", subject="Eiffel Tower", template="The {} is in",
...             target_true="Paris", target_false="Guam")
>>> prompt = make_prompt(fact, sentence="Do not think of Guam.", dose=2, scheme="do-not-think")
>>> prompt.text
'Do not think of Guam. Do not think of Guam. The Eiffel Tower is in'
>>> [prompt.text[a:b] for a, b in prompt.spans["mention"] + prompt.spans["subject"]]
['Guam', 'Guam', 'Eiffel Tower']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from hijacklens.errors import InputError, whole_number
from hijacklens.facts.fact import Fact
from hijacklens.facts.joining import Joining, joined

DOSE = "a dose, which counts sentences,"
"""The argument's name in errors."""
MOST_SENTENCES = 9_999
"""The maximum dose; no context window fits more."""
CharacterSpan: TypeAlias = tuple[int, int]
"""Start and end of a piece of text, the end not included."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text for the model, with the character spans of its parts.

    `spans` has `opening`, `hijack` (one piece per sentence), `mention` (the words in the sentences
    that name a target or a near word), `query`, and `subject` (in the query, not in the sentences).
    The spans `bos` and `last` exist only in tokens.
    """

    text: str
    scheme: str
    dose: int
    spans: Mapping[str, tuple[CharacterSpan, ...]]
    joining: Joining = "space"
    """How a target joins the text; results of earlier versions put a space there."""
    templated: bool = False
    """Whether a chat template wrote the text, with all special tokens that a prompt needs."""

    def followed_by(self, target: str) -> str:
        """Return the text with a target after it."""
        return joined(self.text, target, self.joining)


def make_prompt(
    fact: Fact,
    *,
    sentence: str = "",
    dose: int = 0,
    scheme: str = "bare",
    joining: Joining = "auto",
    opening: str = "",
) -> Prompt:
    """Make the prompt of a fact, with `dose` copies of a sentence before its query.

    The prompt is the bare query by default; `opening` is a neutral text before all else.

    Raises:
        InputError: The dose is negative, or the prompt is empty.
    """
    start = fact.template.find("{}")
    return compose(
        fact.prompt,
        sentence=sentence,
        dose=dose,
        scheme=scheme,
        subject=(start, start + len(fact.subject)) if fact.subject else None,
        named=(fact.target_true, fact.target_false, fact.near_true, fact.near_false),
        joining=joining,
        opening=opening,
    )


def compose(
    query: str,
    *,
    sentence: str = "",
    dose: int = 0,
    scheme: str = "",
    subject: CharacterSpan | None = None,
    named: Iterable[str | None] = (),
    joining: Joining = "auto",
    opening: str = "",
) -> Prompt:
    """Make the prompt of any query, whether a fact's or not.

    `subject` are the characters of the subject in the query, if there is one. `named` are words
    whose occurrences in the sentence, as complete words, form `mention`. `joining` says how a
    target joins the query (`hijacklens.facts.joining`). `opening` is a neutral text before the
    sentences and the query; a space follows it, but not a special token such as `<|endoftext|>`.

    Raises:
        InputError: The dose is negative.
    """
    dose = whole_number(DOSE, dose, most=MOST_SENTENCES)
    step = len(sentence) + 1  # the sentence and the space after it
    text = " ".join(pieces(query, sentence, dose, opening))
    if not text.strip():
        raise InputError("the prompt is empty; give the beginning of a sentence.")
    start = len(text) - len(query)
    first = start - dose * step
    mentions = _mentions(sentence, named) if dose else []
    firsts = range(first, start, step)
    return Prompt(
        text=text,
        scheme=scheme,
        dose=dose,
        spans=MappingProxyType(
            {
                "opening": ((0, len(opening)),) if opening else (),
                "hijack": tuple((i, i + len(sentence)) for i in firsts),
                "mention": tuple((i + a, i + b) for i in firsts for a, b in mentions),
                "query": ((start, len(text)),),
                "subject": ((start + subject[0], start + subject[1]),) if subject else (),
            }
        ),
        joining=joining,
    )


def pieces(query: str, sentence: str, dose: int, opening: str) -> list[str]:
    """Return the pieces of a prompt's text, which single spaces join."""
    first, *others = [sentence] * dose + [query]
    if opening and not re.search(r"\s$|<[^<>\s]+>$", opening):
        return [opening, first, *others]
    return [opening + first, *others]


def _mentions(sentence: str, named: Iterable[str | None]) -> list[CharacterSpan]:
    """Find words in a sentence, but not as parts of longer words.

    A loop instead of a regular expression: compiling one for each of a hundred thousand prompts
    would take longer than tokenising them.
    """
    spans = []
    for word in {word.strip() for word in named if word}:
        start = sentence.find(word) if word else -1
        while start >= 0:
            end = start + len(word)
            if not (_in_word(sentence[start - 1 : start]) or _in_word(sentence[end : end + 1])):
                spans.append((start, end))
            start = sentence.find(word, start + 1)
    return sorted(spans)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
