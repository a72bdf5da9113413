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
counterpart and is counted. Everywhere else the token ids have to be the same. `groups` is what
both this and the account of a shift (`probes.inputs.alignment`) are made of.

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

from dataclasses import dataclass

from hijacklens.errors import InputError
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import EVERYWHERE, atoms
from hijacklens.prompts.tokens import LocatedPrompt, TokenIds


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens of two prompts that cover the same characters; one side may have none."""

    source: tuple[int, ...]
    """Positions in the source prompt."""
    target: tuple[int, ...]


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


def groups(source: LocatedPrompt, target: LocatedPrompt) -> tuple[Group, ...]:
    """All tokens of two prompts of one query, in the smallest groups of the same characters.

    A group of the query mostly holds one token of each prompt, and several where they are cut
    differently; a token of a hijacking sentence is alone. Each token is in one group; those of
    the target are in its order, and those that only the source has come first.
    """
    ends = {_to_end(source, i) for i in _from_query(source)}
    ends &= {_to_end(target, i) for i in _from_query(target)}
    left, right = (_by_key(prompt, side, ends) for side, prompt in enumerate((source, target)))
    both = [Group(left.pop(key, ()), places) for key, places in right.items()]
    return (*(Group(places, ()) for places in left.values()), *both)


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
    # Behind the first word, counted from the end of the text.
    behind = len(texts[0]) - len(texts[0].split(maxsplit=1)[0])
    queries = [set(prompt.spans["query"]) for prompt in (source, target)]
    pairs: list[tuple[int, int]] = []
    unmatched = 0
    for group in groups(source, target):
        own = [i for i in group.source if i in queries[0]]
        other = [i for i in group.target if i in queries[1]]
        cuts = [
            [(_to_end(prompt, i), prompt.ids[i]) for i in held if _to_end(prompt, i) < behind]
            for prompt, held in ((source, own), (target, other))
        ]
        if cuts[0] != cuts[1]:
            raise InputError(
                f"the query {texts[0]!r} is cut into other tokens in {target.text!r} than in "
                f"{source.text!r}, and not only in its first word; it cannot be aligned."
            )
        # Those that end where the group does; the bytes of one letter all end at it.
        held = (_at_the_end(source, own), _at_the_end(target, other))
        joined = list(zip(*map(reversed, held), strict=False))
        pairs += joined
        unmatched += len(own) + len(other) - 2 * len(joined)
    bos = [prompt.spans["bos"] for prompt in (source, target)]
    return sorted([*zip(*bos, strict=True), *pairs]), unmatched


def _query_text(prompt: LocatedPrompt) -> str:
    return prompt.text[prompt.offsets[prompt.spans["query"][0]][0] :].lstrip()


def _from_query(prompt: LocatedPrompt) -> range:
    return range(min(prompt.spans["query"]), len(prompt.ids))


def _to_end(prompt: LocatedPrompt, place: int) -> int:
    """How many characters stand behind a token."""
    return len(prompt.text) - prompt.offsets[place][1]


def _at_the_end(prompt: LocatedPrompt, places: list[int]) -> list[int]:
    return [i for i in places if _to_end(prompt, i) == _to_end(prompt, places[-1])]


def _by_key(
    prompt: LocatedPrompt, side: int, ends: set[int]
) -> dict[tuple[str, int, int], tuple[int, ...]]:
    """A key that both prompts have for the same tokens -> positions, in their order.

    Characters are counted from the end of the text, as the sentences stand before the query.
    """
    bos, hijack = set(prompt.spans["bos"]), set(prompt.spans.get("hijack", ()))
    query = _from_query(prompt)
    found: dict[tuple[str, int, int], list[int]] = {}
    separators = 0
    for i in range(len(prompt.ids)):
        if i in query:
            to_end = _to_end(prompt, i)
            key = ("query", max(end for end in ends if end <= to_end), 0)
        elif i in hijack:
            key = ("hijack", i, side)  # of this prompt alone
        elif i in bos:
            key = ("bos", i, 0)
        else:
            key = ("separator", separators, 0)
            separators += 1
        found.setdefault(key, []).append(i)
    return {key: tuple(places) for key, places in found.items()}
