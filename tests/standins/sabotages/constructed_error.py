"""Sabotages of `analyses.paper.constructed_error`."""

from __future__ import annotations

import dataclasses
import math

import torch

from analyses.paper import constructed_error
from analyses.paper.error_exponent import ChernoffBound
from hijacklens.one_layer import evaluation, memory
from hijacklens.one_layer.task import ConceptTask
from sabotages import Sabotage

THEOREM_1, ACCURACY = memory.theorem_1, evaluation.accuracy
FEW = {"contexts": 512}


def value_matrix(change):
    """Change W_V of the model of Theorem 1."""

    def patch(monkeypatch):
        def broken(task, **options):
            weights = THEOREM_1(task, **options)
            return dataclasses.replace(weights, W_V=change(weights, task))

        monkeypatch.setattr(memory, "theorem_1", broken)

    return patch


def random_memory(weights, task):
    return memory.random(weights.W_E, task, torch.Generator().manual_seed(1))


def larger_exponent(monkeypatch):
    def broken(task, model):
        exponents = torch.full((task.vocab - 1,), 5.0, dtype=torch.float64)
        return ChernoffBound(exponents, torch.zeros_like(exponents))

    monkeypatch.setattr(constructed_error, "chernoff_bound", broken)


def information(value):
    """Report a fixed Chernoff information for every task."""

    def patch(monkeypatch):
        monkeypatch.setattr(constructed_error, "chernoff_information", lambda task: value)

    return patch


def identity_that_is_the_memory(monkeypatch):
    def broken(width, **options):
        bits = width.bit_length() - 1
        task = ConceptTask(bits=bits, omega=1.0, support="hamming-1")
        return memory.constructed(torch.eye(width), task)

    monkeypatch.setattr(memory, "identity", broken)


def ties_for_the_label(monkeypatch):
    def generous(*arguments, ties="split", **options):
        return ACCURACY(*arguments, ties="label", **options)

    monkeypatch.setattr(evaluation, "accuracy", generous)


SABOTAGES = (
    Sabotage(
        analysis="theorem1",
        how="a random memory",
        claims=(
            "at the longest L",
            "the error falls from",
            "at m = 5, omega = 1 the margin",
            "no margin differs",
            "every accuracy is within 4",
        ),
        changes=FEW,
        patch=value_matrix(random_memory),
    ),
    Sabotage(
        analysis="theorem1",
        how="a bound with a far larger exponent",
        claims=("no measured error exceeds",),
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
        claims=("if ties are split",),
        changes=FEW,
        patch=ties_for_the_label,
    ),
)
