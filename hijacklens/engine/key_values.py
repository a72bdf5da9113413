"""Keys and values of a trunk: computed once, gathered by every row that continues it.

A pool holds one slot per node of the trunk and layer. Rows name the slots of their past, so the
rows of a batch may have pasts of different lengths, and only what one layer needs at a time is
copied.
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

from hijacklens.engine.rows import PackedRows, Row, to_device
from hijacklens.engine.trie import WIDTH, Prefix, Trie, common


class Pool:
    """Keys and values of the nodes of a trunk, by layer."""

    def __init__(self, trunk: Trie) -> None:
        """Number the nodes; memory is allocated by the first forward pass that writes."""
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.size = trunk.nodes
        self._leaves = trunk.leaves
        self._slots: list[list[int]] = []
        used = 0
        for length, shared in zip(trunk.lengths.tolist(), trunk.shared.tolist(), strict=True):
            inherited = self._slots[-1][:shared] if self._slots else []
            self._slots.append([*inherited, *range(used, used + length - shared)])
            used += length - shared

    def slots(self, path: Prefix) -> Sequence[int]:
        """Return the slots of the nodes on a path of the trunk."""
        # The first leaf that does not sort before a path begins with it.
        length = len(path) // WIDTH
        return self._slots[bisect_left(self._leaves, path)][:length] if path else ()

    def past_of(self, rows: Sequence[Row], batch: PackedRows) -> PooledKeyValues:
        """Return the cache of a forward pass over rows that continue the trunk."""
        past = np.zeros(batch.path.shape, np.int64)  # padding may name any slot: it is masked
        for i, row in enumerate(rows):
            slots = [slot for branch in row for slot in self.slots(branch.path)]
            past[i, : len(slots)] = slots
        return PooledKeyValues(self, to_device(past, batch.path.device))

    def written_by(self, rows: Sequence[Row], batch: PackedRows) -> PooledKeyValues:
        """Return the cache of a forward pass over rows of the trunk itself."""
        written: list[tuple[int, int, int]] = []
        for i, row in enumerate(rows):
            slots: list[int] = []
            for branch in row:
                before: Prefix = b""
                for leaf in branch.leaves:
                    slots.extend(self.slots(leaf)[common(before, leaf) :])
                    before = leaf
            written.extend((i, position, slot) for position, slot in enumerate(slots))
        columns = np.array(written, dtype=np.int64).T.copy()
        return PooledKeyValues(self, batch.path, to_device(columns, batch.path.device))


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
