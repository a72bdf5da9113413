"""A layout: the tokens of one forward pass and the spans that they stand in.

Probes are written against a layout and never against positions, so one probe serves a prompt, a
batch of prompts of different lengths, a pack of prompts that share tokens, and the contexts of
the one-layer model.

A token in its place is one integer, a *symbol*: the token id, and above its 32nd bit one bit for
each span that the token stands in. Two prompts can share the computation of a token exactly if
their symbols agree up to it.

>>> symbols = mark((7, 8, 9), [(0, 1), (1,)])
>>> layout = Layout.of_symbols(torch.tensor([symbols]), ("hijack", "subject"))
>>> layout.tokens.tolist(), layout.query("subject").tolist()
([[7, 8, 9]], [[False, True, False]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hijacklens.errors import InputError, unknown
from hijacklens.prompts.spans import AT, EVERYWHERE, OTHER_FORMS, TEXT, TOKEN, atoms

ID_BITS = 32
TOKEN_MASK = (1 << ID_BITS) - 1
MOST_SPANS = 31
"""Spans that one run can tell apart: the bits of a 64-bit integer that the token id leaves."""


def mark(ids: Sequence[int], places: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Symbols: token ids, with a bit set for every span whose positions hold the token.

    Args:
        ids: Token ids.
        places: For each span the positions of its tokens; those behind the end are left out.

    Raises:
        InputError: There are more spans than a symbol has bits for.
    """
    _check_count(places)
    symbols = list(ids)
    for bit, held in enumerate(places):
        for place in held:
            if place < len(symbols):
                symbols[place] |= 1 << (ID_BITS + bit)
    return tuple(symbols)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens that a forward pass computes, and those it sees from a key/value cache."""

    tokens: Int[Tensor, "batch query"]
    spans: Mapping[str, Bool[Tensor, "batch query"]]
    """Span (without `+`) -> the tokens that stand in it."""
    past_tokens: Int[Tensor, "batch past"] | None = None
    """Tokens whose keys and values come from a cache; they stand before `tokens`."""
    past_spans: Mapping[str, Bool[Tensor, "batch past"]] = field(default_factory=dict)

    @classmethod
    def of_symbols(
        cls,
        symbols: Int[Tensor, "batch query"],
        names: Sequence[str],
        past: Int[Tensor, "batch past"] | None = None,
    ) -> Layout:
        """The layout of symbols whose bits stand for the spans `names`, in order."""
        return cls(
            symbols & TOKEN_MASK,
            _unmark(symbols, names),
            None if past is None else past & TOKEN_MASK,
            {} if past is None else _unmark(past, names),
        )

    def query(self, span: str) -> Bool[Tensor, "batch query"]:
        """Which of the computed tokens stand in a span.

        Raises:
            InputError: The span has a name that is not known here.
        """
        return _mask(span, self.tokens, self.spans)

    def key(self, span: str) -> Bool[Tensor, "batch key"]:
        """Which of the tokens that can be attended to stand in a span, cached ones first.

        Raises:
            InputError: The span has a name that is not known here.
        """
        own = self.query(span)
        if self.past_tokens is None:
            return own
        return torch.cat([_mask(span, self.past_tokens, self.past_spans), own], dim=1)

    def pairs(self, source: str, target: str) -> Bool[Tensor, "batch 1 query key"]:
        """The pairs of a query token in `source` and a key token in `target`.

        The axes are those of attention scores and patterns, with one place for the heads.
        """
        return (self.query(source)[:, :, None] & self.key(target)[:, None, :])[:, None]


def _unmark(symbols: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    _check_count(names)
    return {name: (symbols >> (ID_BITS + bit)) & 1 != 0 for bit, name in enumerate(names)}


def _check_count(spans: Sequence[object]) -> None:
    if len(spans) > MOST_SPANS:
        raise InputError(f"probes of one run can name {MOST_SPANS} spans, not {len(spans)}.")


def _mask(span: str, tokens: Tensor, spans: Mapping[str, Tensor]) -> Tensor:
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for atom in atoms(span):
        if atom in spans:
            found = found | spans[atom]
        elif atom == EVERYWHERE:
            found = torch.ones_like(found)
        elif atom.startswith(TOKEN):
            found = found | (tokens == int(atom.removeprefix(TOKEN)))
        else:
            named = [name for name in spans if not name.startswith((TEXT, AT))]
            raise unknown("span", atom, [*named, EVERYWHERE], OTHER_FORMS)
    return found
