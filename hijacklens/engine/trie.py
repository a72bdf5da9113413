"""The token trie: all prefixes that a run reads as one tree, which shows what they share.

Prefixes are sequences of symbols (`hijacklens.prompts.layout`), so with probes on, two prompts
share a token exactly if it is the same token in the same spans. The tree is stored as its leaves in
lexicographic order, each with the number of symbols it shares with the leaf before. This describes
a compressed prefix tree completely, and every subtree is a stretch of neighbouring leaves:

    leaf                               shared
    Do not think of Guam . Rome is        0      ─ Do not think of Guam . ┬ Rome is
    Do not think of Guam . The            6                               └ The
    Rome is                               0      ─ Rome is

>>> from hijacklens.prompts.prefixes import prefix_of, symbols_of
>>> trie = Trie.of(map(prefix_of, [(1, 2, 3), (1, 2), (1, 2, 4, 5), (7,)]))
>>> list(map(symbols_of, trie.leaves)), trie.shared.tolist()
([(1, 2, 3), (1, 2, 4, 5), (7,)], [0, 2, 0])
>>> trie.tokens, trie.nodes
(8, 6)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from hijacklens.engine.ragged import ranges, starts
from hijacklens.prompts.prefixes import WIDTH, Prefix

AT_ONCE = 2**18
"""Symbols of prefixes that are compared at once, which bounds the memory for it."""


@dataclass(frozen=True, slots=True)
class Trie:
    """The prefix tree of a set of prefixes."""

    leaves: list[Prefix]
    """The prefixes that no other prefix continues, in lexicographic order."""
    shared: Int[np.ndarray, " leaf"]
    """How many symbols each leaf shares with the one before it; fewer than either has."""
    reads: Int[np.ndarray, "read 2"]
    """Of every prefix that is read, in lexicographic order: its length in symbols, and its id."""
    first_read: Int[np.ndarray, " starts"]
    """The index in `reads` of the first prefix of each leaf, and the number of reads."""

    @classmethod
    def of(cls, prefixes: Iterable[Prefix], ids: Mapping[Prefix, int] | None = None) -> Trie:
        """Build the tree of prefixes; equal ones count once.

        Args:
            prefixes: The prefixes in the tree, none empty.
            ids: The prefixes that are read, with their ids; by default all, numbered in
                lexicographic order.

        Note:
            Costs a sort of the prefixes, if they are not sorted.
        """
        ordered = list(prefixes)
        if ids or any(one >= next_one for one, next_one in pairwise(ordered)):
            ordered = sorted({*ordered, *(ids or ())})
        lengths = _lengths(ordered)
        overlaps = _overlaps(ordered, lengths)
        # In lexicographic order a sequence directly follows its own prefixes, so a leaf is a prefix
        # that the next one does not continue, and those since the leaf before are parts of it.
        leaves = np.flatnonzero(np.append(overlaps[1:], 0) < lengths)
        first = np.append(0, leaves[:-1] + 1)[: len(leaves)]
        shared = np.minimum.reduceat(overlaps, first) if len(leaves) else leaves
        read = [i for i, prefix in enumerate(ordered) if ids is None or prefix in ids]
        numbers = read if ids is None else [ids[ordered[i]] for i in read]
        return cls(
            leaves=[ordered[i] for i in leaves.tolist()],
            shared=shared,
            reads=np.array([lengths[read], numbers], dtype=np.int64).T,
            first_read=np.searchsorted(read, np.append(first, len(ordered))),
        )

    @classmethod
    def apart(cls, prefixes: Iterable[Prefix]) -> Trie:
        """Return a leaf for every prefix, even if another one continues it; nothing is shared."""
        leaves = sorted(set(prefixes))
        order = np.arange(len(leaves) + 1)
        lengths = _lengths(leaves)
        return cls(leaves, 0 * lengths, np.stack([lengths, order[:-1]], axis=1), order)

    @property
    def lengths(self) -> Int[np.ndarray, " leaf"]:
        """The number of symbols of each leaf."""
        return _lengths(self.leaves)

    @property
    def tokens(self) -> int:
        """Tokens of all leaves, each by itself: what a run without sharing computes."""
        return int(self.lengths.sum())

    @property
    def nodes(self) -> int:
        """Distinct nodes: the fewest tokens that any run can compute."""
        return self.tokens - int(self.shared.sum())


def _lengths(prefixes: Sequence[Prefix]) -> Int[np.ndarray, " prefix"]:
    """Return the number of symbols of each prefix."""
    return np.fromiter(map(len, prefixes), np.int64, len(prefixes)) // WIDTH


def _overlaps(
    prefixes: Sequence[Prefix], lengths: Int[np.ndarray, " prefix"]
) -> Int[np.ndarray, " prefix"]:
    """Return how many symbols each prefix shares with the one before it, and 0 for the first."""
    overlaps = np.zeros_like(lengths)
    cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // AT_ONCE)) + 1
    for first, stop in pairwise([0, *cuts.tolist(), len(prefixes)]):
        part = slice(max(first - 1, 0), stop)  # with the last one before
        symbols = np.frombuffer(b"".join(prefixes[part]) + bytes(WIDTH), np.int64)
        n = lengths[part]
        begin = starts(n)
        # Of each pair as many symbols as the shorter one has, and one more, which decides nothing.
        most = np.minimum(n[1:], n[:-1])
        count = most + 1
        before, after = (symbols[ranges(x, count)] for x in (begin[:-1], begin[1:]))
        differing = np.where(before == after, np.repeat(most, count), ranges(0 * most, count))
        if len(most):
            overlaps[part][1:] = np.minimum.reduceat(differing, starts(count))
    return overlaps
