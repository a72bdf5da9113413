"""Correspondence: which tokens of two prompts of a query are the same, position apart.

A hijacked prompt is its bare query with sentences before it, so the tokens of the query correspond
one to one, counted from the right; those of the sentences have no counterpart, and nothing is
ever copied from or to them.

    bare        <bos>                               The   Eiffel  Tower  is  in
                  |                                  |      |       |    |   |
    hijacked    <bos>  Do not think of Guam .        The   Eiffel  Tower  is  in
                       (no counterpart)

The first word of a query may be cut differently behind a sentence ("Dan", "ielle" against
" Danielle"). Two tokens correspond if they end at the same character of the query, for then they
have read the same of it; a token of the first word with no such partner ("Dan") has no
counterpart and is counted. Everywhere else the token ids have to be the same.

>>> def prompt(text, ids, offsets, query):
...     spans = {"bos": (0,), "query": query, "last": query[-1:]}
...     return LocatedPrompt(ids, spans, text, offsets)
>>> bare = prompt("Ann is", (1, 7, 8), ((0, 0), (0, 3), (3, 6)), (1, 2))
>>> hijacked = prompt("No. Ann is", (1, 5, 9, 8), ((0, 0), (0, 3), (3, 7), (7, 10)), (2, 3))
>>> align(bare, hijacked, span="all").pairs
((0, 0), (1, 2), (2, 3))
>>> align(bare, hijacked, span="last").pairs
((2, 3),)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from hijacklens.errors import InputError
from hijacklens.layout import Layout
from hijacklens.spans import EVERYWHERE, atoms
from hijacklens.tokens import LocatedPrompt, TokenIds


@dataclass(frozen=True, slots=True)
class Correspondence:
    """Token positions of a source and a target prompt that correspond, one to one.

    Raises:
        InputError: A position lies outside its prompt, or occurs twice.
    """

    source: TokenIds
    """The prompt that activations are taken from."""
    target: TokenIds
    """The prompt that they are put into."""
    pairs: tuple[tuple[int, int], ...]
    """Source position and target position of each pair, in order."""
    unmatched: int = 0
    """Tokens of the first word of the query, of either prompt, that have no counterpart."""

    def __post_init__(self) -> None:
        for side, (name, ids) in enumerate((("source", self.source), ("target", self.target))):
            places = [pair[side] for pair in self.pairs]
            if len(set(places)) < len(places) or any(not 0 <= p < len(ids) for p in places):
                raise InputError(
                    f"the {name} positions {places} do not fit a prompt of {len(ids)} tokens: "
                    "each lies in it, counted from 0, and occurs once."
                )


def align(source: LocatedPrompt, target: LocatedPrompt, *, span: str = "query") -> Correspondence:
    """The tokens of a span that correspond in two prompts of one query.

    Args:
        source: Where activations are taken from.
        target: Where they are put.
        span: Which of the tokens that correspond: those that stand in it in both prompts. `query`
            has `subject` and `last` in it, and `all` also `bos`.

    Raises:
        InputError: The queries differ in more than how their first word is cut, or no token of
            the span has a counterpart.
    """
    pairs, unmatched = _corresponding(source, target)
    inside = [
        {place for atom in atoms(span) for place in prompt.positions(atom)}
        for prompt in (source, target)
    ]
    chosen = tuple((i, j) for i, j in pairs if i in inside[0] and j in inside[1])
    if not chosen:
        raise InputError(
            f"no token of the span {span!r} of {source.text!r} has a counterpart in "
            f"{target.text!r}; only those of the query and a BOS have one."
        )
    return Correspondence(source.ids, target.ids, chosen, unmatched)


def align_contexts(
    source: Layout, target: Layout, *, span: str = EVERYWHERE
) -> list[Correspondence]:
    """The tokens of a span in two batches of contexts, row by row and in their order.

    For the one-layer model, and for prompts that are equally long and not padded.

    Raises:
        InputError: The batches differ in size, or a row has not as many tokens in the span as its
            counterpart.
    """
    if len(source.tokens) != len(target.tokens):
        raise InputError(
            f"{len(source.tokens)} contexts cannot be aligned with {len(target.tokens)}."
        )
    found = []
    rows = zip(source.tokens, target.tokens, source.query(span), target.query(span), strict=True)
    for from_ids, to_ids, from_mask, to_mask in rows:
        places = [mask.nonzero()[:, 0].tolist() for mask in (from_mask, to_mask)]
        if len(places[0]) != len(places[1]):
            raise InputError(
                f"the span {span!r} has {len(places[0])} tokens in one context and "
                f"{len(places[1])} in the other, so they do not correspond one to one."
            )
        pairs = tuple(zip(*places, strict=True))
        found.append(Correspondence(tuple(from_ids.tolist()), tuple(to_ids.tolist()), pairs))
    return found


def _corresponding(
    source: LocatedPrompt, target: LocatedPrompt
) -> tuple[list[tuple[int, int]], int]:
    """All pairs of tokens that correspond, and how many of the first word have no partner."""
    texts = [_query_text(prompt) for prompt in (source, target)]
    if texts[0] != texts[1]:
        raise InputError(
            f"the queries {texts[0]!r} and {texts[1]!r} differ, so their tokens do not correspond; "
            "align prompts of one fact."
        )
    ends = [_by_end(prompt) for prompt in (source, target)]
    # Behind the first word, counted from the right as `_by_end` does.
    behind = len(texts[0]) - len(texts[0].split(maxsplit=1)[0])
    pairs: list[tuple[int, int]] = []
    unmatched = 0
    for end in sorted({*ends[0], *ends[1]}):
        here = [side.get(end, []) for side in ends]
        tokens = [
            [prompt.ids[i] for i in places]
            for prompt, places in zip((source, target), here, strict=True)
        ]
        if end < behind and tokens[0] != tokens[1]:
            raise InputError(
                f"the query {texts[0]!r} is cut into other tokens in {target.text!r} than in "
                f"{source.text!r}, and not only in its first word; it cannot be aligned."
            )
        # The bytes of one letter all end at it; the last of them is the last.
        joined = list(zip(reversed(here[0]), reversed(here[1]), strict=False))
        pairs += joined
        unmatched += len(here[0]) + len(here[1]) - 2 * len(joined)
    bos = [prompt.spans["bos"] for prompt in (source, target)]
    return sorted([*zip(*bos, strict=True), *pairs]), unmatched


def _query_text(prompt: LocatedPrompt) -> str:
    return prompt.text[prompt.offsets[prompt.spans["query"][0]][0] :].lstrip()


def _by_end(prompt: LocatedPrompt) -> dict[int, list[int]]:
    """How many characters stand behind a token -> the tokens of the query of which that holds."""
    found: dict[int, list[int]] = defaultdict(list)
    for place in prompt.spans["query"]:
        found[len(prompt.text) - prompt.offsets[place][1]].append(place)
    return found
