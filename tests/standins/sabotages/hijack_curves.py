"""Sabotages of the figures that hijack language models, on a tiny random model."""

from __future__ import annotations

from analyses.paper import answers_over_facts, example_answers, hijack_curves
from probes import attention
from sabotages import Sabotage

HIJACK = hijack_curves.hijack
CONTEXTS = dict.fromkeys(example_answers.CONTEXTS, "")


def blind_model(monkeypatch):
    """Hide the hijacking sentences and the token that marks the start from the query.

    With rotary positions the scores are then the same at every dose.
    """
    blind = attention.knock_out(source="query", target="hijack+bos")

    def broken(model, facts, **options):
        return HIJACK(model, facts, probes=[blind], **options)

    for module in (hijack_curves, answers_over_facts):
        monkeypatch.setattr(module, "hijack", broken)


def empty_contexts(monkeypatch):
    monkeypatch.setattr(example_answers, "CONTEXTS", CONTEXTS)


def targets(*names):
    return lambda monkeypatch: monkeypatch.setattr(example_answers, "TARGETS", names)


FEW = {"limit": 6, "doses": (0, 1, 5)}
SHORT = {"limit": 6, "doses": (0, 1)}
"""Doses that fit the tiny model's context window for the sentences of every relation."""
ONE = {**FEW, "relations": ("P190",)}
RISES = "one sentence raises efficacy"
FALLS = "one sentence of the reverse lowers efficacy"
EACH = tuple(f"{relation}: one sentence" for relation in hijack_curves.RELATIONS)

SABOTAGES = (
    Sabotage(
        analysis="fig1",
        how="empty contexts",
        claims=("in every model some context raises", "the paper's sentence raises"),
        scale="full",
        patch=empty_contexts,
    ),
    Sabotage(
        analysis="fig1",
        how="the likelier word as the false target",
        claims=("without a context",),
        patch=targets("Rome", "London"),
    ),
    Sabotage(
        analysis="fig1",
        how="the likelier word as the true target",
        claims=("after some context some model",),
        patch=targets("London", "Rome"),
    ),
    *(
        Sabotage(
            analysis=name,
            how=f"a model blind to the hijack{how}",
            claims=claims,
            changes=changes,
            scale="full",
            patch=blind_model,
        )
        for name, how, changes, claims in (
            (
                "fig1-facts",
                "",
                {"limit": 6},
                tuple(
                    f"after one sentence the first token of the {of}" for of in ("false", "true")
                ),
            ),
            ("fig2a", "", FEW, (f"{RISES},", f"{RISES} by each", "five sentences raise")),
            (
                "fig2b",
                "",
                FEW,
                (f"P190: {RISES},", f"P190: {RISES} by each", "P190: five sentences"),
            ),
            ("figb1", "", FEW, (f"{FALLS},", f"{FALLS} by each", "five sentences of the")),
            ("figb2", "", ONE, (f"{RISES},", f"{RISES} by each", "five sentences raise")),
            ("figb2", ", relation by relation", SHORT, EACH),
            ("figb3", "", ONE, (f"{FALLS},", f"{FALLS} by each", "five sentences of the")),
            ("figb3", ", relation by relation", SHORT, EACH),
            (
                "figb4",
                "",
                FEW,
                tuple(
                    f"near-word: {start}"
                    for start in (RISES, "five sentences r", FALLS, "five sentences of")
                ),
            ),
        )
    ),
)
