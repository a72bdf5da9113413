"""Correspondence: which tokens of two prompts of one query are the same.

A hijacked prompt is its bare query with sentences before it, so the tokens of the query correspond
one to one, counted from the right. Tokens of the sentences have no counterpart.

    bare        <bos>                               The   Eiffel  Tower  is  in
                  |                                  |      |       |    |   |
    hijacked    <bos>  Do not think of Guam .        The   Eiffel  Tower  is  in

The first word of a query may be tokenised differently after a sentence ("Dan", "ielle" instead of
" Danielle"). `align` pairs tokens for patching: two tokens correspond if they are the same token at
the same characters of the query, and neither or both open their prompt, since the first token of a
prompt is an attention sink. So all tokens correspond if the facts have an opening ("Well."), whose
tokens both prompts share. `units` groups the tokens of both prompts for an account of a shift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile
from typing import Any, TypeAlias

from hijacklens.errors import InputError
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import EVERYWHERE, atoms
from hijacklens.prompts.tokens import LocatedPrompt, TokenIds

Positions: TypeAlias = tuple[int, ...]
SPANS = (
    "bos",
    "hijack",
    "mention",
    "separator",
    "query",
    "subject",
    "last",
    "opening",
    "template",
)
"""Spans that share no token, so that sums over spans are sums over tokens.

`mention` holds the targets (or related words) named in a hijacking sentence and `hijack` the rest
of the sentence; `last` is the last token, where the answer is read, `subject` the subject, and
`query` the rest of the bare query. `template` has what a chat template adds. `separator` has no
tokens: in results of earlier versions it held the spaces before a query that are separate tokens.
"""
OPENS = (
    "the subject opens the bare prompt, where its first token is an attention sink or is written "
    "without a space, so no token of the hijacked prompt corresponds to it; put a neutral text "
    "before both prompts: facts.with_opening('Well.')"
)


@dataclass(frozen=True, slots=True)
class Unit:
    """Tokens of the bare and of the hijacked prompt that cover the same characters.

    Usually one token of each prompt; several where the prompts are tokenised differently. A token
    that the other prompt lacks has no counterpart.
    """

    span: str
    """One of `SPANS`."""
    token: str
    """The text without surrounding spaces; for a token without text its name."""
    bare: Positions
    hijacked: Positions


@dataclass(frozen=True, slots=True)
class Correspondence:
    """Token positions of a source and a target prompt that correspond one to one.

    Raises:
        InputError: A position lies outside its prompt or occurs twice.
    """

    source: TokenIds
    """The prompt that activations are taken from."""
    target: TokenIds
    """The prompt that they are put into."""
    pairs: tuple[tuple[int, int], ...]
    """Source position and target position of each pair, in order."""
    unmatched: int = 0
    """How many tokens of the query's first word, in either prompt, have no counterpart; these are
    not patched."""

    def __post_init__(self) -> None:
        for side, (name, ids) in enumerate((("source", self.source), ("target", self.target))):
            positions = [pair[side] for pair in self.pairs]
            if len(set(positions) & set(range(len(ids)))) < len(positions):
                raise InputError(
                    f"the {name} positions {positions} do not fit a prompt of {len(ids)} tokens: "
                    "each must be inside the prompt, counted from 0, and occur once."
                )


def align(source: LocatedPrompt, target: LocatedPrompt, *, span: str = "query") -> Correspondence:
    """Pair the tokens of a span in two prompts of one query.

    `query` includes `subject` and `last`; `all` also includes `bos` and `opening`.

    Raises:
        InputError: The queries differ, they are tokenised differently after their first word, no
            token of the span has a counterpart, or the span is `subject` and a token of it has
            none.
    """
    pairs, unmatched = _corresponding(source, target)
    if "subject" in atoms(span):
        paired = zip(*pairs, strict=True) if pairs else ((), ())
        for prompt, positions in zip((source, target), paired, strict=True):
            if not set(prompt.positions("subject")) <= set(positions):
                raise InputError(OPENS)
    from_span, to_span = (
        {position for atom in atoms(span) for position in prompt.positions(atom)}
        for prompt in (source, target)
    )
    in_span = tuple((i, j) for i, j in pairs if i in from_span and j in to_span)
    if not in_span:
        raise InputError(
            f"no token of the span {span!r} of {source.text!r} has a counterpart in "
            f"{target.text!r}; only tokens of the query, of an opening and a BOS have one."
        )
    return Correspondence(source.ids, target.ids, in_span, unmatched)


def align_contexts(
    source: Layout, target: Layout, *, span: str = EVERYWHERE
) -> list[Correspondence]:
    """Pair the tokens of a span in two batches of contexts, row by row and in order.

    For contexts of the one-layer model, and for unpadded prompts of one length.

    Raises:
        InputError: The batches differ in size, or two rows have different numbers of tokens in
            the span.
    """
    if len(source.tokens) != len(target.tokens):
        raise InputError(
            f"{len(source.tokens)} contexts cannot be aligned with {len(target.tokens)}."
        )
    correspondences = []
    rows = zip(source.tokens, target.tokens, source.query(span), target.query(span), strict=True)
    for from_ids, to_ids, from_mask, to_mask in rows:
        positions = [mask.nonzero()[:, 0].tolist() for mask in (from_mask, to_mask)]
        if len(positions[0]) != len(positions[1]):
            raise InputError(
                f"the span {span!r} has {len(positions[0])} tokens in one context and "
                f"{len(positions[1])} in the other, so they do not correspond one to one."
            )
        pairs = tuple(zip(*positions, strict=True))
        ids = tuple(from_ids.tolist()), tuple(to_ids.tolist())
        correspondences.append(Correspondence(*ids, pairs))
    return correspondences


def units(bare: LocatedPrompt, hijacked: LocatedPrompt, tokenizer: Any) -> tuple[Unit, ...]:
    """Return all tokens of both prompts of a fact as units; each token is in exactly one.

    Units of the hijacked prompt are in its order, after tokens that only the bare prompt has.
    """
    aligned = []
    for source, target in _groups(bare, hijacked):
        prompt, positions = (hijacked, target) if target else (bare, source)
        text = _text(prompt, positions, tokenizer)
        aligned.append(Unit(_span(prompt, positions), text, source, target))
    return tuple(aligned)


def _groups(source: LocatedPrompt, target: LocatedPrompt) -> list[tuple[Positions, Positions]]:
    """Split the tokens of two prompts into the smallest groups that cover the same characters.

    Each token is in one group, a token of a hijacking sentence alone. Groups of the target are in
    its order, after those that only the source has.
    """
    both = [{_to_end(x, i) for i in _from_query(x)} for x in (source, target)]
    ends = both[0] & both[1]
    same = _same_template(source, target)
    left, right = (
        _by_key(prompt, side, ends, dict(zip(template, range(len(template)), strict=True)))
        for side, (prompt, template) in enumerate(zip((source, target), same, strict=True))
    )
    shared = [(left.pop(key, ()), positions) for key, positions in right.items()]
    return [*((positions, ()) for positions in left.values()), *shared]


def _corresponding(
    source: LocatedPrompt, target: LocatedPrompt
) -> tuple[list[tuple[int, int]], int]:
    """Return all pairs of tokens that correspond, and how many others the first word has."""
    prompts = (source, target)
    text, other = (x.text[x.offsets[_from_query(x)[0]][0] :].lstrip() for x in prompts)
    if text != other:
        raise InputError(
            f"the queries {text!r} and {other!r} differ, so their tokens do not correspond; "
            "align prompts of one fact."
        )
    # Characters after the first word, where both prompts must have the same tokens.
    rest = len(text) - len(text.split(maxsplit=1)[0])
    pairs: list[tuple[int, int]] = []
    for group in _groups(source, target):
        cuts = [
            [(prompt.ids[i], end) for i in positions if (end := _to_end(prompt, i)) < rest]
            for prompt, positions in zip(prompts, group, strict=True)
        ]
        if cuts[0] != cuts[1]:
            raise InputError(
                f"the query {text!r} is tokenised differently in {target.text!r} and in "
                f"{source.text!r}, beyond its first word; it cannot be aligned."
            )
        # Of tokens for the same characters, pair those that are the same, from the right.
        from_right = zip(*map(reversed, group), strict=False)
        same = takewhile(lambda pair: source.ids[pair[0]] == target.ids[pair[1]], from_right)
        pairs += [(i, j) for i, j in same if (i == 0) == (j == 0)]
    paired = sum(i >= _from_query(source)[0] for i, _ in pairs)
    return sorted(pairs), sum(len(_from_query(x)) for x in prompts) - 2 * paired


def _from_query(prompt: LocatedPrompt) -> range:
    return range(min(prompt.spans["query"]), len(prompt.ids))


def _to_end(prompt: LocatedPrompt, position: int) -> int:
    """Return how many characters follow a token."""
    return len(prompt.text) - prompt.offsets[position][1]


def _same_template(source: LocatedPrompt, target: LocatedPrompt) -> tuple[Positions, Positions]:
    """Return the tokens of a chat template before the query that both prompts have, in order."""
    listed = [
        [i for i in x.spans.get("template", ()) if i < _from_query(x)[0]] for x in (source, target)
    ]
    ids = [[x.ids[i] for i in of] for x, of in zip((source, target), listed, strict=True)]
    blocks = SequenceMatcher(None, *ids, autojunk=False).get_matching_blocks()
    found = [
        (listed[0][block.a + k], listed[1][block.b + k])
        for block in blocks
        for k in range(block.size)
    ]
    return tuple(i for i, _ in found), tuple(j for _, j in found)


def _by_key(
    prompt: LocatedPrompt, side: int, ends: set[int], template: Mapping[int, int]
) -> dict[tuple[str, int, int], Positions]:
    """Map a key that both prompts have for the same tokens to their positions, in order.

    Characters are counted from the end of the text, since the sentences precede the query.
    """
    bos, opening = set(prompt.spans["bos"]), set(prompt.spans.get("opening", ()))
    query = _from_query(prompt)
    positions: dict[tuple[str, int, int], list[int]] = {}
    for i in range(len(prompt.ids)):
        if i in query:
            to_end = _to_end(prompt, i)
            key = ("query", max(end for end in ends if end <= to_end), 0)
        elif i in bos:
            key = ("bos", i, 0)
        elif i in opening:
            key = ("opening", prompt.offsets[i][1] - prompt.offsets[min(opening)][0], 0)
        elif i in template:
            key = ("template", template[i], 0)
        else:
            key = ("hijack", i, side)  # of this prompt alone
        positions.setdefault(key, []).append(i)
    return {key: tuple(listed) for key, listed in positions.items()}


def _span(prompt: LocatedPrompt, positions: Sequence[int]) -> str:
    spans = ("last", "subject", "query", "mention", "opening", "bos", "template")
    return next((x for x in spans if set(positions) & set(prompt.spans.get(x, ()))), "hijack")


def _text(prompt: LocatedPrompt, positions: Sequence[int], tokenizer: Any) -> str:
    stretches = [prompt.offsets[i] for i in positions]
    text = prompt.text[min(a for a, _ in stretches) : max(b for _, b in stretches)].strip()
    return text or str(tokenizer.convert_ids_to_tokens(prompt.ids[positions[0]]))
