"""The two kinds of models of the bridge: trained one-layer models, and language models with facts.

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
"""All is: the paper has no bridge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides(RecipeSettings):
    """What every bridge is made of: a task with its recipe, and the facts."""

    bits: int
    d_model: int
    length: int
    limit: int | None
    """Facts, a seeded sample; None for all that there are."""
    support: str = "all"
    seed: int = 0
    """Of the sample of facts, and of what an analysis draws itself."""


def one_layer(settings: Sides, bench: Workbench) -> TrainingResult:
    """The trained one-layer models, shared with every analysis of the same task and recipe."""
    task = settings.task(settings.bits, settings.length, support=settings.support)
    return bench.trained(task, settings.recipe(settings.d_model))


def facts_of(settings: Sides, bench: Workbench) -> FactSet:
    """The facts of the workbench, as many as the settings say."""
    return bench.scored.limit(settings.limit, seed=settings.seed)
