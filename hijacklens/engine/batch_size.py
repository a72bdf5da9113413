"""The size of a batch: what suits the device and fits into its free memory, less after it did not.

Sizes are in tokens, padding included. The activations of a batch, its attention scores and its
logits are counted; the model itself is there already.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hijacklens.engine.packs import Costs, Pack
from hijacklens.engine.plan import BATCH_TOKENS, Level
from hijacklens.models.hooked import HookedModel, device_of

try:
    import resource
except ImportError:  # Windows has none
    resource = None

SHARE = 0.5
"""Of the free memory, for the activations of a batch."""

TRUNK_SHARE = 0.125
"""Of the free memory, for the keys and values of a trunk."""

TRUNK_BYTES = {"cpu": 2**28, "cuda": 2**33}
"""At most so much for the keys and values of a trunk, by type of device."""

COPIES = 6
"""Copies of a residual stream, a hidden layer or a score that are alive at one time."""

_FULL = re.compile(r"not enough memory|can't allocate memory|out of memory|bad_?alloc", re.I)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be taken on a device, or None where nothing says how much.

    On a GPU that is what the driver has free and what torch holds unused; on a CPU what the
    system can give without swapping, inside the limit of a container.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return None
    known = [value for value in (_available(), _container()) if value is not None]
    return min(known) if known else None


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: by torch on a GPU, by this process on a CPU.

    0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux gives a process the peak of the one that started it, except here.
    held = _field(Path("/proc/self/status"), "VmHWM:")
    if held is not None or resource is None:
        return held or 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def token_bytes(config: Any, dtype: torch.dtype, *, width: int) -> int:
    """Bytes that a token of a batch needs, its scores with `width` keys included."""
    inner = config.d_mlp or 4 * config.d_model
    scores = config.n_heads * width
    return COPIES * dtype.itemsize * (2 * config.d_model + inner + scores) + 4 * scores


def state_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, all layers."""
    heads = getattr(config, "n_key_value_heads", None) or config.n_heads
    return 2 * config.n_layers * heads * config.d_head * dtype.itemsize


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_FULL.search(str(error)))


def _available() -> int | None:
    free = _field(Path("/proc/meminfo"), "MemAvailable:")
    if free is not None:
        return free
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # not every system has them
        return None


def _field(path: Path, name: str) -> int | None:
    """Bytes that a file of Linux states in kB, or None where there is no such line."""
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, ValueError, StopIteration):
        return None


def _container() -> int | None:
    """What a control group leaves, or None where none limits memory."""
    for limit, used in (
        ("max", "current"),
        ("memory/limit_in_bytes", "memory/usage_in_bytes"),
    ):
        try:
            folder = Path("/sys/fs/cgroup")
            return int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return None


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
        free = free_bytes(self._device)
        self._budget = None if free is None or tokens is not None else int(free * SHARE)
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
        most = TRUNK_BYTES.get(self._device.type, TRUNK_BYTES["cpu"])
        free = free_bytes(self._device)
        if free is not None:
            most = min(most, int(free * TRUNK_SHARE))
        return max(1, most // state_bytes(self._config, self._dtype))

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
        """The cost of a batch (`hijacklens.engine.packs`), padding included, for each token."""
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
        return tokens * token_bytes(self._config, self._dtype, width=keys) <= self._budget
