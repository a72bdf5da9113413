"""Parts: what is to be read, cut into shares that workers can take one by one.

A part is a stretch of neighbouring leaves of the trie, so whatever its prompts share is computed
by one worker. Cuts are made where neighbours share least, near the places that would make parts of
one cost: what the leaves on both sides of a cut share is computed twice, and nothing else.

>>> wanted = {(*range(8), i): {0} for i in range(4)} | {(90, *range(8), i): {0} for i in range(4)}
>>> [(len(part.wanted), part.cost) for part in cut_parts(wanted, 2)]
[(4, 13), (4, 12)]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from hijacklens.engine.trie import Trie
from hijacklens.prompts.tokens import TokenIds

SLACK = 0.25
"""How far from its place a cut may be moved, in lengths of a part."""
PER_WORKER = 4
"""Parts for each worker, at least, so that none waits long for the last one."""
MOST_BATCHES = 16
"""Batches in a part, at most: what is lost with a worker."""


@dataclass(frozen=True, slots=True)
class Part:
    """A share of the work."""

    wanted: Mapping[TokenIds, Collection[int]]
    """Prefix -> the tokens whose log-probability behind it is wanted."""
    cost: int
    """Tokens that it computes."""


def cut_parts(
    wanted: Mapping[TokenIds, Collection[int]], count: int, *, shared: bool = True
) -> list[Part]:
    """Cut what is wanted into parts of about one cost, the most expensive first.

    Args:
        wanted: As `hijacklens.engine.engine.read` takes it.
        count: How many parts; there are fewer if there is less to cut.
        shared: Whether prompts share what they have in common; with a probe that does not pack,
            every prefix is computed by itself.

    Note:
        Costs a sort of the prefixes: 1 s for the whole CounterFact at doses 0 to 5.
    """
    if not wanted:
        return []
    trie = Trie.of(wanted)
    overlap = np.array(trie.shared)
    if shared:
        costs = np.fromiter(map(len, trie.leaves), np.int64) - overlap
    else:
        costs = np.array([sum(map(len, reads)) for reads in trie.reads])
    ends = np.cumsum(costs)
    cuts = _cuts(overlap, ends, count)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(trie.leaves)], strict=True):
        prefixes = [prefix for reads in trie.reads[start:stop] for prefix in reads]
        again = int(overlap[start]) if shared else 0
        cost = int(costs[start:stop].sum()) + again
        parts.append(Part({prefix: wanted[prefix] for prefix in prefixes}, cost))
    return sorted(parts, key=lambda part: -part.cost)


def count_parts(
    wanted: Mapping[TokenIds, Collection[int]], *, workers: int, batch_tokens: int
) -> int:
    """How many parts suit so many workers: enough to balance, none of less than a batch."""
    tokens = Trie.of(wanted).nodes
    few, many = max(workers, tokens // batch_tokens), tokens // (MOST_BATCHES * batch_tokens) + 1
    return min(few, max(PER_WORKER * workers, many))


def _cuts(overlap: np.ndarray, ends: np.ndarray, count: int) -> list[int]:
    """The first leaf of every part but the first."""
    length = ends[-1] / max(count, 1)
    cuts: list[int] = []
    for place in length * np.arange(1, count):
        low, high = (
            int(np.searchsorted(ends, place + side * SLACK * length, side="left")) + 1
            for side in (-1, 1)
        )
        low, high = max(low, cuts[-1] + 1 if cuts else 1), min(high + 1, len(ends))
        if low < high:
            far = np.abs(ends[low - 1 : high - 1] - place)
            cuts.append(low + int(np.lexsort((far, overlap[low:high]))[0]))
    return cuts
