"""The size of a batch: what suits the device and fits into its free memory, less after it did not.

Sizes are in tokens, padding included. The activations of a batch, its attention scores and its
logits are counted; the model itself is there already.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.scoring import memory
from hijacklens.scoring.costs import Costs
from hijacklens.engine.packs import Pack
from hijacklens.engine.plan import BATCH_TOKENS, Level

READ_VALUES = 2**26
"""At most so many logits (reads x vocabulary) at once: a quarter of a GiB in float32."""
ROOMS = (0, 8, 16, 24, 32, 48, 64, 96)
"""Tokens that rows may be wider than their longest pack, weighed against each other."""
LOOKED_AT = 16
"""Packs that are considered for a place in a row."""
LOGIT_BYTES = 16
"""Of a logit: itself, in float32, and what a softmax makes of it."""


class BatchSize:
    """How large batches are; it shrinks when memory runs out."""

    def __init__(self, model: HookedModel, tokens: int | None = None) -> None:
        """Take a size in tokens, or what suits the device and fits into its memory."""
        self._config: Any = model.cfg
        self._device = device_of(model)
        self._dtype = next(iter(model.parameters())).dtype
        free = memory.free_bytes(self._device)
        self._budget = None if free is None or tokens is not None else int(free * memory.SHARE)
        self.tokens = BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cpu"])
        if tokens is not None:
            self.tokens = tokens
        values = READ_VALUES
        if self._budget is not None:
            values = min(values, self._budget // (2 * LOGIT_BYTES))
        self.reads = max(1, values // int(self._config.d_vocab))
        """Prefixes that are read in a batch, at most; more only of a single prompt."""
        self.shrunk = 0
        self.costs = Costs.of(self._config, device=self._device, dtype=self._dtype)

    @property
    def trunk_tokens(self) -> int:
        """Tokens of a trunk whose keys and values may be kept at a time."""
        most = memory.TRUNK_BYTES.get(self._device.type, memory.TRUNK_BYTES["cpu"])
        free = memory.free_bytes(self._device)
        if free is not None:
            most = min(most, int(free * memory.TRUNK_SHARE))
        return max(1, most // memory.state_bytes(self._config, self._dtype))

    def batches(
        self, level: Level, *, one_length: bool = False, fill: bool = True
    ) -> Iterator[list[list[Pack]]]:
        """Cut the packs of a level into batches of rows, the longest first.

        Args:
            level: What is run.
            one_length: Whether the rows of a batch have to be of one length.
            fill: Whether a row may hold several packs.
        """
        asked = {
            pack: sum(map(len, level.trie.reads[pack.first : pack.stop])) for pack in level.packs
        }
        most_past = max((pack.past for pack in level.packs), default=0)
        left = sorted(level.packs, key=lambda pack: (pack.own, pack.past))
        while left:
            # Wider rows hold several packs with less padding, but have more pairs to attend to.
            rooms = ROOMS if fill else ROOMS[:1]
            choices = [
                self._batch(left, asked, room, most_past, one_length=one_length, fill=fill)
                for room in rooms
            ]
            best, left = min(choices, key=lambda choice: self._cost(choice[0]))
            yield best

    def _batch(
        self,
        packs: list[Pack],
        asked: Mapping[Pack, int],
        more: int,
        most_past: int,
        *,
        one_length: bool,
        fill: bool,
    ) -> tuple[list[list[Pack]], list[Pack]]:
        """A batch of the longest packs, and the packs that are left.

        Its rows are `more` tokens wider than the longest pack, each filled up with the longest
        packs that fit.
        """
        left = packs.copy()
        width = max(left[-1].own, min(left[-1].own + more, self.tokens))
        batch: list[list[Pack]] = []
        reads = keys = 0
        while left:
            first = left[-1]
            full = not self._fits((len(batch) + 1) * width, width + max(keys, first.past))
            if batch and (
                full or reads + asked[first] > self.reads or (one_length and first.own < width)
            ):
                break
            row = [left.pop()]
            reads += asked[first]
            room, past = width - first.own, first.past
            while fill and room and left:
                end = bisect_right(left, room, key=lambda pack: pack.own)
                fitting = (
                    at
                    for at in range(end - 1, max(end - 1 - LOOKED_AT, -1), -1)
                    if past + left[at].past <= max(most_past, width // 2)
                    and reads + asked[left[at]] <= self.reads
                )
                at = next(fitting, None)
                if at is None:
                    break
                pack = left.pop(at)
                row.append(pack)
                room, past, reads = room - pack.own, past + pack.past, reads + asked[pack]
            batch.append(row)
            keys = max(keys, past)
        return batch, left

    def _cost(self, batch: Sequence[Sequence[Pack]]) -> float:
        """The cost of a batch (`hijacklens.scoring.costs`), padding included, for each token."""
        own = [sum(pack.own for pack in row) for row in batch]
        past = max(sum(pack.past for pack in row) for row in batch)
        whole = len(batch) * float(self.costs.rows(max(own), past)) + self.costs.forward_pass
        return whole / sum(own)

    def shrink(self, tokens: int) -> None:
        """Allow half of a size for which memory did not suffice, and give back what is unused."""
        self.tokens = max(1, min(self.tokens, tokens // 2))
        self.shrunk += 1
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _fits(self, tokens: int, keys: int) -> bool:
        if tokens > self.tokens:
            return False
        if self._budget is None:
            return True
        return tokens * memory.token_bytes(self._config, self._dtype, width=keys) <= self._budget
