"""Prompts with named spans: hijacking sentences, then the query of a fact.

The text at dose k is `" ".join([sentence] * k + [query])`. A prompt knows where its parts stand,
in characters; `hijacklens.tokens.locate` turns that into token positions.

>>> from hijacklens.facts.fact import Fact
>>> fact = Fact(case_id=0, relation_id="P131", subject="Eiffel Tower", template="The {} is in",
...             target_true="Paris", target_false="Guam")
>>> prompt = make_prompt(fact, sentence="Do not think of Guam.", dose=2, scheme="do-not-think")
>>> prompt.text
'Do not think of Guam. Do not think of Guam. The Eiffel Tower is in'
>>> [prompt.text[a:b] for a, b in prompt.spans["hijack"]]
['Do not think of Guam.', 'Do not think of Guam.']
>>> [prompt.text[a:b] for a, b in prompt.spans["subject"]]
['Eiffel Tower']
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact

CharacterSpan: TypeAlias = tuple[int, int]
"""Start and end of a stretch of text, the end not included."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text for the model, and where its parts stand in it.

    `spans` maps `hijack` (one stretch per sentence), `query` and `subject` (in the query, not in
    the sentences) to character spans. The tokens of `bos` and `last` exist only in tokens.
    """

    text: str
    scheme: str
    dose: int
    spans: Mapping[str, tuple[CharacterSpan, ...]]


def make_prompt(fact: Fact, *, sentence: str, dose: int, scheme: str) -> Prompt:
    """The prompt of a fact with `dose` copies of a sentence before its query.

    Raises:
        InputError: The dose is negative.
    """
    if dose < 0:
        raise InputError(f"a dose counts sentences and cannot be {dose}; use 0, 1, 2, ...")
    step = len(sentence) + 1  # the sentence and the space behind it
    start = dose * step
    text = " ".join([sentence] * dose + [fact.prompt])
    subject = start + fact.template.index("{}")
    return Prompt(
        text=text,
        scheme=scheme,
        dose=dose,
        spans=MappingProxyType(
            {
                "hijack": tuple((i * step, i * step + len(sentence)) for i in range(dose)),
                "query": ((start, len(text)),),
                "subject": ((subject, min(subject + len(fact.subject), len(text))),),
            }
        ),
    )
