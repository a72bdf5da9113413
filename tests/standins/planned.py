"""What a plan reads, prefix by prefix."""

from __future__ import annotations

from hijacklens.engine.plan import Plan
from hijacklens.prompts.tokens import TokenIds


def planned_reads(plan: Plan) -> list[TokenIds]:
    """The prefixes that a plan reads, sorted; one that is read twice is listed twice."""
    levels = [level for unit in plan.units for level in unit.levels]
    return sorted(
        prefix
        for level in levels
        for pack in level.packs
        for leaf_reads in level.trie.reads[pack.first : pack.stop]
        for prefix in leaf_reads
        if len(prefix) > pack.past
    )
