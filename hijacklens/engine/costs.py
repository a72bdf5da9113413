"""What rows cost, in units of what the linear layers spend on one token."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """Costs on one kind of device.

    `score` and `state` count the multiplications in linear layers that take as long as one such
    item, `row` and `forward_pass` count tokens.
    """

    score: float
    """One attention score, with its mask, its softmax and the copies made of it."""
    state: float
    """One number of a cached key or value."""
    row: float
    """One row of a batch."""
    forward_pass: float
    """One forward pass."""


CPU = Machine(score=90.0, state=135.0, row=0.4, forward_pass=40.0)

GPU = Machine(score=600.0, state=60.0, row=0.4, forward_pass=2_000.0)

GPU_16_BIT = Machine(score=2_500.0, state=250.0, row=0.4, forward_pass=4_000.0)


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a model on a machine, in tokens."""

    pair: float
    """One pair of a query and a key."""
    past: float
    """One cached token that a row attends to."""
    row: float
    forward_pass: float

    @classmethod
    def of(cls, config: Any, *, device: torch.device, dtype: torch.dtype) -> Costs:
        """Return the costs of a model with a TransformerLens configuration."""
        if device.type == "cpu":
            machine = CPU
        else:
            machine = GPU if dtype == torch.float32 else GPU_16_BIT
        heads, width = config.n_heads, config.d_head
        kv_heads = getattr(config, "n_key_value_heads", None) or heads
        inner = config.d_mlp or 4 * config.d_model
        matrices = 3 if getattr(config, "gated_mlp", False) else 2
        linear = 2 * config.d_model * (2 * (heads + kv_heads) * width + matrices * inner)
        return cls(
            pair=heads * (4 * width + machine.score) / linear,
            # Keys and values are read and written, then repeated to all heads.
            past=machine.state * width * (4 * kv_heads + 2 * heads) / linear,
            row=machine.row,
            forward_pass=machine.forward_pass,
        )

    @classmethod
    def usual(cls) -> Costs:
        """Return the costs of GPT-2 small on a CPU in float32, for a plan without a model."""
        small = SimpleNamespace(n_heads=12, d_head=64, d_model=768, d_mlp=3072)
        return cls.of(small, device=torch.device("cpu"), dtype=torch.float32)

    def rows(self, computed: Any, past: Any) -> Any:
        """Return the cost of rows that compute some tokens after `past` cached ones."""
        pairs = computed * (computed + past)
        return computed + self.pair * pairs + self.past * past + self.row
