"""From text to token ids: the tokenizer's own default, targets read in context, spans.

Contract 2: a prompt is tokenised as the model's own tokenizer does by default, so GPT-2 gets no
beginning-of-sequence token and Gemma and LLaMA get one. A target starts at the first token where
the tokenisations of the prompt, and of the prompt joined with the target, differ. So a BOS never
enters a target, and spaces are right whatever the tokenizer does to them.
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
"""Texts per call: a tokenizer's output takes ten times the memory of the token ids."""


def encode(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    """Return the token ids of each text by the tokenizer's default call, without an end token.

    A few tokenizers append an end-of-sequence token, after which no model could continue a prompt;
    it is removed.
    """
    end = tokenizer.eos_token_id
    sample = tokenizer("a")["input_ids"]
    appends_end = len(sample) > 1 and end is not None and sample[-1] == end
    token_ids: list[TokenIds] = []
    same: dict[int, int] = {}  # one object per id, not one per token of every text
    for first in range(0, len(texts), AT_A_TIME):
        part = list(texts[first : first + AT_A_TIME])
        for row in tokenizer(part, padding=False, truncation=False)["input_ids"]:
            ids = row[:-1] if appends_end and row and row[-1] == end else row
            token_ids.append(tuple([same.setdefault(token, token) for token in ids]))
    return token_ids


def require_known(ids: TokenIds, vocabulary: int | None) -> None:
    """Refuse token ids that a model has no embedding for.

    Args:
        ids: The tokens of a text.
        vocabulary: Number of token ids that the model knows; None if unknown.

    Raises:
        InputError: An id is too large.
    """
    if vocabulary is not None and max(ids, default=0) >= vocabulary:
        raise InputError(
            f"the text has the token id {max(ids)}, and the model knows {vocabulary:,} tokens: the "
            "tokenizer is that of another model, or got tokens for which the model was "
            "not resized (resize_token_embeddings)"
        )


@dataclass(frozen=True, slots=True)
class Continuation:
    """The token ids of a target in context, and the ids that precede it."""

    context: TokenIds
    target: TokenIds

    @property
    def steps(self) -> list[tuple[TokenIds, int]]:
        """Each token of the target with the ids that precede it."""
        ids, n = self.context + self.target, len(self.context)
        return [(ids[: n + i], token) for i, token in enumerate(self.target)]

    def after(self, length: int) -> Continuation:
        """Return the continuation after the first `length` tokens of the context."""
        return Continuation(self.context[:length], self.context[length:] + self.target)


def continuation(prompt: TokenIds, prompt_and_target: TokenIds) -> Continuation:
    """Split the tokenisation of prompt and target where it first differs from the prompt's.

    Raises:
        ValueError: The target has no tokens, or no token precedes it.

    >>> continuation((5, 6), (5, 6, 9, 8))
    Continuation(context=(5, 6), target=(9, 8))
    """
    pairs = enumerate(zip(prompt, prompt_and_target, strict=False))
    shorter = min(len(prompt), len(prompt_and_target))
    n = next((i for i, (a, b) in pairs if a != b), shorter)
    if n == len(prompt_and_target):
        raise ValueError("the target adds no token to this prompt")
    if n == 0:
        raise ValueError("no token precedes the target, so the model would read nothing")
    return Continuation(prompt_and_target[:n], prompt_and_target[n:])


@dataclass(frozen=True, slots=True)
class LocatedPrompt:
    """A prompt in tokens, with the positions of its spans."""

    ids: TokenIds
    spans: Mapping[str, tuple[int, ...]]
    """Span name -> token positions; the names are those of `hijacklens.prompts.spans`.

    `target` is empty: its tokens follow the prompt when a target with several is scored.
    """
    text: str
    offsets: tuple[tuple[int, int], ...]
    """The characters of the text that each token covers: start, and end not included."""

    def positions(self, atom: str) -> tuple[int, ...]:
        """Return the token positions of a span without `+` (forms: `hijacklens.prompts.spans`).

        Raises:
            InputError: Prompts have no span of that name.
        """
        if atom == EVERYWHERE:
            return tuple(range(len(self.ids)))
        if atom.startswith(AT):
            return positions(atom, len(self.ids))
        if atom.startswith(TOKEN):
            token_id = int(atom.removeprefix(TOKEN))
            return tuple(i for i, token in enumerate(self.ids) if token == token_id)
        if atom.startswith(TEXT):
            matches = re.finditer(re.escape(atom.removeprefix(TEXT)), self.text)
            return touched(self.text, self.offsets, [match.span() for match in matches])
        if atom not in self.spans:
            hint = "Other forms: text:, at:, token:."
            raise unknown("span", atom, [*self.spans, EVERYWHERE], hint)
        return self.spans[atom]


def touched(
    text: str, offsets: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Return the positions of tokens with a non-space character in one of the pieces of a text."""
    return tuple(
        position
        for position, (start, end) in enumerate(offsets)
        if any(text[max(start, a) : min(end, b)].strip() for a, b in pieces if start < end)
    )


def locate(tokenizer: Any, prompt: Prompt) -> LocatedPrompt:
    """Convert the spans of a prompt to token positions.

    A token belongs to a span if one of its characters other than a space does: the token " Guam"
    belongs to the span of "Guam", not to the span before it.

    Raises:
        InputError: The tokenizer gives no character offsets (a "slow" one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so spans cannot "
            "be located. Use the fast tokenizer of this model (use_fast=True)."
        )
    encoded = tokenizer(prompt.text, return_offsets_mapping=True)
    (ids,) = encode(tokenizer, [prompt.text])
    offsets = encoded["offset_mapping"][: len(ids)]
    spans = {name: touched(prompt.text, offsets, pieces) for name, pieces in prompt.spans.items()}
    first = next((i for i, (start, end) in enumerate(offsets) if start < end), 0)
    spans |= {"bos": tuple(range(first)), "last": (len(ids) - 1,), "target": ()}
    return LocatedPrompt(ids, spans, prompt.text, tuple(map(tuple, offsets)))
