"""A layout: the tokens of one forward pass and their spans.

Probes refer to a layout and never to positions. So one probe serves a prompt, a batch of prompts of
different lengths, a pack of prompts that share tokens, and the contexts of the one-layer model.

A token with its spans is one integer, a *symbol*: the token id in the lower 32 bits, and above them
one bit for each span that holds the token. Two prompts can share the computation of a token exactly
if their symbols agree up to that token.

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
"""Maximum number of spans in a run: the bits of a 64-bit integer beyond the token id."""


def mark(ids: Sequence[int], spans: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the symbols of tokens: their ids, with a bit set for every span that holds them.

    `spans` has the positions of the tokens of each span; positions past the end are ignored.

    Raises:
        InputError: There are more spans than a symbol has bits for.
    """
    _check_count(spans)
    symbols = list(ids)
    for bit, positions in enumerate(spans):
        for position in positions:
            if position < len(symbols):
                symbols[position] |= 1 << (ID_BITS + bit)
    return tuple(symbols)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens that a forward pass computes, and those that a key/value cache provides."""

    tokens: Int[Tensor, "batch query"]
    spans: Mapping[str, Bool[Tensor, "batch query"]]
    """Span (without `+`) -> mask of its tokens."""
    past_tokens: Int[Tensor, "batch past"] | None = None
    """Tokens whose keys and values come from a cache; they precede `tokens`."""
    past_spans: Mapping[str, Bool[Tensor, "batch past"]] = field(default_factory=dict)

    @classmethod
    def of_symbols(
        cls,
        symbols: Int[Tensor, "batch query"],
        names: Sequence[str],
        past: Int[Tensor, "batch past"] | None = None,
    ) -> Layout:
        """Return the layout of symbols whose bits mean the spans `names`, in order."""
        return cls(
            symbols & TOKEN_MASK,
            _unmark(symbols, names),
            None if past is None else past & TOKEN_MASK,
            {} if past is None else _unmark(past, names),
        )

    def query(self, span: str) -> Bool[Tensor, "batch query"]:
        """Return the mask of the computed tokens in a span.

        Raises:
            InputError: The layout has no span of that name.
        """
        return _mask(span, self.tokens, self.spans)

    def key(self, span: str) -> Bool[Tensor, "batch key"]:
        """Return the mask of the tokens in a span that can be attended to, cached ones first.

        Raises:
            InputError: As `query`.
        """
        computed = self.query(span)
        if self.past_tokens is None:
            return computed
        return torch.cat([_mask(span, self.past_tokens, self.past_spans), computed], dim=1)

    def pairs(self, source: str, target: str) -> Bool[Tensor, "batch 1 query key"]:
        """Return the mask of pairs of a query token in `source` and a key token in `target`.

        The axes are those of attention scores and patterns, with size 1 for the heads.
        """
        return (self.query(source)[:, :, None] & self.key(target)[:, None, :])[:, None]


def _unmark(symbols: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    _check_count(names)
    return {name: (symbols >> (ID_BITS + bit)) & 1 != 0 for bit, name in enumerate(names)}


def _check_count(spans: Sequence[object]) -> None:
    if len(spans) > MOST_SPANS:
        raise InputError(f"probes of one run can name {MOST_SPANS} spans, not {len(spans)}.")


def _mask(span: str, tokens: Tensor, spans: Mapping[str, Tensor]) -> Tensor:
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for atom in atoms(span):
        if atom in spans:
            mask = mask | spans[atom]
        elif atom == EVERYWHERE:
            mask = torch.ones_like(mask)
        elif atom.startswith(TOKEN):
            mask = mask | (tokens == int(atom.removeprefix(TOKEN)))
        else:
            names = [name for name in spans if not name.startswith((TEXT, AT))]
            raise unknown("span", atom, [*names, EVERYWHERE], OTHER_FORMS)
    return mask
