"""Sabotages of `analyses.paper.lemmas`."""

from __future__ import annotations

from torch.nn.functional import cross_entropy

from analyses.paper import lemmas
from sabotages import Sabotage

GRAM_MATRIX, GAPS = lemmas.gram_matrix, lemmas._gradient_gaps


def gram_matrix(change):
    """Change b and b0 of equation 5.2."""

    def patch(monkeypatch):
        def broken(bits, *, a, b, b0):
            return GRAM_MATRIX(bits, a=a, **change(b, b0))

        monkeypatch.setattr(lemmas, "gram_matrix", broken)

    return patch


def double_loss(monkeypatch):
    """Double the loss, and with it its gradient in the scores."""

    def broken(logits, labels, reduction):
        return 2 * cross_entropy(logits, labels, reduction=reduction)

    monkeypatch.setattr(lemmas, "cross_entropy", broken)


def alpha_in_both(monkeypatch):
    def broken(model, contexts):
        gap, _ = GAPS(model, contexts)
        return gap, gap

    monkeypatch.setattr(lemmas, "_gradient_gaps", broken)


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
        how="a doubled loss",
        claims=("the closed form agrees",),
        patch=double_loss,
    ),
    Sabotage(
        analysis="lemma6",
        how="alpha in the second term of both readings",
        claims=("without alpha in its second term",),
        patch=alpha_in_both,
    ),
)
