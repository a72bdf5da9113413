"""Sabotages of `analyses.theory`."""

from __future__ import annotations

from torch.nn.functional import cross_entropy

from hijacklens.concepts.embeddings import hamming_geometry
from sabotages import Sabotage


def geometry_of_full_rank(monkeypatch):
    def broken(bits, *, a, b, b0, **options):
        return hamming_geometry(bits, a=a, b=b, b0=b + 1.0, **options)

    monkeypatch.setattr("analyses.theory.hamming_geometry", broken)


def double_scores(monkeypatch):
    """The gradient with respect to half the score."""
    monkeypatch.setattr(
        "analyses.theory.cross_entropy",
        lambda logits, labels, reduction: 2 * cross_entropy(logits, labels, reduction=reduction),
    )


SABOTAGES = (
    Sabotage(
        analysis="lemma5",
        how="embeddings with b0 above b",
        claims=("with b = b0 no rank",),
        patch=geometry_of_full_rank,
    ),
    Sabotage(
        analysis="lemma5",
        how="no offset in the control",
        claims=("with b < b0 the rank",),
        changes={"offset": 0.0},
    ),
    Sabotage(
        analysis="lemma6",
        how="a loss of twice the size",
        claims=("the closed form agrees",),
        patch=double_scores,
    ),
    Sabotage(
        analysis="lemma6",
        how="contexts in which no token repeats",
        claims=("without alpha in its second term",),
        changes={"lengths": (1,)},
    ),
)
