"""Sabotages of `analyses.theory`."""

from __future__ import annotations

from hijacklens.concepts.embeddings import hamming_geometry
from sabotages import Sabotage


def geometry_of_full_rank(monkeypatch):
    def broken(bits, *, a, b, b0, **options):
        return hamming_geometry(bits, a=a, b=b, b0=b + 1.0, **options)

    monkeypatch.setattr("analyses.theory.hamming_geometry", broken)


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
)
