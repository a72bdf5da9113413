"""From text to token ids: the tokenizer's own default, targets read in context, spans.

Contract 2: a prompt is tokenised as the model's own tokenizer does by default, so GPT-2 gets no
beginning-of-sequence token and Gemma and LLaMA get one. A target starts at the first token where
the tokenisations of the prompt, and of the prompt joined with the target, differ. So a BOS never
enters a target, and spaces are right whatever the tokenizer does to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from typing import Any, TypeAlias

from hijacklens.errors import InputError, unknown
from hijacklens.prompts.prefixes import WIDTH, Prefix, common, prefix_of
from hijacklens.prompts.prompt import CharacterSpan, Prompt
from hijacklens.prompts.spans import AT, EVERYWHERE, TEXT, TOKEN, positions

TokenIds: TypeAlias = tuple[int, ...]
Pieces: TypeAlias = Sequence[str]
"""Parts of a text, which single spaces join."""
Texts: TypeAlias = tuple[Sequence[Pieces], Sequence[Pieces]]
"""Beginnings, which may be empty, and endings: each beginning with each ending is a text."""
WITHIN = {"mention": "hijack", "subject": "query"}
"""A span of words -> the part of the prompt that holds it."""
AT_A_TIME = 1_024
"""Texts per call: a tokenizer's output takes ten times the memory of the token ids."""
SPACES = ("\u0120", "\u2581", " ")
"""How vocabularies write a space."""


def encode(tokenizer: Any, texts: Sequence[str], *, templated: bool = False) -> list[TokenIds]:
    """Return the token ids of each text by the tokenizer's default call, without an end token.

    A chat template has written all special tokens, so that none are added to `templated` texts.

    A few tokenizers append an end of sequence or a separator, after which no model could continue a
    prompt; it is removed.
    """
    end = () if templated else _appended(tokenizer)
    token_ids: list[TokenIds] = []
    for first in range(0, len(texts), AT_A_TIME):
        part = list(texts[first : first + AT_A_TIME])
        options = {"padding": False, "truncation": False, "add_special_tokens": not templated}
        for row in tokenizer(part, **options)["input_ids"]:
            ids = tuple(row)
            token_ids.append(ids[: -len(end)] if end and ids[-len(end) :] == end else ids)
    return token_ids


def _appended(tokenizer: Any) -> TokenIds:
    """Return the special tokens that a tokenizer puts after a text."""
    whole, text = (tuple(tokenizer("a", add_special_tokens=x)["input_ids"]) for x in (True, False))
    rest = len(whole) - len(text)
    before = next((n for n in range(rest + 1) if whole[n : n + len(text)] == text), rest)
    return whole[before + len(text) :] if text else ()


class WordByWord:
    """Encodes many texts of few words: each distinct word once, if this gives the same ids.

    The ids of a word must not depend on the rest of its text. This is so if no token of the
    vocabulary reaches from the last character of the word across the space after it, and if the
    tokenizer, given the word between two others, cuts at both spaces. A text with any other word,
    such as one with a line break, or with several spaces in a row, is encoded as a whole.
    """

    def __init__(self, tokenizer: Any, *, templated: bool = False, fewest: int = AT_A_TIME) -> None:
        """Encode fewer than `fewest` texts at a time as a whole."""
        self._whole = partial(encode, tokenizer, templated=templated)
        self._tokenizer = tokenizer
        self._fewest = fewest
        # Words and pieces that open a text, and others, after a space; None if one is not sure.
        self._heads: dict[str, Prefix | None] = {}
        self._tails: dict[str, Prefix | None] = {}

    def encode(self, texts: Sequence[Texts]) -> list[Prefix]:
        """Encode texts as `encode` does: each beginning with all endings, in their order."""
        whole = (
            " ".join([*beginning, *ending])
            for beginnings, endings in texts
            for beginning in beginnings
            for ending in endings
        )
        n = sum(len(beginnings) * len(endings) for beginnings, endings in texts)
        if n < self._fewest or not self._space:
            return self._prefixes(list(whole))
        self._learn_pieces(texts)
        found: list[Prefix | None] = []
        for beginnings, endings in texts:
            followed = endings if any(beginnings) else ()
            after = [_joined(map(self._tails.__getitem__, ending)) for ending in followed]
            for beginning in beginnings:
                if beginning:
                    before = self._at_start(beginning)
                    found += [_joined((before, ids)) for ids in after]
                else:
                    found += map(self._at_start, endings)
        if None in found:
            unsure = [text for text, ids in zip(whole, found, strict=True) if ids is None]
            of_unsure = iter(self._prefixes(unsure))
            return [next(of_unsure) if ids is None else ids for ids in found]
        return found  # type: ignore[return-value]

    def _at_start(self, pieces: Pieces) -> Prefix | None:
        """Return the ids of pieces at the start of a text."""
        return _joined([self._heads[pieces[0]], *map(self._tails.__getitem__, pieces[1:])])

    def _learn_pieces(self, texts: Sequence[Texts]) -> None:
        """Encode the new words of texts, and join them to pieces."""
        heads, tails = self._heads, self._tails
        at_start: set[str] = set()
        others: set[str] = set()
        for beginnings, endings in texts:
            if any(beginnings):
                others.update(*endings)
            for beginning in beginnings:
                for first, *rest in [beginning] if beginning else endings:
                    at_start.add(first)
                    others.update(rest)
        head_words = {piece: piece.split(" ") for piece in at_start - heads.keys()}
        tail_words = {piece: piece.split(" ") for piece in others - tails.keys()}
        self._learn({words[0] for words in head_words.values()}, heads, "", b"")
        after = {word for words in head_words.values() for word in words[1:]}
        self._learn(after.union(*tail_words.values()), tails, "a ", prefix_of(self._a))
        for piece, words in tail_words.items():
            tails[piece] = _joined(tails[word] for word in words)
        for piece, words in head_words.items():
            heads[piece] = self._at_start(words)

    def _prefixes(self, texts: Sequence[str]) -> list[Prefix]:
        return list(map(prefix_of, self._whole(texts)))

    @cached_property
    def _space(self) -> str:
        """How the vocabulary writes a space; empty if words cannot be encoded one by one.

        Costs a pass over the vocabulary.
        """
        self._a, two, three = self._whole(["a", "a a", "a a a"])
        self._after = two[len(self._a) :]
        if not getattr(self._tokenizer, "is_fast", False) or three != two + self._after:
            return ""
        space, *word = "".join(self._tokenizer.convert_ids_to_tokens(self._after))
        added = self._tokenizer.get_added_vocab()
        if space not in SPACES or word != ["a"] or any(" " in x.strip() for x in added):
            return ""
        vocabulary = self._tokenizer.get_vocab().keys() - added.keys()
        across = [token for token in vocabulary if space in token.lstrip(space)]
        read = self._tokenizer.convert_tokens_to_string
        # Tokens of bytes are letters once they are read; reading may drop the spaces of a token.
        shown = [*(read([token]) for token in across), *(x.replace(space, " ") for x in across)]
        self._never_last = {x for text in shown for x in re.findall(r"(\S) ", text)}
        return "" if "\ufffd" in self._never_last else space  # a part of a character

    def _learn(
        self, words: set[str], known: dict[str, Prefix | None], before: str, anchor: Prefix
    ) -> None:
        """Encode new words after `before`, whose ids are `anchor`, and between two words."""
        new = words - known.keys()
        known.update(dict.fromkeys(new))
        new = [
            x
            for x in new
            if x.split() == [x] and x[-1] not in self._never_last and self._space not in x
        ]
        framed = self._prefixes([before + word for word in new])
        followed = self._prefixes([f"{before}{word} a" for word in new])
        after = prefix_of(self._after)
        for word, ids, more in zip(new, framed, followed, strict=True):
            if more == ids + after and ids.startswith(anchor):
                known[word] = ids[len(anchor) :]


def _joined(parts: Iterable[Prefix | None]) -> Prefix | None:
    """Return the ids of several pieces, or None if those of one are not sure."""
    try:
        return b"".join(parts)  # type: ignore[arg-type]
    except TypeError:  # one is None
        return None


def require_known(ids: Sequence[int], vocabulary: int | None) -> None:
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
    n = split_at(prefix_of(prompt), prefix_of(prompt_and_target))
    return Continuation(prompt_and_target[:n], prompt_and_target[n:])


def split_at(prompt: Prefix, prompt_and_target: Prefix) -> int:
    """Return the number of tokens before the target; errors are those of `continuation`."""
    whole = prompt_and_target.startswith(prompt)
    n = len(prompt) // WIDTH if whole else common(prompt, prompt_and_target)
    if n * WIDTH == len(prompt_and_target):
        raise ValueError("the target adds no token to this prompt")
    if n == 0:
        raise ValueError("no token precedes the target, so the model would read nothing")
    return n


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
            bos = self.spans.get("bos", ())
            covers = _covers(
                self.text, {i: cover for i, cover in enumerate(self.offsets) if i not in bos}
            )
            return _touched(self.text, covers, [match.span() for match in matches])
        if atom not in self.spans:
            hint = "Other forms: text:, at:, token:."
            raise unknown("span", atom, [*self.spans, EVERYWHERE], hint)
        return self.spans[atom]


def _covers(text: str, offsets: Mapping[int, CharacterSpan]) -> dict[int, CharacterSpan]:
    """Return the characters that decide on the spans of each token.

    They are the token's own characters. A token of white space or of no characters counts as part
    of the next token that has others; if there is none, as part of the one before.
    """
    covers = dict(offsets)
    for order in (reversed(covers), iter(covers)):
        near = None
        for position in order:
            a, b = covers[position]
            if text[a:b].strip():
                near = a, b
            else:
                covers[position] = near or (a, b)
    return covers


def _touched(
    text: str, covers: Mapping[int, CharacterSpan], pieces: Sequence[CharacterSpan]
) -> tuple[int, ...]:
    """Return the tokens with a character other than white space in one of the pieces of a text."""
    return tuple(
        position
        for position, (start, end) in covers.items()
        if any(text[max(start, a) : min(end, b)].strip() for a, b in pieces)
    )


def _ending(
    text: str, covers: Mapping[int, CharacterSpan], pieces: Sequence[CharacterSpan]
) -> tuple[int, ...]:
    """Return the tokens whose last character other than white space is in one of the pieces."""
    last = {i: start + max(len(text[start:end].rstrip()), 1) for i, (start, end) in covers.items()}
    return tuple(i for i, end in last.items() if any(a < end <= b for a, b in pieces))


def locate(tokenizer: Any, prompt: Prompt) -> LocatedPrompt:
    """Convert the spans of a prompt to token positions.

    `bos`, `opening`, `hijack` and `query` partition the tokens, in a chat together with `template`,
    the tokens that are only text of the template. `bos` has the special tokens that the tokenizer
    adds at the start (in a chat its BOS), and every other token belongs to the part of the prompt
    that has its last character other than white space. A token of white space or of no characters
    belongs to the token that follows it, as the space of " Guam" belongs to "Guam"; at the end of
    the prompt it belongs to the token before. `mention` and `subject` have the tokens of `hijack`
    and of `query` with at least one of their characters.

    Raises:
        InputError: The tokenizer gives no character offsets (a "slow" one).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so spans cannot "
            "be located. Use the fast tokenizer of this model (use_fast=True)."
        )
    text = prompt.text
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        add_special_tokens=not prompt.templated,
    )
    (ids,) = encode(tokenizer, [text], templated=prompt.templated)
    offsets = tuple(map(tuple, encoded["offset_mapping"][: len(ids)]))
    if prompt.templated:
        bos = len(list(takewhile(lambda token: token == tokenizer.bos_token_id, ids)))
    else:
        added = zip(encoded["special_tokens_mask"], offsets, strict=False)
        bos = len(list(takewhile(lambda token: token[0] and token[1][0] == token[1][1], added)))
    template = prompt.spans.get("template", ())
    covers = _covers(
        text,
        {
            i: (start, end)
            for i, (start, end) in enumerate(offsets[bos:], bos)
            if not any(a <= start and end <= b for a, b in template)
        },
    )
    spans = {
        name: _ending(text, covers, pieces)
        for name, pieces in prompt.spans.items()
        if name not in WITHIN
    }
    for name in WITHIN.keys() & prompt.spans.keys():
        outer = spans.get(WITHIN[name], ())
        inner = {i: cover for i, cover in covers.items() if i in outer}
        spans[name] = _touched(text, inner, prompt.spans[name])
    spans |= {"bos": tuple(range(bos)), "last": (len(ids) - 1,), "target": ()}
    if prompt.templated:
        parts = {i for name in ("bos", "opening", "hijack", "query") for i in spans[name]}
        spans["template"] = tuple(i for i in range(len(ids)) if i not in parts)
    return LocatedPrompt(ids, spans, text, offsets)
