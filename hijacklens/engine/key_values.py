"""Keys and values of a trunk: computed once, gathered by every row that continues it.

A pool holds one slot per node of the trunk and layer, and has room for nodes that are added later
(`hijacklens.engine.growing`). Rows name the slots of their past, so the rows of a batch may have
pasts of different lengths, and only what one layer needs at a time is copied.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from hijacklens.engine.rows import PackedRows, to_device
from hijacklens.engine.trie import Trie
from hijacklens.prompts.prefixes import WIDTH, Prefix


class Pool:
    """Keys and values of the nodes of a trunk, by layer."""

    def __init__(self, trunk: Trie, *, room: int = 0) -> None:
        """Number the nodes; memory is allocated by the first forward pass that writes.

        Args:
            trunk: The nodes.
            room: How many nodes may be added.
        """
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.size = trunk.nodes + room
        self._leaves = trunk.leaves
        self._slots: list[list[int]] = []
        self._added: dict[Prefix, list[int]] = {}
        self._used = 0
        for length, shared in zip(trunk.lengths.tolist(), trunk.shared.tolist(), strict=True):
            inherited = self._slots[-1][:shared] if self._slots else []
            self._slots.append([*inherited, *self._new(length - shared)])

    def _new(self, count: int) -> range:
        """Return unused slots."""
        first, self._used = self._used, self._used + count
        return range(first, self._used)

    def add(self, path: Prefix) -> None:
        """Give the last node of a path a slot; all other nodes on the path have one."""
        i = bisect_left(self._leaves, path)
        in_trunk = i < len(self._leaves) and self._leaves[i].startswith(path)
        if path not in self._added and not in_trunk:
            self._added[path] = [*self.slots(path[:-WIDTH]), *self._new(1)]

    def slots(self, path: Prefix) -> Sequence[int]:
        """Return the slots of the nodes on a path."""
        if path in self._added or not path:
            return self._added.get(path, ())
        # The first leaf that does not sort before a path begins with it.
        return self._slots[bisect_left(self._leaves, path)][: len(path) // WIDTH]

    def states(self, batch: PackedRows, *, keep: bool) -> PooledKeyValues:
        """Return the cache of a forward pass over rows.

        Args:
            batch: The rows; the nodes of their pasts are in the pool.
            keep: Whether the nodes of the rows are in the pool, too, and their keys and values are
                written.
        """
        leaves, shared = batch.trie.leaves, batch.trie.shared
        past = np.zeros(batch.path.shape, np.int64)  # padding may name any slot: it is masked
        written: list[tuple[int, int, int]] = []
        for i, row in enumerate(batch.rows):
            slots = [slot for pack in row for slot in self.slots(pack.path(batch.trie))]
            past[i, : len(slots)] = slots
            own: list[int] = []
            for pack in row if keep else ():
                own.extend(self.slots(leaves[pack.first])[pack.past :])
                for leaf in range(pack.first + 1, pack.stop):
                    own.extend(self.slots(leaves[leaf])[shared[leaf] :])
            written.extend((i, position, slot) for position, slot in enumerate(own))
        device = batch.path.device
        columns = np.array(written, dtype=np.int64).T.copy()
        return PooledKeyValues(
            self, to_device(past, device), to_device(columns, device) if keep else None
        )


class PooledKeyValues(Cache):
    """The keys and values that one forward pass reads from a pool or writes to it."""

    def __init__(
        self,
        pool: Pool,
        past: Int[Tensor, "batch past"],
        written: Int[Tensor, "3 token"] | None = None,
    ) -> None:
        """Set the slots to read and to write.

        Args:
            pool: The pool.
            past: The slots of each row's past, in the order of its keys; no columns if the rows
                have no past.
            written: Row, position and slot of each computed token; None if nothing is written.
        """
        super().__init__(layers=[])
        self._pool = pool
        self._past = past
        self._written = written

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the past of a layer before its new keys and values, `[batch, kv_head, pos, d_head]`.

        The name and the arguments are those of `transformers.Cache`.
        """
        new = (key_states, value_states)
        layers = self._pool.layers
        if layer_idx not in layers:
            layers[layer_idx] = tuple(
                states.new_empty((self._pool.size, states.shape[1], states.shape[3]))
                for states in new
            )
        pooled = layers[layer_idx]
        if self._written is not None:
            for kept, states in zip(pooled, new, strict=True):
                row, position, slot = self._written.to(states.device)
                kept[slot.to(kept.device)] = states[row, :, position].to(kept.device)
        if not self._past.shape[1]:
            return new
        keys, values = (
            torch.cat([kept[self._past.to(kept.device)].transpose(1, 2), states], dim=2)
            for kept, states in zip(pooled, new, strict=True)
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many keys precede the new ones; `transformers.Cache` defines the name."""
        return self._past.shape[1]
