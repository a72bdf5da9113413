"""Sabotages of `analyses.paper.context_mixing`."""

from __future__ import annotations

import dataclasses

import torch

from hijacklens.one_layer import memory
from hijacklens.one_layer.task import ConceptTask, MixedContexts
from sabotages import Sabotage

THEOREM_1, MIXED = memory.theorem_1, ConceptTask.sample_mixed
TINY = {
    "bits": (5,),
    "d_model": 8,
    "length": 256,
    "seeds": 2,
    "steps": 1,
    "contexts": 256,
}


def random_memory(monkeypatch):
    def broken(task, **options):
        weights = THEOREM_1(task, **options)
        draw = torch.Generator().manual_seed(0)
        return dataclasses.replace(weights, W_V=memory.random(weights.W_E, task, draw))

    monkeypatch.setattr("analyses.paper.context_mixing.memory.theorem_1", broken)


def labels_exchanged(monkeypatch):
    def broken(task, *arguments, **options):
        contexts = MIXED(task, *arguments, **options)
        return MixedContexts(contexts.tokens, contexts.second, contexts.first)

    monkeypatch.setattr("hijacklens.one_layer.task.ConceptTask.sample_mixed", broken)


class Clairvoyant:
    """A Bayes rule that is right by chance, whatever the context says."""

    def __init__(self, task, **options):
        self.task = task

    def __call__(self, tokens):
        return torch.zeros(len(tokens), self.task.vocab, dtype=torch.float64)


SABOTAGES = (
    Sabotage(
        analysis="figc13",
        how="untrained models",
        claims=("the share of the second label grows",),
        changes=TINY,
    ),
    Sabotage(
        analysis="figc13",
        how="a random memory",
        claims=("the constructed model answers as the anchors",),
        changes=TINY,
        patch=random_memory,
    ),
    Sabotage(
        analysis="figc13",
        how="the two labels exchanged",
        claims=("the constructed model answers as the anchors",),
        changes=TINY,
        patch=labels_exchanged,
    ),
    Sabotage(
        analysis="figc14",
        how="untrained models",
        claims=("accuracy at the longest L",),
        changes={"bits": (3,), "d_model": 8, "lengths": (4, 8), "seeds": 2, "steps": 1},
    ),
    Sabotage(
        analysis="figc14",
        how="a Bayes rule that knows nothing",
        claims=("no model is above",),
        changes={
            "bits": (3,),
            "d_model": 8,
            "lengths": (16, 64),
            "seeds": 2,
            "steps": 150,
            "evaluation": 512,
        },
        patch=lambda monkeypatch: monkeypatch.setattr(
            "hijacklens.one_layer.trained.BayesRule", Clairvoyant
        ),
    ),
    Sabotage(
        analysis="figc14",
        how="a Bayes rule that knows nothing, where there are anchors",
        claims=("the Bayes rule is as accurate",),
        changes={
            "bits": (5,),
            "d_model": 8,
            "lengths": (32, 64),
            "seeds": 2,
            "steps": 1,
            "evaluation": 512,
        },
        patch=lambda monkeypatch: monkeypatch.setattr(
            "hijacklens.one_layer.trained.BayesRule", Clairvoyant
        ),
    ),
)
