"""Sabotages of `analyses.paper.context_mixing`."""

from __future__ import annotations

import dataclasses

import torch

from hijacklens.one_layer import memory, trained
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

    monkeypatch.setattr(memory, "theorem_1", broken)


def labels_exchanged(monkeypatch):
    def broken(task, *arguments, **options):
        contexts = MIXED(task, *arguments, **options)
        return MixedContexts(contexts.tokens, contexts.second, contexts.first)

    monkeypatch.setattr(ConceptTask, "sample_mixed", broken)


class Ignorant:
    """A Bayes rule that ignores the context and is right by chance."""

    def __init__(self, task, **options):
        self.task = task

    def __call__(self, tokens):
        return torch.zeros(len(tokens), self.task.vocab, dtype=torch.float64)


def ignorant_bayes(monkeypatch):
    monkeypatch.setattr(trained, "BayesRule", Ignorant)


SABOTAGES = (
    Sabotage(
        analysis="figc13",
        how="untrained models",
        claims=("the fraction of the second label grows", "trained models answer each label"),
        changes=TINY,
        scale="full",
    ),
    Sabotage(
        analysis="figc13",
        how="a random memory",
        claims=("the constructed model matches the anchors",),
        changes=TINY,
        patch=random_memory,
    ),
    Sabotage(
        analysis="figc13",
        how="the two labels exchanged",
        claims=("the constructed model matches the anchors",),
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
        how="an ignorant Bayes rule",
        claims=("no model exceeds",),
        changes={
            "bits": (3,),
            "d_model": 8,
            "lengths": (16, 64),
            "seeds": 2,
            "steps": 150,
            "evaluation": 512,
        },
        patch=ignorant_bayes,
    ),
    Sabotage(
        analysis="figc14",
        how="an ignorant Bayes rule, at lengths with anchors",
        claims=("the Bayes rule is as accurate",),
        changes={
            "bits": (5,),
            "d_model": 8,
            "lengths": (32, 64),
            "seeds": 2,
            "steps": 1,
            "evaluation": 512,
        },
        patch=ignorant_bayes,
    ),
)
