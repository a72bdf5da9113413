"""Keys and values of a trunk: computed once, gathered by every row that stands on it.

A pool holds one place per node of the trunk and layer. Rows name the places of their past, so rows
of one batch may have pasts of any length, and nothing is copied but what one layer needs at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import Cache

from hijacklens.engine.trie import Trie
from hijacklens.prompts.tokens import TokenIds


class Pool:
    """Keys and values of the nodes of a trunk, by layer."""

    def __init__(self, trunk: Trie) -> None:
        """Number the nodes; memory is taken by the first forward pass that writes."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._leaves = trunk.leaves
        self._places: list[list[int]] = []
        self.size = 0
        places: list[int] = []
        for leaf, shared in zip(trunk.leaves, trunk.shared, strict=True):
            fresh = len(leaf) - shared
            places = [*places[:shared], *range(self.size, self.size + fresh)]
            self._places.append(places)
            self.size += fresh

    def places(self, path: TokenIds) -> Sequence[int]:
        """The places of the nodes on a path of the trunk."""
        # The first leaf that is not before a path begins with it.
        return self._places[bisect_left(self._leaves, path)][: len(path)] if path else ()


class PooledKeyValues(Cache):
    """What one forward pass reads from a pool, and writes to it, in the form models ask for."""

    def __init__(
        self,
        pool: Pool,
        past: Int[Tensor, "batch past"],
        written: Int[Tensor, " written"] | None = None,
        computed: Bool[Tensor, "batch query"] | None = None,
    ) -> None:
        """Say what is read and written.

        Args:
            pool: Where keys and values are.
            past: The places of each row's past, any place where it is shorter.
            written: Where the keys and values of the computed tokens go, if they are kept.
            computed: Which of the batch's tokens those are, in the order of `written`.
        """
        super().__init__(layers=[])
        self._pool = pool
        self._past = past
        self._written = written
        self._computed = computed

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the past of a layer before its new keys and values, `[batch, kv_head, pos, d_head]`.

        The name and the arguments are those of `transformers.Cache`.
        """
        pool = self._pool.layers
        if layer_idx not in pool:
            shape = (self._pool.size, key_states.shape[1])
            # Zeros, as the padding of a past may name a place that is not yet written: attention
            # gives it the weight 0, and 0 times what memory happens to hold may be NaN.
            pool[layer_idx] = (
                key_states.new_zeros((*shape, key_states.shape[3])),
                value_states.new_zeros((*shape, value_states.shape[3])),
            )
        whole = []
        for kept, new in zip(pool[layer_idx], (key_states, value_states), strict=True):
            if self._written is not None and self._computed is not None:
                here = self._written.to(kept.device)
                kept[here] = new.transpose(1, 2)[self._computed.to(new.device)]
            if self._past.shape[1]:
                old = kept[self._past.to(kept.device)].transpose(1, 2)
                new = torch.cat([old, new], dim=2)
            whole.append(new)
        return whole[0], whole[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many keys stand before the new ones; the name is that of `transformers.Cache`."""
        return self._past.shape[1]
