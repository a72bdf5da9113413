"""The forward pass over a batch of rows: tokens, masks, positions, cached keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.key_values import Pool, PooledKeyValues
from hijacklens.engine.rows import Batch, Branch, Row, masks
from hijacklens.engine.trie import common
from hijacklens.engine.unhooked import logits_of
from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.probe import Probe, logits_at
from hijacklens.prompts.layout import Layout


@dataclass(frozen=True, slots=True)
class Pass:
    """How a model is run on rows."""

    model: HookedModel
    probes: Sequence[Probe]
    spans: Sequence[str]
    windows: Mapping[str, int | None] | None
    """Kinds of attention masks and their windows (`hijacklens.engine.support`); None for rows of
    one leaf each, which a causal model needs no mask for."""
    plain: torch.nn.Module | None = None
    """What is run in place of the hooked model (`hijacklens.engine.unhooked`), if anything."""

    def logits(
        self, rows: Sequence[Row], pool: Pool | None = None, *, keep: bool = False
    ) -> Float[Tensor, "read vocab"]:
        """Logits of all reads of the rows, row by row.

        Args:
            rows: What to run; without masks, one leaf to a row.
            pool: Where the keys and values of their pasts are.
            keep: Whether their own go there too.
        """
        batch = Batch.of(rows, device_of(self.model))
        forward: dict[str, Any] = {}
        if self.windows is not None:
            dtype = next(iter(self.model.parameters())).dtype
            forward["attention_mask"] = masks(batch, self.windows, dtype)
            forward["position_ids"] = batch.positions
        if pool is not None:
            forward["past_key_values"] = _key_values(pool, rows, batch, keep=keep)
        past = batch.path if batch.path.shape[1] else None
        layout = Layout.of_symbols(batch.symbols, self.spans, past)
        at_row, at_position = batch.reads.T
        if self.plain is not None:
            return logits_of(self.plain, layout.tokens, at_row, at_position, **forward)
        return logits_at(self.model, layout, at_row, at_position, probes=self.probes, **forward)


def _key_values(pool: Pool, rows: Sequence[Row], batch: Batch, *, keep: bool) -> PooledKeyValues:
    device = batch.symbols.device
    past = torch.zeros_like(batch.path)
    for i, row in enumerate(rows):
        places = [place for branch in row for place in pool.places(branch.path)]
        past[i, : len(places)] = torch.tensor(places, dtype=torch.long, device=device)
    written = None
    if keep:
        own = [place for row in rows for branch in row for place in _own_places(pool, branch)]
        written = torch.tensor(own, dtype=torch.long, device=device)
    return PooledKeyValues(pool, past, written, batch.real if keep else None)


def _own_places(pool: Pool, branch: Branch) -> list[int]:
    """The places of a branch's tokens, in its order."""
    places: list[int] = []
    before = branch.path
    for leaf in branch.leaves:
        places.extend(pool.places(leaf)[common(before, leaf) :])
        before = leaf
    return places
