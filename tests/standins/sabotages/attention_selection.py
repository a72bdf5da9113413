"""Sabotages of `analyses.paper.attention_selection`."""

from __future__ import annotations

from sabotages import Sabotage

SABOTAGES = tuple(
    Sabotage(
        analysis=name,
        how="untrained models",
        claims=("attention inside the cluster exceeds", "in trained models more attention"),
        changes={
            "bits": (4,),
            "d_model": 8,
            "length": 16,
            "seeds": 3,
            "steps": 1,
            "contexts": 64,
            "evaluation": 64,
        },
    )
    for name in ("fig3c", "figc7", "figc8")
)
