"""The size of a batch: what suits the device and fits into its free memory.

Sizes are in tokens, padding included. The activations of a batch, its attention scores and its
logits are counted; the model itself is loaded already. When memory runs out, the size shrinks.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import torch

from hijacklens.engine.packs import BATCH_TOKENS, MOST_TOKENS, Costs, Limits, Pack
from hijacklens.engine.plan import Level
from hijacklens.models.device_memory import free_bytes
from hijacklens.models.hooked import HookedModel, device_of

FRACTION = 0.5
"""Fraction of the free memory for the activations of a batch."""

TRUNK_FRACTION = 0.125
"""Fraction of the free memory for the keys and values of a trunk."""

TRUNK_BYTES = {"cpu": 2**28, "cuda": 2**33}
"""Maximum size of the keys and values of a trunk, by type of device."""

COPIES = 6
"""Copies of a residual stream, a hidden layer or a score that exist at one time."""

READ_VALUES = {"cpu": 2**26, "cuda": 2**28}
"""Maximum number of logits (reads x vocabulary) at once, by type of device: 1/4 and 1 GiB in
float32."""

LOGIT_BYTES = 16
"""Bytes for one logit: its value, a float32 copy and the softmax of the copy."""

LOOKED_AT = 16
"""How many packs are tried for a gap in a row."""


def token_bytes(config: Any, dtype: torch.dtype, *, width: int) -> int:
    """Return the bytes that one token of a batch needs, with its scores for `width` keys."""
    inner = config.d_mlp or 4 * config.d_model
    scores = config.n_heads * width
    return COPIES * dtype.itemsize * (2 * config.d_model + inner + scores) + 4 * scores


def state_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one token in all layers."""
    heads = getattr(config, "n_key_value_heads", None) or config.n_heads
    return 2 * config.n_layers * heads * config.d_head * dtype.itemsize


def read_values(device: torch.device) -> int:
    """Return the maximum number of logits at once on a device (`READ_VALUES`)."""
    return READ_VALUES.get(device.type, READ_VALUES["cpu"])


class BatchSize:
    """How large batches are; it shrinks when memory runs out."""

    def __init__(self, model: HookedModel, tokens: int | None = None) -> None:
        """Take a size in tokens, or what suits the device and fits into its memory."""
        self._config: Any = model.cfg
        self._device = device_of(model)
        self._dtype = next(iter(model.parameters())).dtype
        free = free_bytes(self._device)
        self._budget = None if free is None or tokens is not None else int(free * FRACTION)
        self.tokens = tokens or BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cpu"])
        values = read_values(self._device)
        if self._budget is not None:
            values = min(values, self._budget // (2 * LOGIT_BYTES))
        self.reads = max(1, values // int(self._config.d_vocab))
        """Maximum number of prefixes read in a batch; a single prompt may have more."""
        self.shrunk = 0
        self.costs = Costs.of(self._config, device=self._device, dtype=self._dtype)

    def limits(self, pack_tokens: int = MOST_TOKENS) -> Limits:
        """Return the sizes that a plan must keep to."""
        trunk_bytes = TRUNK_BYTES.get(self._device.type, TRUNK_BYTES["cpu"])
        free = free_bytes(self._device)
        if free is not None:
            trunk_bytes = min(trunk_bytes, int(free * TRUNK_FRACTION))
        return Limits(
            batch_tokens=self.tokens,
            pack_tokens=pack_tokens,
            pack_reads=self.reads,
            trunk_tokens=max(1, trunk_bytes // state_bytes(self._config, self._dtype)),
        )

    def batches(
        self, level: Level, *, one_length: bool = False, fill: bool = True
    ) -> Iterator[list[list[Pack]]]:
        """Cut the packs of a level into batches of rows, the longest first.

        A row is as wide as the longest pack of its batch, and is filled up with the longest packs
        that fit. Still wider rows would lower the cost of a run on CounterFact by 1 to 2 per cent.

        Args:
            level: The packs to run.
            one_length: Whether the rows of a batch must have the same length.
            fill: Whether a row may hold several packs.
        """
        first_read = level.trie.first_read.tolist()

        def reads(pack: Pack) -> int:
            return first_read[pack.stop] - first_read[pack.first]

        most_past = max((pack.past for pack in level.packs), default=0)
        waiting = sorted(level.packs, key=lambda pack: (pack.computed, pack.past))
        while waiting:
            width = waiting[-1].computed
            batch: list[list[Pack]] = []
            n_reads = keys = 0
            while waiting:
                first = waiting[-1]
                fits = self._fits((len(batch) + 1) * width, width + max(keys, first.past))
                fits &= n_reads + reads(first) <= self.reads
                if batch and not (fits and (first.computed == width or not one_length)):
                    break
                row = [waiting.pop()]
                gap, past = width - first.computed, first.past
                n_reads += reads(first)
                while fill and gap and waiting:
                    end = bisect_right(waiting, gap, key=lambda pack: pack.computed)
                    fitting = (
                        i
                        for i in range(end - 1, max(end - 1 - LOOKED_AT, -1), -1)
                        if past + waiting[i].past <= max(most_past, width // 2)
                        and n_reads + reads(waiting[i]) <= self.reads
                    )
                    i = next(fitting, None)
                    if i is None:
                        break
                    row.append(waiting.pop(i))
                    gap, past = gap - row[-1].computed, past + row[-1].past
                    n_reads += reads(row[-1])
                batch.append(row)
                keys = max(keys, past)
            yield batch

    def shrink(self, tokens: int) -> None:
        """Halve a size for which memory did not suffice, and free what torch holds unused."""
        self.tokens = max(1, min(self.tokens, tokens // 2))
        self.shrunk += 1
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _fits(self, tokens: int, keys: int) -> bool:
        needed = tokens * token_bytes(self._config, self._dtype, width=keys)
        return tokens <= self.tokens and (self._budget is None or needed <= self._budget)
