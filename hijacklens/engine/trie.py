"""The token trie: all prefixes that a run asks for as one tree, so that what they share shows.

Prefixes are made of symbols (`hijacklens.prompts.layout`), so with probes on two prompts share a
token exactly if it is the same token in the same spans. The tree is kept in the form of its leaves
in lexicographic order, each with the number of symbols that it shares with the leaf before; that
says
everything about a compressed prefix tree, and a subtree is a stretch of neighbours:

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
    """The prefixes that begin no other one, in lexicographic order."""
    shared: list[int]
    """How many symbols each leaf shares with the one before it; less than either has."""
    reads: list[tuple[TokenIds, ...]]
    """The prefixes that are read on the way to each leaf, shortest first; each stands once."""

    @classmethod
    def of(cls, prefixes: Iterable[TokenIds], reads: Iterable[TokenIds] | None = None) -> Trie:
        """The tree of prefixes; equal ones count once.

        Args:
            prefixes: What the tree holds.
            reads: Those of them that are read; all by default.

        Note:
            Costs a sort: 1 s for the 131,120 distinct prompts of the whole CounterFact at doses 0
            to 5, on one core.
        """
        leaves: list[TokenIds] = []
        shared: list[int] = []
        read_at: list[tuple[TokenIds, ...]] = []
        on_the_way: list[TokenIds] = []  # each begins the next
        held = set(prefixes)
        wanted = held if reads is None else set(reads)
        # In lexicographic order a sequence directly follows its own prefixes.
        ordered = sorted(held | wanted)
        for prefix, following in zip(ordered, [*ordered[1:], ()], strict=False):
            if prefix in wanted:
                on_the_way.append(prefix)
            if following[: len(prefix)] != prefix:
                shared.append(common(leaves[-1], prefix) if leaves else 0)
                leaves.append(prefix)
                read_at.append(tuple(on_the_way))
                on_the_way = []
        return cls(leaves, shared, read_at)

    @property
    def tokens(self) -> int:
        """Tokens of all leaves, each by itself: what a run without sharing computes."""
        return sum(map(len, self.leaves))

    @property
    def nodes(self) -> int:
        """Distinct nodes: the fewest tokens that any run has to compute."""
        return self.tokens - sum(self.shared)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common beginning.

    >>> common((1, 2, 3), (1, 2, 4))
    2
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def naive_tokens(groups: Iterable[Iterable[TokenIds]]) -> int:
    """Tokens of prompts without any sharing among them, each group of prefixes being one prompt.

    >>> naive_tokens([[(1, 2), (1, 2, 3)], [(1, 2)]])
    5
    """
    return sum(Trie.of(group).tokens for group in groups)
