"""What a plan reads, prefix by prefix."""

from __future__ import annotations

from hijacklens.engine.plan import Plan
from hijacklens.engine.trie import Trie
from hijacklens.prompts.prefixes import WIDTH, Prefix, symbols_of
from hijacklens.prompts.tokens import TokenIds


def leaf_reads(trie: Trie) -> list[tuple[TokenIds, ...]]:
    """The prefixes that are read on each leaf, shortest first."""
    lengths = trie.reads[:, 0].tolist()
    return [
        tuple(symbols_of(Prefix(leaf[: WIDTH * n])) for n in lengths[first:stop])
        for leaf, first, stop in zip(
            trie.leaves, trie.first_read[:-1], trie.first_read[1:], strict=True
        )
    ]


def planned_reads(plan: Plan) -> list[TokenIds]:
    """The prefixes that a plan reads, sorted; one that is read twice is listed twice."""
    levels = [level for unit in plan.units for level in unit.levels]
    return sorted(
        prefix
        for level in levels
        for pack in level.packs
        for prefixes in leaf_reads(level.trie)[pack.first : pack.stop]
        for prefix in prefixes
        if len(prefix) > pack.past
    )
