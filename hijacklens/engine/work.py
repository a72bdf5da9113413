"""The work of a run: batches of rows, one forward pass each, and the numbers that are read in them.

When memory runs out, a batch is split and the run continues with smaller ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.engine.batch_size import BatchSize
from hijacklens.engine.forward import Pass
from hijacklens.engine.key_values import Pool
from hijacklens.engine.packs import apart
from hijacklens.engine.plan import Level
from hijacklens.engine.reading import Finished, Readings, ReadOptions
from hijacklens.engine.rows import PackedRows, Row, to_device
from hijacklens.engine.trie import Trie
from hijacklens.errors import InputError
from hijacklens.models.device_memory import is_out_of_memory
from hijacklens.models.hooked import device_of
from hijacklens.prompts.prefixes import Prefix

CACHED_ROWS = 4
"""Rows of logits that fit into the cache of a CPU core."""


@dataclass(slots=True)
class Work:
    """The finished part of a run.

    On a GPU the numbers of a batch are fetched after the next batch was started, so that the GPU
    computes while this process keeps readings and prepares rows.
    """

    run: Pass
    readings: Readings
    options: ReadOptions
    size: BatchSize
    finished: Finished
    planned_tokens: int
    forward_tokens: int = 0
    padded_tokens: int = 0
    passes: int = 0
    fraction: float = 0.0
    started: tuple[Tensor, Int[np.ndarray, " read"], float] | None = None
    """The numbers of the last batch, the ids of its prefixes, and its fraction of the work."""

    def do(self, level: Level, pool: Pool | None, *, keep: bool, one_length: bool = False) -> None:
        """Run the packs of a level.

        Args:
            level: The packs.
            pool: The keys and values of their pasts.
            keep: Whether the keys and values of the level go into the pool, too.
            one_length: Whether the rows of a batch must have the same length.
        """
        fill = self.run.windows is not None
        for batch in self.size.batches(level, one_length=one_length, fill=fill):
            self._do(level.trie, batch, pool, keep=keep)

    def _do(self, trie: Trie, rows: Sequence[Row], pool: Pool | None, *, keep: bool) -> None:
        """Run rows in one forward pass, or in several smaller ones if memory runs out."""
        lengths = [sum(pack.computed for pack in row) for row in rows]
        padded = len(rows) * max(lengths)
        found = self._attempt(trie, rows, pool, keep)
        if found is None:
            # The error is gone by now, and with it the tensors in its traceback.
            self.size.shrink(padded)
            for part in _smaller(trie, rows):
                self._do(trie, part, pool, keep=keep)
            return
        tokens = sum(lengths)
        self.forward_tokens += tokens
        self.padded_tokens += padded
        self.passes += 1
        # Rows that had to be split compute more than was planned.
        fraction = min(tokens / max(self.planned_tokens, 1), 1 - self.fraction)
        self.fraction += fraction
        self.fetch()
        self.started = *found, fraction
        if found[0].device.type == "cpu":
            self.fetch()

    def fetch(self) -> None:
        """Take over the numbers of the batch that was started last."""
        if self.started is None:
            return
        (numbers, rows, fraction), self.started = self.started, None
        at, _ = self.readings.requests.where(rows)
        values = numbers.cpu().numpy()
        self.readings.logprobs[at] = values[: len(at)]
        self.readings.tops[rows] = values[len(at) :].reshape(2, -1).T
        self.finished(self.readings.take(np.sort(rows)), fraction)

    def _attempt(
        self, trie: Trie, rows: Sequence[Row], pool: Pool | None, keep: bool
    ) -> tuple[Float[Tensor, " number"], Int[np.ndarray, " read"]] | None:
        """Return the numbers that are read in rows, and where; None if memory ran out."""
        try:
            batch = PackedRows.of(trie, rows, device_of(self.run.model))
            logits = self.run.logits(batch, pool, keep=keep).float()
            requests = self.readings.requests
            at, counts = requests.where(batch.ids)
            of_row = np.repeat(np.arange(len(batch.ids)), counts)
            drawn = None
            if self.options.temperature:
                prefixes = [requests.prefixes[i] for i in batch.ids.tolist()]
                drawn = _drawn(logits, prefixes, self.options)
            numbers = _numbers(logits, np.stack([of_row, requests.tokens[at]]), drawn)
            return numbers, batch.ids
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None


def _smaller(trie: Trie, rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
    """Split a batch that was too large; a single leaf cannot be split."""
    middle, packs = len(rows) // 2, rows[0]
    if middle:
        return rows[:middle], rows[middle:]
    if len(packs) > 1:
        return [[[pack]] for pack in packs]
    if packs[0].stop > packs[0].first + 1:
        return [[[leaf]] for leaf in apart(trie, packs[0])]
    raise InputError(
        f"not enough memory for a single prompt of {packs[0].computed} tokens. Use a "
        "smaller dtype or another device, or free memory."
    )


def _numbers(
    logits: Float[Tensor, "read vocab"],
    requested: Int[np.ndarray, "2 token"],
    drawn: Int[Tensor, " read"] | None = None,
) -> Float[Tensor, " number"]:
    """Return the log-probabilities of tokens, then the likeliest tokens and theirs, in one tensor.

    Args:
        logits: In float32, which holds every token id.
        requested: Rows and tokens.
        drawn: The tokens to return in place of the likeliest.
    """
    on_cpu = logits.device.type == "cpu"
    # torch.max and torch.logsumexp take three times as long on a CPU, where rows that fit into its
    # cache are read once.
    top = torch.from_numpy(logits.numpy().argmax(-1)) if on_cpu else logits.argmax(-1)
    largest = logits.gather(1, top[:, None])
    parts = [x.split(CACHED_ROWS if on_cpu else max(1, len(x))) for x in (logits, largest)]
    sums = [(part - most).exp_().sum(-1) for part, most in zip(*parts, strict=True)]
    norm = torch.cat(sums).log() + largest[:, 0]
    at_read, of_token = to_device(requested, logits.device)
    logprobs = logits[at_read, of_token] - norm[at_read]
    if drawn is not None:
        top, largest = drawn, logits.gather(1, drawn[:, None])
    return torch.cat([logprobs, top.float(), largest[:, 0] - norm])


def _drawn(
    logits: Float[Tensor, "read vocab"], prefixes: Sequence[Prefix], options: ReadOptions
) -> Int[Tensor, " read"]:
    """Draw a next token after each prefix, by the maximum of logits with Gumbel noise.

    The noise is made on the CPU, so that a draw is the same on every device.
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for i, (row, prefix) in enumerate(zip(logits, prefixes, strict=True)):
        key = hashlib.sha256(repr(options.draw).encode() + prefix).digest()
        source = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        exponential = torch.empty(len(row)).exponential_(generator=source)
        noise = -exponential.log().to(row.device)
        tokens[i] = (row / options.temperature + noise).argmax()
    return tokens
