"""Sabotages of `analyses.geometry_theory`."""

from __future__ import annotations

import torch

from hijacklens.concepts import memory, population
from sabotages import Sabotage

GEOMETRY_LOGITS = population.geometry_logits


def random_memory(monkeypatch):
    def broken(W_E, task):
        return memory.random(W_E, task, torch.Generator().manual_seed(1))

    monkeypatch.setattr("analyses.geometry_theory.memory.constructed", broken)


def shifted_formula(monkeypatch):
    def broken(task, *, a, b, b0):
        return GEOMETRY_LOGITS(task, a=2 * a, b=b, b0=b0)

    monkeypatch.setattr("analyses.geometry_theory.population.geometry_logits", broken)


SABOTAGES = (
    Sabotage(
        analysis="theorem4",
        how="a random memory",
        claims=("the logits of the model's own", "at the longest L the error"),
        changes={"contexts": 256},
        patch=random_memory,
    ),
    Sabotage(
        analysis="theorem4",
        how="the Walsh formula at another slope",
        claims=("margin of the Walsh formula at m = 7", "margin of the Walsh formula at m = 5"),
        changes={"contexts": 64},
        patch=shifted_formula,
    ),
)
