"""Parts: requests cut into pieces of similar cost, which workers read one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hijacklens.engine.reading import Requests
from hijacklens.engine.trie import Trie

SLACK = 0.25
"""How far a cut may be moved to where prompts share less, as a fraction of the length of a part."""

PER_WORKER = 4
"""Minimum number of parts per worker, so that no worker waits long for the last one."""

MOST_BATCHES = 16
"""Maximum number of batches in a part, all of which are lost if its worker dies."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the work."""

    requests: Requests
    cost: int
    """Tokens that it computes."""


def cut_parts(requests: Requests, count: int, *, shared: bool = True) -> list[Part]:
    """Cut requests into parts of similar cost, the most expensive first.

    Args:
        requests: As `hijacklens.engine.engine.read` takes them.
        count: Number of parts; there are fewer if there are fewer prompts.
        shared: Whether prompts share computed prefixes; with a probe that does not pack, every
            prefix is computed by itself.

    Note:
        Costs a sort of the prefixes: 1 s for the complete CounterFact at doses 0 to 5.
    """
    if not requests:
        return []
    trie = Trie.of(requests)
    overlap = np.array(trie.shared)
    if shared:
        costs = np.fromiter(map(len, trie.leaves), np.int64) - overlap
    else:
        costs = np.array([sum(map(len, reads)) for reads in trie.reads])
    cuts = _cuts(overlap, np.cumsum(costs), count)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(trie.leaves)], strict=True):
        prefixes = [prefix for reads in trie.reads[start:stop] for prefix in reads]
        computed_again = int(overlap[start]) if shared else 0
        cost = int(costs[start:stop].sum()) + computed_again
        parts.append(Part({prefix: requests[prefix] for prefix in prefixes}, cost))
    return sorted(parts, key=lambda part: -part.cost)


def count_parts(requests: Requests, *, workers: int, batch_tokens: int) -> int:
    """Return a number of parts that balances the workers without parts smaller than a batch."""
    tokens = Trie.of(requests).nodes
    few, many = max(workers, tokens // batch_tokens), tokens // (MOST_BATCHES * batch_tokens) + 1
    return min(few, max(PER_WORKER * workers, many))


def _cuts(
    overlap: Int[np.ndarray, " leaf"], ends: Int[np.ndarray, " leaf"], count: int
) -> list[int]:
    """Return the first leaf of every part but the first."""
    length = ends[-1] / max(count, 1)
    cuts: list[int] = []
    for target in length * np.arange(1, count):
        low, high = np.searchsorted(ends, target + length * np.array([-SLACK, SLACK])) + 1
        low, high = max(int(low), cuts[-1] + 1 if cuts else 1), min(int(high) + 1, len(ends))
        if low < high:
            distance = np.abs(ends[low - 1 : high - 1] - target)
            cuts.append(low + int(np.lexsort((distance, overlap[low:high]))[0]))
    return cuts
