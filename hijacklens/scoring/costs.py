"""What a forward pass costs, in units of one token: what plans are weighed with.

The linear layers cost the same for every token. On top of it come

    pairs     every query token of a row has a score with every key token, padding included
    past      keys and values that a row takes from a cache are gathered and repeated to its heads
    rows      attention works row by row, on matrices that are small
    passes    every forward pass reads all weights and starts every kernel

The weights of memory traffic against arithmetic are measured on a CPU (SmolLM2-135M, float32, one
thread, fused attention: a token of a row of 160 costs 5 per cent more than one of a row of 48) and,
for GPUs, follow from bandwidth and peak of an H200. They decide what is run, never what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """Operations in the linear layers that take as long as moving one number."""

    score: float
    """For one attention score, with its mask, its softmax and the copies made of it."""
    state: float
    """For one number of a cached key or value."""
    row: float
    """For a row, in tokens."""
    forward_pass: float
    """For a forward pass, in tokens."""


CPU = Machine(score=90.0, state=135.0, row=0.4, forward_pass=40.0)
GPU = Machine(score=600.0, state=60.0, row=0.4, forward_pass=2_000.0)
GPU_16_BIT = Machine(score=2_500.0, state=250.0, row=0.4, forward_pass=4_000.0)


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs in units of what the linear layers take for one token."""

    pair: float
    past: float
    row: float
    forward_pass: float

    @classmethod
    def of(cls, config: Any, *, device: torch.device, dtype: torch.dtype) -> Costs:
        """The costs of a model with a TransformerLens configuration."""
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
        """Those of GPT-2 small on a CPU in float32, for a plan without a model."""
        small = SimpleNamespace(n_heads=12, d_head=64, d_model=768, d_mlp=3072)
        return cls.of(small, device=torch.device("cpu"), dtype=torch.float32)

    def rows(self, own: Any, past: Any) -> Any:
        """The cost of rows with so many tokens of their own and so many cached ones before."""
        return own + self.pair * own * (own + past) + self.past * past + self.row
