"""The token trie: all prefixes that a run reads as one tree, which shows what they share.

Prefixes are sequences of symbols (`hijacklens.prompts.layout`), so with probes on, two prompts
share a token exactly if it is the same token in the same spans. The tree is stored as its leaves in
lexicographic order, each with the number of symbols it shares with the leaf before. This describes
a compressed prefix tree completely, and every subtree is a stretch of neighbouring leaves:

    leaf                               shared
    Do not think of Guam . Rome is        0      ─ Do not think of Guam . ┬ Rome is
    Do not think of Guam . The            6                               └ The
    Rome is                               0      ─ Rome is

>>> trie = Trie.of([(1, 2, 3), (1, 2), (1, 2, 4, 5), (7,)])
>>> trie.leaves, trie.shared
([(1, 2, 3), (1, 2, 4, 5), (7,)], [0, 2, 0])
>>> trie.tokens, trie.nodes
(8, 6)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hijacklens.prompts.tokens import TokenIds


@dataclass(frozen=True, slots=True)
class Trie:
    """The prefix tree of a set of prefixes."""

    leaves: list[TokenIds]
    """The prefixes that no other prefix continues, in lexicographic order."""
    shared: list[int]
    """How many symbols each leaf shares with the one before it; fewer than either has."""
    reads: list[tuple[TokenIds, ...]]
    """For each leaf, the prefixes of it that are read, shortest first; each is listed once."""

    @classmethod
    def of(cls, prefixes: Iterable[TokenIds], reads: Iterable[TokenIds] | None = None) -> Trie:
        """Build the tree of prefixes; equal ones count once.

        Args:
            prefixes: The prefixes in the tree.
            reads: The prefixes that are read; by default all.

        Note:
            Costs a sort: 1 s for the 131,120 distinct prompts of the complete CounterFact at doses
            0 to 5, on one core.
        """
        leaves: list[TokenIds] = []
        shared: list[int] = []
        leaf_reads: list[tuple[TokenIds, ...]] = []
        pending: list[TokenIds] = []  # each is a prefix of the next
        nodes = set(prefixes)
        read = nodes if reads is None else set(reads)
        # In lexicographic order a sequence directly follows its own prefixes.
        ordered = sorted(nodes | read)
        for prefix, following in zip(ordered, [*ordered[1:], ()], strict=False):
            if prefix in read:
                pending.append(prefix)
            if following[: len(prefix)] != prefix:
                shared.append(common(leaves[-1], prefix) if leaves else 0)
                leaves.append(prefix)
                leaf_reads.append(tuple(pending))
                pending = []
        return cls(leaves, shared, leaf_reads)

    @property
    def tokens(self) -> int:
        """Tokens of all leaves, each by itself: what a run without sharing computes."""
        return sum(map(len, self.leaves))

    @property
    def nodes(self) -> int:
        """Distinct nodes: the fewest tokens that any run can compute."""
        return self.tokens - sum(self.shared)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix.

    >>> common((1, 2, 3), (1, 2, 4))
    2
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def naive_tokens(groups: Iterable[Iterable[TokenIds]]) -> int:
    """Count the tokens of prompts that share nothing; each group holds the prefixes of one prompt.

    >>> naive_tokens([[(1, 2), (1, 2, 3)], [(1, 2)]])
    5
    """
    return sum(Trie.of(group).tokens for group in groups)
