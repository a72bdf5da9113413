"""Sabotages of `analyses.paper.identity_law`."""

from __future__ import annotations

import torch

from hijacklens.one_layer.task import ConceptTask, Contexts
from sabotages import Sabotage

SAMPLE = ConceptTask.sample


def shuffled_labels(monkeypatch):
    def broken(task, batch, generator, **options):
        contexts = SAMPLE(task, batch, generator, **options)
        order = torch.randperm(batch, generator=generator)
        return Contexts(contexts.tokens, contexts.labels[order])

    monkeypatch.setattr(ConceptTask, "sample", broken)


SABOTAGES = (
    Sabotage(
        analysis="theorem3",
        how="an untrained model",
        claims=(
            "among absent labels the posterior",
            "among absent labels the linear law",
            "among absent labels the slope",
        ),
        changes={"steps": 1, "bits": (3,)},
    ),
    Sabotage(
        analysis="theorem3",
        how="shuffled labels",
        claims=("with all labels the slope",),
        changes={"steps": 200, "bits": (3,)},
        patch=shuffled_labels,
    ),
    Sabotage(
        analysis="theorem3",
        how="an untrained model at full scale",
        claims=("with all labels the linear law",),
        changes={"steps": 1, "bits": (3,), "seeds": 2},
        scale="full",
    ),
)
