"""Sabotages of `analyses.paper.value_matrix`."""

from __future__ import annotations

import torch

from hijacklens.one_layer import memory
from sabotages import Sabotage

CONSTRUCTED, RANDOM = memory.constructed, memory.random
SMALL = {"bits": (3,), "seeds": 2, "steps": 1, "evaluation": 256}


def swapped_memories(monkeypatch):
    """Exchange the random and the constructed memory."""
    draw = torch.Generator().manual_seed(5)
    monkeypatch.setattr(memory, "constructed", lambda W_E, task: RANDOM(W_E, task, draw))
    monkeypatch.setattr(memory, "random", lambda W_E, task, draw: CONSTRUCTED(W_E, task))


SABOTAGES = (
    Sabotage(
        analysis="fig3a",
        how="untrained models",
        claims=("a trained W_V is more accurate",),
        changes={**SMALL, "lengths": (16,), "d_model": 8},
    ),
    Sabotage(
        analysis="figc1",
        how="untrained models",
        claims=(
            "a trained W_V is more accurate than the identity for every m at the",
            "a trained W_V is more accurate than the identity for every m at every",
            "the gain is larger",
        ),
        scale="full",
        changes={**SMALL, "lengths": (16, 32), "d_model": 8},
    ),
    Sabotage(
        analysis="figc2",
        how="constructed and random memory swapped",
        claims=(
            "equation 5.1 in place of W_V costs",
            "equation 5.1 costs less than .05 at every m and d",
            "a random memory costs",
        ),
        scale="full",
        changes={
            "bits": (4,),
            "d_models": (16,),
            "seeds": 2,
            "steps": 300,
            "length": 64,
            "evaluation": 512,
        },
        patch=swapped_memories,
    ),
    Sabotage(
        analysis="figc3",
        how="untrained models",
        scale="full",
        claims=("the smallest angle to a random", "the smallest angle to a Gaussian"),
        changes={**SMALL, "bits": (4,), "d_models": (32,), "seeds": 6, "length": 16},
    ),
)
