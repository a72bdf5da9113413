"""Sabotages of `analyses.paper.geometry_theory`."""

from __future__ import annotations

import torch

from analyses.paper import geometry_theory
from hijacklens.one_layer import evaluation, memory
from hijacklens.one_layer.embeddings import hamming_geometry
from hijacklens.statistics import Interval
from sabotages import Sabotage

GEOMETRY_LOGITS = memory.geometry_logits
FEW = {"contexts": 64, "ratios": (0.0, 5.0, 20.0)}


def random_memory(monkeypatch):
    def broken(W_E, task):
        return memory.random(W_E, task, torch.Generator().manual_seed(1))

    monkeypatch.setattr(memory, "constructed", broken)


def formula(change):
    """Replace the Walsh formula."""

    def patch(monkeypatch):
        monkeypatch.setattr(memory, "geometry_logits", change)

    return patch


def at_another_slope(task, *, a, b, b0):
    return GEOMETRY_LOGITS(task, a=2 * a, b=b, b0=b0)


def upside_down(task, *, a, b, b0):
    return -GEOMETRY_LOGITS(task, a=a, b=b, b0=b0)


def with_b_for_the_label(task, *, a, b, b0):
    logits = GEOMETRY_LOGITS(task, a=a, b=b, b0=b0)
    logits[0] += b
    return logits


def orthonormal_at_one_slope(monkeypatch):
    """Use orthonormal embeddings, which have no geometry, at one of the slopes."""

    def broken(bits, *, a, **options):
        if a == 0.1:
            return torch.eye(1 << bits, dtype=torch.float64)
        return hamming_geometry(bits, a=a, **options)

    monkeypatch.setattr(geometry_theory, "hamming_geometry", broken)


def always_right(monkeypatch):
    def broken(*arguments, **options):
        return Interval(1.0, 1.0, 1.0)

    monkeypatch.setattr(evaluation, "accuracy", broken)


SABOTAGES = (
    Sabotage(
        analysis="theorem4",
        how="a random memory",
        claims=(
            "the logits of the model's matrices",
            "at beta = 1 and the longest L",
            "if a small b0",
        ),
        changes=FEW,
        patch=random_memory,
    ),
    Sabotage(
        analysis="theorem4",
        how="the Walsh formula at another slope",
        claims=(
            "the logits of the Walsh formula",
            "margin of the Walsh formula at m = 7",
            "margin of the Walsh formula at m = 5",
        ),
        changes=FEW,
        patch=formula(at_another_slope),
    ),
    Sabotage(
        analysis="theorem4",
        how="the Walsh formula upside down",
        claims=("at beta = 1 every geometry",),
        changes=FEW,
        patch=formula(upside_down),
    ),
    Sabotage(
        analysis="theorem4",
        how="b added to the logit of the label alone",
        claims=("margin / a^2",),
        changes=FEW,
        patch=formula(with_b_for_the_label),
    ),
    Sabotage(
        analysis="theorem4",
        how="embeddings without a geometry at one slope",
        claims=("the measured error depends",),
        changes=FEW,
        patch=orthonormal_at_one_slope,
    ),
    Sabotage(
        analysis="theorem4",
        how="answers that are always right",
        claims=("if the margin is below 0",),
        changes=FEW,
        patch=always_right,
    ),
)
