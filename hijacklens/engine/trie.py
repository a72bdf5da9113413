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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from hijacklens.prompts.prefixes import WIDTH, Prefix, common


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
            prefixes: The prefixes in the tree.
            ids: The prefixes that are read, with their ids; by default all, numbered in
                lexicographic order.

        Note:
            Costs a sort of the prefixes, if they are not sorted.
        """
        leaves: list[Prefix] = []
        shared: list[int] = []
        reads: list[tuple[int, int]] = []
        first = [0]
        ordered = list(prefixes)
        if ids or any(one >= next_one for one, next_one in pairwise(ordered)):
            ordered = sorted({*ordered, *(ids or ())})
        # In lexicographic order a sequence directly follows its own prefixes.
        for i, (prefix, following) in enumerate(pairwise([*ordered, b""])):
            if ids is None or prefix in ids:
                reads.append((len(prefix) // WIDTH, i if ids is None else ids[prefix]))
            if not following.startswith(prefix):
                shared.append(common(leaves[-1], prefix) if leaves else 0)
                leaves.append(prefix)
                first.append(len(reads))
        columns = np.array(reads, dtype=np.int64).reshape(-1, 2)
        return cls(leaves, np.array(shared, dtype=np.int64), columns, np.array(first))

    @classmethod
    def apart(cls, prefixes: Iterable[Prefix]) -> Trie:
        """Return a leaf for every prefix, even if another one continues it; nothing is shared."""
        leaves = sorted(set(prefixes))
        order = np.arange(len(leaves) + 1)
        lengths = np.fromiter(map(len, leaves), np.int64, len(leaves)) // WIDTH
        return cls(leaves, 0 * lengths, np.stack([lengths, order[:-1]], axis=1), order)

    @property
    def lengths(self) -> Int[np.ndarray, " leaf"]:
        """The number of symbols of each leaf."""
        return np.fromiter(map(len, self.leaves), np.int64, len(self.leaves)) // WIDTH

    @property
    def tokens(self) -> int:
        """Tokens of all leaves, each by itself: what a run without sharing computes."""
        return int(self.lengths.sum())

    @property
    def nodes(self) -> int:
        """Distinct nodes: the fewest tokens that any run can compute."""
        return self.tokens - int(self.shared.sum())
