"""The forward pass over a batch of rows: tokens, masks, positions, cached keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.key_values import Pool
from hijacklens.engine.packs import separate
from hijacklens.engine.rows import PackedRows
from hijacklens.engine.trie import Trie
from hijacklens.models.agreement import (
    plain_blocks_of,
    plain_of,
    require_agreement,
    require_agreement_on,
)
from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.models.unhooked import NO_PLAIN_BLOCKS, PlainBlocks, logits_of
from hijacklens.probe import Probe, logits_at
from hijacklens.prompts.layout import TOKEN_MASK, Layout
from hijacklens.prompts.prefixes import Prefix, prefix_of, symbols_of
from hijacklens.prompts.tokens import TokenIds


@dataclass(frozen=True, slots=True)
class Pass:
    """How a model is run on rows."""

    model: HookedModel
    probes: Sequence[Probe]
    spans: Sequence[str]
    windows: Mapping[str, int | None] | None
    """Kinds of attention masks and their windows (`hijacklens.engine.support`); None for rows of
    one leaf each, for which a causal model needs no mask."""
    plain: torch.nn.Module | None = None
    """The module that runs instead of the hooked model (`hijacklens.models.unhooked`), if any."""
    plain_blocks: PlainBlocks = NO_PLAIN_BLOCKS
    """With probes, the blocks of the layers that no probe acts on."""

    @classmethod
    def of(
        cls, model: HookedModel, probes: Sequence[Probe], spans: Sequence[str], *, operation: str
    ) -> Pass:
        """Return how a model runs on rows of one leaf each.

        Raises:
            InputError: The model is in training mode, or does not run as the plain model does
                (`hijacklens.models.agreement`).
        """
        if probes:
            require_agreement(model, operation="a probe")
            blocks = plain_blocks_of(model)
            return cls(model, probes, spans, None, plain_blocks=blocks)
        return cls(model, (), spans, None, plain_of(model, operation=operation))

    def after(self, prefix: TokenIds) -> Float[Tensor, " vocab"]:
        """Return log-probabilities (nats, float32) of every next token after one prefix."""
        trie = Trie.of([prefix_of(prefix)])
        self.require_agreement_on(trie.leaves)
        batch = PackedRows.of(trie, [separate(trie)], device_of(self.model))
        return self.logits(batch)[0].float().log_softmax(-1)

    def require_agreement_on(self, prefixes: Sequence[Prefix]) -> None:
        """Refuse probes on prompts so long that hook points change the model.

        Raises:
            InputError: As above.
        """
        if self.probes:
            longest = torch.tensor(symbols_of(max(prefixes, key=len)))
            require_agreement_on(self.model, longest & TOKEN_MASK)

    def logits(
        self, batch: PackedRows, pool: Pool | None = None, *, keep: bool = False
    ) -> Float[Tensor, "read vocab"]:
        """Return the logits of all reads of the rows, row by row.

        Args:
            batch: The rows; without masks, one leaf in each.
            pool: The keys and values of their pasts.
            keep: Whether the keys and values of the rows go into the pool, too.
        """
        forward: dict[str, Any] = {}
        if self.windows is not None:
            dtype = next(iter(self.model.parameters())).dtype
            forward["attention_mask"] = batch.masks(self.windows, dtype)
            forward["position_ids"] = batch.positions
        if pool is not None:
            forward["past_key_values"] = pool.states(batch, keep=keep)
        past = batch.path if batch.path.shape[1] else None
        layout = Layout.of_symbols(batch.symbols, self.spans, past)
        at_row, at_position = batch.reads.T
        if self.plain is not None:
            return logits_of(self.plain, layout.tokens, at_row, at_position, **forward)
        return logits_at(
            self.model,
            layout,
            at_row,
            at_position,
            probes=self.probes,
            plain_blocks=self.plain_blocks,
            **forward,
        )
