"""The two kinds of models of the bridge: trained one-layer models, and language models with facts.

>>> from hijacklens.facts.atlas import atlas
>>> settings = Sides(bits=5, dim=16, length=64, seeds=2, steps=100, limit=3)
>>> len(facts_of(settings, Workbench(facts=atlas())))
3
"""

from __future__ import annotations

from dataclasses import dataclass

from analyses.workbench import Workbench
from hijacklens.concepts.recipe import Recipe
from hijacklens.concepts.task import ConceptTask
from hijacklens.concepts.trained import TrainingResult
from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import FactSet

ONE_LAYER, LANGUAGE = "one-layer", "language"
"""Entries of the column `side` of every table of the bridge."""
OURS = ("bits", "dim", "length", "seeds", "steps", "batch", "evaluation", "limit", "seed")
"""All is: the paper has no bridge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """What every bridge is made of: a task with its recipe, and the facts."""

    bits: int
    dim: int
    length: int
    seeds: int
    steps: int
    limit: int | None
    """Facts, a seeded sample; None for all that there are."""
    support: str = "all"
    learning_rates: tuple[float, ...] = (0.01, 0.001)
    batch: int = 128
    evaluation: int = 4096
    omega: float = 0.5
    beta: float = 1.0
    seed: int = 0
    """Of the sample of facts, and of what an analysis draws itself."""


def one_layer(settings: Sides, bench: Workbench) -> TrainingResult:
    """The trained one-layer models, shared with every analysis of the same task and recipe."""
    task = ConceptTask(
        bits=settings.bits,
        omega=settings.omega,
        beta=settings.beta,
        length=settings.length,
        support=settings.support,
    )
    recipe = Recipe(
        dim=settings.dim,
        seeds=tuple(range(settings.seeds)),
        steps=settings.steps,
        batch=settings.batch,
        learning_rates=settings.learning_rates,
        evaluation=settings.evaluation,
    )
    return bench.trained(task, recipe)


def facts_of(settings: Sides, bench: Workbench) -> FactSet:
    """The facts of the workbench, or of the atlas, as many as the settings say."""
    facts = atlas() if bench.facts is None else bench.facts
    return facts.limit(settings.limit, seed=settings.seed)
