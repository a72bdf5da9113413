"""Sabotages of `analyses.paper.sensitivity`."""

from __future__ import annotations

import torch

from hijacklens.one_layer import memory
from sabotages import Sabotage

TINY = {"bits": 4, "d_model": 8, "length": 16, "seeds": 3, "evaluation": 256}


def random_memory(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(memory, "constructed", lambda W_E, task: memory.random(W_E, task, draw))


SABOTAGES = (
    Sabotage(
        analysis="sensitivity",
        how="untrained models",
        claims=("a trained W_V beats", "inner products fall", "attention selects"),
        changes={**TINY, "steps": 4, "variants": ("as we run it", "steps / 2")},
    ),
    Sabotage(
        analysis="sensitivity",
        how="a random memory in place of the constructed one",
        claims=("equation 5.1 keeps",),
        changes={**TINY, "steps": 300, "variants": ("as we run it",)},
        patch=random_memory,
    ),
)
