"""From text to token ids: the tokenizer's own default, targets read in context, spans.

Contract 2: a prompt is tokenised as the model's own tokenizer does by default, so GPT-2 gets no
beginning-of-sequence token and Gemma and LLaMA get one. A target starts at the first token where
the tokenisations of `prompt` and `prompt + " " + target` part; so a BOS never enters a target,
and whatever a tokenizer does to spaces is right by construction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from hijacklens.errors import InputError, unknown
from hijacklens.prompts.prompt import Prompt
from hijacklens.prompts.spans import AT, EVERYWHERE, TEXT, TOKEN, positions

TokenIds: TypeAlias = tuple[int, ...]
AT_A_TIME = 1_024
"""Texts tokenised at a time: what a tokenizer notes of each takes ten times its ids' memory."""


def encode(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    """Token ids of each text by the tokenizer's default call, without an appended end token.

    A few tokenizers close every text with an end-of-sequence token, after which no model could
    continue a prompt; it is taken off.
    """
    end = tokenizer.eos_token_id
    probe = tokenizer("a")["input_ids"]
    closes = len(probe) > 1 and end is not None and probe[-1] == end
    found: list[TokenIds] = []
    same: dict[int, int] = {}  # one object per id, not one per token of every text
    for first in range(0, len(texts), AT_A_TIME):
        part = list(texts[first : first + AT_A_TIME])
        for row in tokenizer(part, padding=False, truncation=False)["input_ids"]:
            kept = row[:-1] if closes and row and row[-1] == end else row
            found.append(tuple([same.setdefault(token, token) for token in kept]))
    return found


@dataclass(frozen=True, slots=True)
class Continuation:
    """A target read in context: its token ids, and the ids that the model is given before it."""

    context: TokenIds
    target: TokenIds

    @property
    def steps(self) -> list[tuple[TokenIds, int]]:
        """Each token of the target with the ids that stand before it."""
        whole = self.context + self.target
        n = len(self.context)
        return [(whole[: n + i], token) for i, token in enumerate(self.target)]


def continuation(prompt: TokenIds, prompt_and_target: TokenIds) -> Continuation:
    """Split the tokenisation of prompt and target where it parts from that of the prompt.

    Raises:
        ValueError: Nothing of the target is left, or nothing stands before it.

    >>> continuation((5, 6), (5, 6, 9, 8))
    Continuation(context=(5, 6), target=(9, 8))
    """
    pairs = enumerate(zip(prompt, prompt_and_target, strict=False))
    shorter = min(len(prompt), len(prompt_and_target))
    n = next((i for i, (a, b) in pairs if a != b), shorter)
    if n == len(prompt_and_target):
        raise ValueError("the target has no tokens of its own behind this prompt")
    if n == 0:
        raise ValueError("no token stands before the target, so the model is given nothing")
    return Continuation(prompt_and_target[:n], prompt_and_target[n:])


@dataclass(frozen=True, slots=True)
class LocatedPrompt:
    """A prompt in tokens, with the positions of its spans."""

    ids: TokenIds
    spans: Mapping[str, tuple[int, ...]]
    """Span name -> token positions; the names are those of `hijacklens.prompts.spans`.

    `target` is empty: its tokens come behind the prompt, when one with several is scored.
    """
    text: str
    offsets: tuple[tuple[int, int], ...]
    """The characters of the text that each token covers: start, and end not included."""

    def positions(self, atom: str) -> tuple[int, ...]:
        """Token positions of a span without `+`; see `hijacklens.prompts.spans` for the forms.

        Raises:
            InputError: A name that prompts do not have.
        """
        if atom == EVERYWHERE:
            return tuple(range(len(self.ids)))
        if atom.startswith(AT):
            return positions(atom, len(self.ids))
        if atom.startswith(TOKEN):
            wanted = int(atom.removeprefix(TOKEN))
            return tuple(i for i, token in enumerate(self.ids) if token == wanted)
        if atom.startswith(TEXT):
            words = atom.removeprefix(TEXT)
            found = re.finditer(re.escape(words), self.text)
            return touched(self.text, self.offsets, [match.span() for match in found])
        if atom not in self.spans:
            raise unknown(
                "span", atom, [*self.spans, EVERYWHERE], "Other forms: text:, at:, token:."
            )
        return self.spans[atom]


def touched(
    text: str, offsets: Sequence[tuple[int, int]], stretches: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """The tokens with a character, a space apart, in one of the stretches of a text."""
    return tuple(
        position
        for position, (start, end) in enumerate(offsets)
        if any(text[max(start, a) : min(end, b)].strip() for a, b in stretches if start < end)
    )


def locate(tokenizer: Any, prompt: Prompt) -> LocatedPrompt:
    """Token positions of the spans of a prompt.

    A token belongs to a span when one of its characters does, a space apart: the token " Guam"
    belongs to the span that "Guam" is in, not to what stands before it.

    Raises:
        InputError: The tokenizer does not say which characters a token covers (a "slow" one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so spans cannot "
            "be located. Use the fast tokenizer of this model (use_fast=True)."
        )
    encoded = tokenizer(prompt.text, return_offsets_mapping=True)
    (ids,) = encode(tokenizer, [prompt.text])
    offsets = encoded["offset_mapping"][: len(ids)]
    spans = {
        name: touched(prompt.text, offsets, stretches) for name, stretches in prompt.spans.items()
    }
    first = next((i for i, (start, end) in enumerate(offsets) if start < end), 0)
    spans |= {"bos": tuple(range(first)), "last": (len(ids) - 1,), "target": ()}
    return LocatedPrompt(ids, spans, prompt.text, tuple(map(tuple, offsets)))
