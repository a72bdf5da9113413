"""Packs: stretches of neighbouring leaves of a trie that run together in one row.

A row is the subtree of its leaves, written out depth first, and every token sees its ancestors
only. Where two packs meet, what the leaf on the right shares with the one on the left is either
computed again, or taken by both as cached keys and values (their *past*) from a trunk that is
computed before them:

    trunk     Do not think of Guam .
    pack 1        … Rome is | The Eiffel Tower is in | The Louvre is in
    pack 2        … Do not think of Guam . ( Rome is | The Eiffel Tower is in )

Small packs waste little attention on pairs of tokens that do not see each other; large ones cut
the tree less often. `cut` weighs the two and finds the cheapest cuts in the order of the leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hijacklens.engine.trie import Trie


@dataclass(frozen=True, slots=True)
class Machine:
    """Operations in the linear layers that take as long as moving one number."""

    score: float
    """For one attention score, with its mask, its softmax and the copies made of it."""
    state: float
    """For one number of a cached key or value."""
    row: float
    """For a row, in tokens."""
    forward_pass: float
    """For a forward pass, in tokens."""


CPU = Machine(score=90.0, state=135.0, row=0.4, forward_pass=40.0)

GPU = Machine(score=600.0, state=60.0, row=0.4, forward_pass=2_000.0)

GPU_16_BIT = Machine(score=2_500.0, state=250.0, row=0.4, forward_pass=4_000.0)


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs in units of what the linear layers take for one token."""

    pair: float
    past: float
    row: float
    forward_pass: float

    @classmethod
    def of(cls, config: Any, *, device: torch.device, dtype: torch.dtype) -> Costs:
        """The costs of a model with a TransformerLens configuration."""
        if device.type == "cpu":
            machine = CPU
        else:
            machine = GPU if dtype == torch.float32 else GPU_16_BIT
        heads, width = config.n_heads, config.d_head
        kv_heads = getattr(config, "n_key_value_heads", None) or heads
        inner = config.d_mlp or 4 * config.d_model
        matrices = 3 if getattr(config, "gated_mlp", False) else 2
        linear = 2 * config.d_model * (2 * (heads + kv_heads) * width + matrices * inner)
        return cls(
            pair=heads * (4 * width + machine.score) / linear,
            # Keys and values are read and written, then repeated to all heads.
            past=machine.state * width * (4 * kv_heads + 2 * heads) / linear,
            row=machine.row,
            forward_pass=machine.forward_pass,
        )

    @classmethod
    def usual(cls) -> Costs:
        """Those of GPT-2 small on a CPU in float32, for a plan without a model."""
        small = SimpleNamespace(n_heads=12, d_head=64, d_model=768, d_mlp=3072)
        return cls.of(small, device=torch.device("cpu"), dtype=torch.float32)

    def rows(self, own: Any, past: Any) -> Any:
        """The cost of rows with so many tokens of their own and so many cached ones before."""
        return own + self.pair * own * (own + past) + self.past * past + self.row


MOST_LEAVES = 48
"""Leaves in a pack: as far as the search for the best cuts looks ahead."""

MOST_TOKENS = 768
"""Tokens in a pack of several leaves, by default; longer rows never pay."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Neighbouring leaves of a trie that share a row."""

    first: int
    stop: int
    """The leaf behind the last one."""
    past: int
    """How many symbols, shared by all leaves of the pack, are taken from a cache."""
    own: int
    """Tokens that the row computes."""


@dataclass(frozen=True, slots=True)
class Cuts:
    """A trie cut into packs."""

    packs: list[Pack]
    cost: float
    """In tokens (`hijacklens.engine.packs`), without that of the trunk and of forward passes."""

    @property
    def own(self) -> int:
        """Tokens that all packs compute, the trunk left out."""
        return sum(pack.own for pack in self.packs)


def separate(trie: Trie, costs: Costs) -> Cuts:
    """Every leaf by itself: the plain way."""
    packs = [Pack(i, i + 1, 0, len(leaf)) for i, leaf in enumerate(trie.leaves)]
    lengths = np.array([pack.own for pack in packs], dtype=float)
    return Cuts(packs, float(costs.rows(lengths, 0).sum()))


def cut(
    trie: Trie, costs: Costs, *, cached: bool, most_tokens: int = MOST_TOKENS, most_reads: int = 0
) -> Cuts:
    """The cheapest cuts of a trie into packs.

    Args:
        trie: What is read.
        costs: What rows cost.
        cached: Whether packs take what they share with their neighbours from a trunk.
        most_tokens: Own tokens of a pack; a longer leaf is a pack by itself.
        most_reads: Prefixes that are read in a pack of several leaves; 0 for any number.

    Note:
        Dynamic programming over the leaves, each looking `MOST_LEAVES` ahead; 1.2 s for the whole
        CounterFact at doses 0 to 5, on one core.
    """
    n = len(trie.leaves)
    lengths = np.fromiter(map(len, trie.leaves), np.int64, n)
    shared = np.array([*trie.shared, 0], dtype=np.int64)
    reads = np.fromiter(map(len, trie.reads), np.int64, n)
    depth = min(MOST_LEAVES, n)
    cost = np.full((n, depth), np.inf)
    own = np.zeros((n, depth), dtype=np.int64)
    past = np.zeros((n, depth), dtype=np.int64)
    # Packs of one leaf, of two, ...: `tokens`, `base` and `asked` belong to those that start at
    # each leaf and hold one more in every round.
    tokens, base, asked = lengths.copy(), lengths - 1, reads.copy()
    for more in range(depth):
        starts = n - more
        if more:
            added = slice(more, n)
            tokens = tokens[:starts] + lengths[added] - shared[added.start : n]
            base = np.minimum(base[:starts], shared[added.start : n])
            asked = asked[:starts] + reads[added]
        left, right = shared[:starts], shared[1 + more : n + 1]
        taken = np.minimum(base, np.maximum(left, right)) if cached else np.zeros_like(base)
        row = tokens - taken
        # The trunk that a pack shares with the one on its left has been paid for there; the rest
        # of what it takes from the trunk is paid for here.
        trunk = taken - np.minimum(base, left) if cached else 0
        total = costs.rows(row, taken) + trunk
        if more:
            total = np.where(row > most_tokens, np.inf, total)
            if most_reads:
                total = np.where(asked > most_reads, np.inf, total)
        cost[:starts, more], own[:starts, more], past[:starts, more] = total, row, taken
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    leaves = np.zeros(n + 1, dtype=np.int64)  # how many the last pack before each cut holds
    for first in range(n):
        reach = slice(first + 1, min(first + 1 + depth, n + 1))
        found = best[first] + cost[first, : reach.stop - reach.start]
        better = found < best[reach]
        best[reach][better] = found[better]
        leaves[reach][better] = np.flatnonzero(better) + 1
    packs: list[Pack] = []
    stop = n
    while stop:
        held = int(leaves[stop])
        first = stop - held
        packs.append(Pack(first, stop, int(past[first, held - 1]), int(own[first, held - 1])))
        stop = first
    packs.reverse()
    return Cuts(packs, float(best[n]))


def trunk(trie: Trie, packs: Sequence[Pack]) -> Trie:
    """The tree of what packs take as their past, with the prefixes that are read in it."""
    paths = {trie.leaves[pack.first][: pack.past] for pack in packs if pack.past}
    reads = [
        prefix
        for pack in packs
        for on_the_way in trie.reads[pack.first : pack.stop if pack.past else pack.first]
        for prefix in on_the_way
        if len(prefix) <= pack.past
    ]
    return Trie.of(paths, reads)
