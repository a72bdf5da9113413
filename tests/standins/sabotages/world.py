"""Sabotages of `analyses.bridge.world`, on worlds that train in seconds."""

from __future__ import annotations

from analyses.bridge import world
from hijacklens.scoring.efficacy import margin
from hijacklens.world.world import World
from sabotages import Sabotage

SMALL = {
    "sharings": (0.0, 1.0),
    "bits": 3,
    "subjects": 16,
    "name_words": 1,
    "relations": 1,
    "steps": 200,
    "seeds": 2,
}


def the_other_sign(monkeypatch):
    monkeypatch.setattr(world, "margin", lambda table, rule: -margin(table, rule))


def always_shared(monkeypatch):
    monkeypatch.setattr(world, "World", lambda **knobs: World(**knobs | {"sharing": 1.0}))


SABOTAGES = (
    Sabotage(
        analysis="world-switch",
        how="margins with the other sign",
        claims=(
            "sharing 1: 3 sentences of talk",
            "sharing 1: 3 sentences of do-not-think",
            "sharing 1: efficacy is higher after 3 sentences of talk",
            "sharing 1: efficacy is higher after 3 sentences of do-not-think",
            "sharing 1: queries whose context",
        ),
        changes={**SMALL, "sharings": (1.0,)},
        patch=the_other_sign,
        scale="full",
    ),
    Sabotage(
        analysis="world-switch",
        how="untrained models",
        claims=("sharing 1: recall",),
        changes={**SMALL, "sharings": (1.0,), "steps": 1},
        scale="full",
    ),
    Sabotage(
        analysis="world-switch",
        how="facts and talk always share documents",
        claims=("sharing 0: the shift", "the shift of talk grows"),
        changes={**SMALL, "steps": 100},
        patch=always_shared,
        scale="full",
    ),
)
