"""Sabotages of `analyses.paper.constructed_error`."""

from __future__ import annotations

import dataclasses
import math

import torch

from analyses.paper.error_exponent import ChernoffBound
from hijacklens.one_layer import memory
from hijacklens.one_layer.task import ConceptTask
from sabotages import Sabotage

THEOREM_1 = memory.theorem_1
IDENTITY = memory.identity
FEW = {"contexts": 512}


def value_matrix(change):
    """The model of Theorem 1 with another W_V."""

    def patch(monkeypatch):
        def broken(task, **options):
            weights = THEOREM_1(task, **options)
            return dataclasses.replace(weights, W_V=change(weights, task))

        monkeypatch.setattr("analyses.paper.constructed_error.memory.theorem_1", broken)

    return patch


def random_memory(weights, task):
    return memory.random(weights.W_E, task, torch.Generator().manual_seed(1))


def larger_exponent(monkeypatch):
    def broken(task, model):
        exponents = torch.full((task.vocab - 1,), 5.0, dtype=torch.float64)
        return ChernoffBound(exponents, torch.zeros_like(exponents))

    monkeypatch.setattr("analyses.paper.constructed_error.chernoff_bound", broken)


def information(value):
    """Another Chernoff information than that of the task."""

    def patch(monkeypatch):
        monkeypatch.setattr(
            "analyses.paper.constructed_error.chernoff_information", lambda task: value
        )

    return patch


def identity_that_is_the_memory(monkeypatch):
    def broken(width, **options):
        bits = width.bit_length() - 1
        task = ConceptTask(bits=bits, omega=1.0, support="hamming-1")
        return memory.constructed(torch.eye(width), task)

    monkeypatch.setattr("analyses.paper.constructed_error.memory.identity", broken)


def ties_for_the_label(monkeypatch):
    from hijacklens.one_layer import evaluation

    plain = evaluation.accuracy

    def generous(*arguments, ties="split", **options):
        return plain(*arguments, ties="label", **options)

    monkeypatch.setattr("analyses.paper.constructed_error.evaluation.accuracy", generous)


SABOTAGES = (
    Sabotage(
        analysis="theorem1",
        how="a random memory",
        claims=(
            "at the longest L",
            "the error falls from",
            "the margin of the model's own",
            "no margin differs",
            "accuracy at omega = 1, m = 5",
            "accuracy at omega = 1, m = 7",
            "no accuracy is 4 standard errors",
        ),
        changes=FEW,
        patch=value_matrix(random_memory),
    ),
    Sabotage(
        analysis="theorem1",
        how="the bound of a far larger exponent",
        claims=("no measured error is surely above",),
        changes=FEW,
        patch=larger_exponent,
    ),
    Sabotage(
        analysis="theorem1",
        how="tokens that tell nothing",
        claims=("the exponent is at most the Chernoff information",),
        changes=FEW,
        patch=information(0.0),
    ),
    Sabotage(
        analysis="theorem1",
        how="tokens that tell everything",
        claims=("the Chernoff information is at most",),
        changes=FEW,
        patch=information(math.log(2)),
    ),
    Sabotage(
        analysis="lemma2",
        how="a random memory",
        claims=("the constructed memory has error 0",),
        changes=FEW,
        patch=value_matrix(random_memory),
    ),
    Sabotage(
        analysis="lemma2",
        how="the constructed memory in place of the identity",
        claims=("the identity has an error above 0", "the error of the identity is 1"),
        changes=FEW,
        patch=identity_that_is_the_memory,
    ),
    Sabotage(
        analysis="lemma2",
        how="ties always for the label",
        claims=("with ties split",),
        changes=FEW,
        patch=ties_for_the_label,
    ),
)
