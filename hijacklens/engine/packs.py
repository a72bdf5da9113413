"""Packs: stretches of neighbouring leaves of a trie that run together in one row.

A row is the subtree of its leaves, written out depth first, and every token sees its ancestors
only. The tokens that the first leaf of a pack shares with the pack before it are either computed
again, or both packs take them as cached keys and values (their *past*) from a trunk that is
computed first:

    trunk     Do not think of Guam .
    pack 1        … Rome is | The Eiffel Tower is in | The Louvre is in
    pack 2        … Do not think of Guam . ( Rome is | The Eiffel Tower is in )

Small packs waste little attention on pairs of tokens that do not see each other; large packs
cut the tree less often. `cut` finds the cheapest cuts in the order of the leaves. Costs are in
units of what the linear layers spend on one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hijacklens.engine.trie import Trie
from hijacklens.prompts.prefixes import WIDTH, Prefix

MOST_LEAVES = 48
"""Maximum number of leaves in a pack, which bounds the search for the best cuts."""

MOST_TOKENS = 768
"""Default maximum of tokens in a pack of several leaves; longer rows never pay."""

BATCH_TOKENS = {"cpu": 1_024, "cuda": 32_768}
"""Default size of a batch, in tokens with padding, by type of device."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Costs on one kind of device."""

    score: float
    """One attention score, with its mask, softmax and copies, in multiplications of linear layers
    that take as long."""
    state: float
    """One number of a cached key or value, in the same unit."""
    forward_pass: float
    """One forward pass, in tokens."""
    simpler: float
    """A simpler way of sharing is taken if it costs at most this many times as much. A GPU waits
    for the host that prepares the rows, and simple rows are prepared faster."""


CPU = Machine(score=90.0, state=135.0, forward_pass=40.0, simpler=1.01)
# Fitted to an H200: GPT-2 small in both, and LLaMA-2 7B in 16 bits.
GPU = Machine(score=100.0, state=150.0, forward_pass=2_000.0, simpler=1.1)
GPU_16_BIT = Machine(score=300.0, state=1_000.0, forward_pass=4_000.0, simpler=1.1)
ROW = 0.4
"""One row of a batch, in tokens."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a model on a machine, in tokens."""

    pair: float
    """One pair of a query and a key."""
    past: float
    """One cached token that a row attends to."""
    row: float
    forward_pass: float
    simpler: float = CPU.simpler
    """See `Machine`."""

    @classmethod
    def of(cls, config: Any, *, device: torch.device, dtype: torch.dtype) -> Costs:
        """Return the costs of a model with a TransformerLens configuration."""
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
            row=ROW,
            forward_pass=machine.forward_pass,
            simpler=machine.simpler,
        )

    @classmethod
    def usual(cls) -> Costs:
        """Return the costs of GPT-2 small on a CPU in float32, for a plan without a model."""
        small = SimpleNamespace(n_heads=12, d_head=64, d_model=768, d_mlp=3072)
        return cls.of(small, device=torch.device("cpu"), dtype=torch.float32)

    def rows(self, computed: Any, past: Any) -> Any:
        """Return the cost of rows that compute some tokens after `past` cached ones."""
        pairs = computed * (computed + past)
        return computed + self.pair * pairs + self.past * past + self.row


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes that a plan keeps to."""

    batch_tokens: int = BATCH_TOKENS["cpu"]
    """Tokens in a batch."""
    pack_tokens: int = MOST_TOKENS
    """Maximum number of tokens that a pack of several leaves computes; a pack also fits into a
    batch."""
    pack_reads: int = 0
    """Maximum number of prefixes read in a pack of several leaves; 0 for no limit."""
    trunk_tokens: int = 4_096
    """Maximum number of tokens in a trunk, whose keys and values are kept; a longer single path
    is allowed."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Neighbouring leaves of a trie that share a row."""

    first: int
    stop: int
    """The index after the last leaf."""
    past: int
    """How many symbols, shared by all leaves of the pack, come from a cache."""
    computed: int
    """How many tokens the row computes."""

    def path(self, trie: Trie) -> Prefix:
        """Return the symbols of the past."""
        return trie.leaves[self.first][: WIDTH * self.past]


def separate(trie: Trie) -> list[Pack]:
    """Put every leaf into a pack by itself."""
    return [Pack(i, i + 1, 0, length) for i, length in enumerate(trie.lengths.tolist())]


def apart(trie: Trie, pack: Pack) -> list[Pack]:
    """Split a pack into its leaves, which have the same past."""
    lengths = [len(leaf) // WIDTH for leaf in trie.leaves[pack.first : pack.stop]]
    return [
        Pack(i, i + 1, pack.past, length - pack.past)
        for i, length in enumerate(lengths, start=pack.first)
    ]


def cut(trie: Trie, costs: Costs, limits: Limits, *, cached: bool) -> list[Pack]:
    """Find the cheapest cuts of a trie into packs.

    Args:
        trie: The prefixes to read.
        costs: What rows cost.
        limits: Sizes of packs; a longer leaf is a pack by itself.
        cached: Whether packs take what they share with their neighbours from a trunk.

    Note:
        Dynamic programming over the leaves, looking `MOST_LEAVES` ahead from each.
    """
    n = len(trie.leaves)
    if not n:
        return []
    most_tokens = min(limits.pack_tokens, limits.batch_tokens)
    lengths, shared = trie.lengths, np.append(trie.shared, 0)
    leaf_reads = np.diff(trie.first_read)
    depth = min(MOST_LEAVES, n)
    # The pack with `leaves` leaves before the cut `stop` costs cost[stop, depth - leaves].
    cost = np.full((n + 1, depth), np.inf)
    # Round `more` considers, for every first leaf, the pack with `more` further leaves. The arrays
    # hold its tokens, the symbols that all its leaves share, and its reads.
    tokens, base, reads = lengths, lengths - 1, leaf_reads
    for more in range(depth):
        starts = n - more
        if more:
            tokens = tokens[:starts] + lengths[more:] - shared[more:n]
            base = np.minimum(base[:starts], shared[more:n])
            reads = reads[:starts] + leaf_reads[more:]
        left = shared[:starts]
        taken = np.minimum(base, np.maximum(left, shared[1 + more :])) if cached else 0 * base
        # The pack on the left has paid for the trunk that both share; this one pays for the rest.
        total = costs.rows(tokens - taken, taken) + taken - np.minimum(taken, left)
        if more:
            too_large = tokens - taken > most_tokens
            if limits.pack_reads:
                too_large |= reads > limits.pack_reads
            total[too_large] = np.inf
        cost[1 + more :, depth - 1 - more] = total
    best = np.full(depth + n + 1, np.inf)  # the cost up to each cut, after `depth` impossible cuts
    best[depth] = 0.0
    leaves = [0]  # of the pack that ends at each cut
    for stop in range(1, n + 1):
        totals = best[stop : stop + depth] + cost[stop]
        cheapest = int(totals.argmin())
        best[depth + stop] = totals[cheapest]
        leaves.append(depth - cheapest)
    cuts = [n]
    while cuts[-1]:
        cuts.append(cuts[-1] - leaves[cuts[-1]])
    first, stop = np.array(cuts[:0:-1]), np.array(cuts[-2::-1])
    within = trie.shared.copy()
    within[first] = lengths[first] - 1
    base = np.minimum.reduceat(within, first)
    past = np.minimum(base, np.maximum(shared[first], shared[stop])) if cached else 0 * base
    computed = np.add.reduceat(lengths - trie.shared, first) + trie.shared[first] - past
    return list(map(Pack, *(column.tolist() for column in (first, stop, past, computed))))


def trunk(trie: Trie, packs: Sequence[Pack]) -> Trie:
    """Return the tree of the packs' pasts, with the prefixes that are read in it."""
    paths = {pack.path(trie) for pack in packs if pack.past}
    ids: dict[Prefix, int] = {}
    for pack in packs if paths else ():
        reads = trie.reads[trie.first_read[pack.first] : trie.first_read[pack.stop]]
        for length, read in reads[reads[:, 0] <= pack.past].tolist():
            ids[trie.leaves[pack.first][: WIDTH * length]] = read
    return Trie.of(paths, ids)
