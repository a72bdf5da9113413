"""Sabotages of `analyses.paper.lemmas`."""

from __future__ import annotations

from torch.nn.functional import cross_entropy

from analyses.paper.lemmas import gram_matrix as GRAM_MATRIX
from sabotages import Sabotage


def gram_matrix(change):
    """Equation 5.2 with other numbers in place of b and b0."""

    def patch(monkeypatch):
        def broken(bits, *, a, b, b0):
            return GRAM_MATRIX(bits, a=a, **change(b, b0))

        monkeypatch.setattr("analyses.paper.lemmas.gram_matrix", broken)

    return patch


def double_scores(monkeypatch):
    """The gradient with respect to half the score."""
    monkeypatch.setattr(
        "analyses.paper.lemmas.cross_entropy",
        lambda logits, labels, reduction: 2 * cross_entropy(logits, labels, reduction=reduction),
    )


SABOTAGES = (
    Sabotage(
        analysis="lemma5",
        how="embeddings with b0 above b",
        claims=("with b = b0 no rank", "with b = b0 every rank"),
        patch=gram_matrix(lambda b, b0: {"b": b, "b0": b + 1.0}),
    ),
    Sabotage(
        analysis="lemma5",
        how="a b too small for embeddings",
        claims=("all Gram matrices are positive",),
        patch=gram_matrix(lambda b, b0: {"b": 0.0, "b0": 0.0}),
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
