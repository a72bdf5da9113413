"""The two sides of the bridge: trained one-layer models, and language models with facts.

>>> settings = Sides(bits=5, d_model=16, length=64, seeds=2, steps=100, limit=3)
>>> len(facts_of(settings, Workbench()))
3
"""

from __future__ import annotations

from dataclasses import dataclass

from analyses.reproduction.settings import RECIPE_OURS, RecipeSettings
from analyses.reproduction.workbench import Workbench
from hijacklens.facts.fact import FactSet
from hijacklens.one_layer.trained import TrainingResult

ONE_LAYER, LANGUAGE = "one-layer", "language"
"""Entries of the column `side` of every table of the bridge."""
OURS = (*RECIPE_OURS, "bits", "d_model", "length", "learning_rates", "support", "limit", "seed")
"""Every setting is ours; the paper has no such analysis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides(RecipeSettings):
    """The settings of every bridge: a task with its recipe, and the facts."""

    bits: int
    d_model: int
    length: int = 256
    limit: int | None = None
    """Number of facts, a seeded sample; None for all facts."""
    support: str = "all"
    seed: int = 0
    """Seed of the sample of facts and of the other draws of an analysis."""


def one_layer(settings: Sides, bench: Workbench) -> TrainingResult:
    """Return the one-layer models, which analyses with the same task and recipe share."""
    task = settings.task(settings.bits, settings.length, support=settings.support)
    return bench.trained(task, settings.recipe(settings.d_model))


def facts_of(settings: Sides, bench: Workbench) -> FactSet:
    """Return the facts of the workbench, at most as many as the settings allow."""
    return bench.scored.limit(settings.limit, seed=settings.seed)
