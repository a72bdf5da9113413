"""Sabotages of `analyses.hijack_curves`; they run on a tiny random model."""

from __future__ import annotations

from analyses import hijack_curves
from probes import attention
from sabotages import Sabotage

HIJACK = hijack_curves.hijack
CONTEXTS = dict.fromkeys(hijack_curves.CONTEXTS, "")


def blind_model(monkeypatch):
    """A model whose query sees neither the hijacking sentences nor what marks its start.

    With rotary positions the query then gives the same scores at every dose.
    """
    blind = attention.knock_out(source="query", target="hijack+bos")

    def broken(model, facts, **options):
        return HIJACK(model, facts, probes=[blind], **options)

    monkeypatch.setattr("analyses.hijack_curves.hijack", broken)


def contexts_that_say_nothing(monkeypatch):
    monkeypatch.setattr("analyses.hijack_curves.CONTEXTS", CONTEXTS)


def targets(*names):
    return lambda monkeypatch: monkeypatch.setattr("analyses.hijack_curves.TARGETS", names)


FEW = {"limit": 6, "doses": (0, 1, 5)}

SABOTAGES = (
    Sabotage(
        analysis="fig1",
        how="contexts that say nothing",
        claims=("in every model some context raises",),
        patch=contexts_that_say_nothing,
    ),
    Sabotage(
        analysis="fig1",
        how="the likelier word as the false target",
        claims=("asked plainly",),
        patch=targets("Rome", "London"),
    ),
    Sabotage(
        analysis="fig1",
        how="the likelier word as the true target",
        claims=("some model then prefers",),
        patch=targets("London", "Rome"),
    ),
    *(
        Sabotage(
            analysis=name,
            how="a model blind to the hijack",
            claims=claims,
            changes={**FEW, **({"relations": ("P190",)} if name == "figb2" else {})},
            scale=scale,
            patch=blind_model,
        )
        for name, scale, claims in (
            ("fig2a", "paper", ("one sentence raises", "five sentences raise")),
            ("figb1", "quick", ("one sentence of the reverse",)),
            ("fig2b", "quick", ("one sentence raises",)),
            ("figb2", "paper", ("one sentence raises", "five sentences raise")),
            ("figb3", "quick", ("one sentence of the reverse",)),
            ("figb4", "paper", ("one near-word sentence", "one sentence of its reverse")),
        )
    ),
)
