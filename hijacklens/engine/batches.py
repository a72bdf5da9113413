"""Batches of token rows of different lengths, padded on the right, for probes that run a model.

>>> both = list(batches([(5, 6, 7), (8,), (9, 9)], device=torch.device("cpu"), limit=6))
>>> [batch.members for batch in both], both[0].symbols.tolist()
([(0, 2), (1,)], [[5, 6, 7], [9, 9, 0]])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hijacklens.engine.packs import BATCH_TOKENS
from hijacklens.errors import InputError
from hijacklens.prompts.tokens import TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rows that run together; a causal model cannot see the padding from the tokens before it."""

    members: tuple[int, ...]
    """Indices of the rows."""
    symbols: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]

    @classmethod
    def of(
        cls, rows: Sequence[TokenIds], members: Sequence[int], *, device: torch.device
    ) -> TokenBatch:
        """Return a batch of the rows with these indices, padded with 0 to the longest."""
        symbols = [torch.tensor(rows[i], dtype=torch.long) for i in members]
        lengths = torch.tensor(list(map(len, symbols)), device=device)
        return cls(tuple(members), pad_sequence(symbols, batch_first=True).to(device), lengths)

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Which tokens are not padding."""
        positions = torch.arange(self.symbols.shape[1], device=self.symbols.device)
        return positions[None] < self.lengths[:, None]


def batch_size(device: torch.device, limit: int | None = None) -> int:
    """Return the size of a batch in tokens, padding included: a limit, or what suits the device.

    Raises:
        InputError: The limit is below 1.
    """
    size = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]) if limit is None else limit
    if size < 1:
        raise InputError(f"batch size must be at least 1 token, not {size}.")
    return size


def batches(
    rows: Sequence[TokenIds],
    *,
    device: torch.device,
    limit: int | None = None,
    most_rows: int | None = None,
) -> Iterator[TokenBatch]:
    """Yield rows in batches of similar length, the longest first.

    Args:
        rows: Token ids or symbols (`hijacklens.prompts.layout`); every row has at least one.
        device: The device of the model's input.
        limit: As for `batch_size`; a longer row runs alone.
        most_rows: Maximum number of rows in a batch, at least 1; None for no limit.

    Raises:
        InputError: The limit is below 1.
    """
    size = batch_size(device, limit)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    while order:
        count = max(1, size // len(rows[order[0]]))
        count = count if most_rows is None else min(count, most_rows)
        yield TokenBatch.of(rows, order[:count], device=device)
        order = order[count:]
