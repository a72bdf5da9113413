"""Batches of token rows of different lengths, padded on the right, for probes that run a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hijacklens.engine.packs import BATCH_TOKENS
from hijacklens.errors import InputError
from hijacklens.models.agreement import agreement_of, require_agreement_on
from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.prompts.layout import TOKEN_MASK
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
    model: HookedModel,
    rows: Sequence[TokenIds],
    *,
    limit: int | None = None,
    most_rows: int | None = None,
    one_length: bool = False,
) -> Iterator[TokenBatch]:
    """Yield rows in batches of similar length, the longest first.

    Args:
        model: The model that reads them; some models need `one_length`.
        rows: Token ids or symbols (`hijacklens.prompts.layout`); every row has at least one.
        limit: As for `batch_size`; a longer row runs alone.
        most_rows: Maximum number of rows in a batch, at least 1; None for no limit.
        one_length: Whether all rows of a batch must have the same length.

    Raises:
        InputError: The limit is below 1, or hook points change the model on the longest row.
    """
    device = device_of(model)
    size, one_length = batch_size(device, limit), one_length or needs_one_length(model)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    while order:
        width = len(rows[order[0]])
        count = max(1, size // width)
        count = count if most_rows is None else min(count, most_rows)
        here = [i for i in order[:count] if not one_length or len(rows[i]) == width]
        batch = TokenBatch.of(rows, here, device=device)
        require_agreement_on(model, batch.symbols[0] & TOKEN_MASK)
        yield batch
        order = order[len(here) :]


def needs_one_length(model: HookedModel) -> bool:
    """Return whether the numbers of a model depend on the longest prompt of a batch."""
    agreement = agreement_of(model)
    return agreement.switch is None and bool(agreement.alone)
