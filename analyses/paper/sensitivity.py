"""Sensitivity: which conclusions depend on settings that the paper does not state.

One setting of ours is changed at a time, and four conclusions are tested again:

    gain     trained minus identity accuracy (figure 3a), above 0
    recall   accuracy with equation 5.1 in place of the trained W_V, over the trained one (C.2)
    slope    a of equation 5.2 fitted to the trained embeddings (C.5), above 0
    inside   fraction of attention inside the cluster minus the fraction of tokens there, for
             clusters by the first bit (3c), above 0

We change batch, steps, learning rate, weight decay, start and d_a of the recipe, and L, d, omega
and beta of the task and model. We do not change the settings of measurements (evaluation,
contexts), the number of seeds, or `mix_last` of figure C.13. At omega = 1 there would be no noise,
and no cluster to select.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.paper.attention_selection import attention_inside
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, every, lowest
from analyses.reproduction.drawing import BOUND, OVER_SEEDS
from analyses.reproduction.settings import RecipeSettings, identity_value, names_of, scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.errors import choice, whole_number
from hijacklens.one_layer import memory
from hijacklens.one_layer.recipe import Recipe
from probes import geometry

CHANGES: dict[str, dict[str, float]] = {
    "as we run it": {},
    "batch / 4": {"batch": 0.25},
    "batch x 4": {"batch": 4},
    "steps / 2": {"steps": 0.5},
    "steps x 2": {"steps": 2},
    "no weight decay": {"weight_decay": 0},
    "weight decay x 10": {"weight_decay": 10},
    "start / 3": {"init_scale": 1 / 3},
    "start x 3": {"init_scale": 3},
    "d_a = d / 4": {"d_attn": 0.25},
    "learning rate / 10": {"learning_rate": 0.1},
    "L x 2": {"length": 2},
    "d / 2": {"d_model": 0.5},
    "d x 2": {"d_model": 2},
    "omega / 2": {"omega": 0.5},
    "omega x 1.5": {"omega": 1.5},
    "beta / 2": {"beta": 0.5},
    "beta x 2": {"beta": 2},
}
"""Name of a variant -> factors on settings."""


CONCLUSIONS = {
    "gain": ("trained minus\nidentity, accuracy", "a trained W_V beats the identity", 0.0),
    "recall": (
        "eq. 5.1 over\ntrained, accuracy",
        "equation 5.1 keeps .7 of the trained accuracy",
        0.7,
    ),
    "slope": ("slope a of eq. 5.2", "inner products fall with the Hamming distance", 0.0),
    "inside": ("attention inside\nbeyond uniform", "attention selects the cluster", 0.0),
}
"""Column -> label of its axis, claim of every variant, and the value that it must exceed."""
SIZES = ("batch", "steps", "length", "d_model", "omega", "beta")
"""Settings that are multiplied before the recipe is derived from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivitySettings(RecipeSettings):
    """The reference point, from which one setting at a time is changed."""

    bits: int
    d_model: int
    length: int = 64
    variants: tuple[str, ...] = tuple(CHANGES)
    learning_rates: tuple[float, ...] = (0.01,)
    weight_decay: float = 0.01
    contexts: int = 512
    """Contexts on which attention is measured."""

    def __post_init__(self) -> None:
        for name in self.variants:
            choice("variant", name, CHANGES)

    def changed(self, factors: Mapping[str, float]) -> tuple[SensitivitySettings, Recipe]:
        """Return the settings and the recipe with some of them multiplied by a factor."""
        sizes = {name: getattr(self, name) for name in SIZES}
        settings = replace(self, **_times(sizes, factors))
        whole_number("d_model", settings.d_model, least=1)
        options = {
            "d_attn": settings.d_model,
            "init_scale": settings.d_model**-0.5,
            "weight_decay": settings.weight_decay,
        }
        recipe = settings.recipe(settings.d_model, **_times(options, factors))
        rate = factors.get("learning_rate", 1.0)
        rates = tuple(rate * lr for lr in settings.learning_rates)
        return settings, replace(recipe, learning_rates=rates)


def _times(values: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    return {name: type(old)(old * factors.get(name, 1)) for name, old in values.items()}


def variants(settings: SensitivitySettings, bench: Workbench) -> pd.DataFrame:
    """Return the numbers of the four conclusions per variant and seed."""
    parts = []
    for variant in settings.variants:
        changed, recipe = settings.changed(CHANGES[variant])
        task = changed.task(changed.bits, changed.length)
        result = bench.trained(task, recipe)
        identity = bench.trained(task, replace(recipe, **identity_value(True)))
        trained = result.summary()["accuracy"].to_numpy()
        constructed = result.accuracy(lambda model, task=task: memory.constructed(model.W_E, task))
        models = {
            f"seed {seed}": model for seed, model in zip(recipe.seeds, result.models, strict=True)
        }
        clusters = changed.task(changed.bits, changed.length, support="first-bit")
        attention = [
            attention_inside(model, clusters, settings.contexts)
            for model in bench.trained(clusters, recipe).models
        ]
        part = {
            "variant": variant,
            "seed": range(settings.seeds),
            "trained": trained,
            "gain": trained - identity.summary()["accuracy"].to_numpy(),
            "recall": constructed["accuracy"].to_numpy() / trained,
            "slope": geometry.fit(models, task).fits["a"].to_numpy(),
            "inside": [inside - uniform for inside, uniform in attention],
        }
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def draw_variants(table: pd.DataFrame, settings: SensitivitySettings) -> Figure:
    """Draw a panel per conclusion: mean and standard error over seeds, a row per variant.

    The dotted line is the threshold of the conclusion.
    """
    names = list(settings.variants)
    width, height = plots.PAGE / len(CONCLUSIONS), 1.2 + 0.2 * len(names)
    options = {"width": width, "height": height, "share_y": True}
    with plots.canvas(1, len(CONCLUSIONS), **options) as (figure, axes):
        colour, marker = plots.series(0)
        for panel, (column, (label, _, least)) in zip(axes, CONCLUSIONS.items(), strict=True):
            by: Any = table.groupby("variant")[column]
            style = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 2}
            means, errors = by.mean().loc[names], by.sem().loc[names]
            panel.errorbar(means, range(len(names)), xerr=errors, **style)
            panel.axvline(least, color="black", **BOUND)
            panel.set_xlabel(label, fontsize=8)
            panel.tick_params(axis="x", labelsize=8)
        axes[0].set_yticks(range(len(names)), names, fontsize=8)
        axes[0].invert_yaxis()
        figure.suptitle(
            f"changed from m = {settings.bits}, d = {settings.d_model}, L = {settings.length}; "
            "bars: " + OVER_SEEDS.format(settings.seeds),
            fontsize=9,
        )
        return figure


ANALYSES = (
    Analysis(
        id="sensitivity",
        settings=scales(
            SensitivitySettings(bits=6, d_model=64),
            bits=5,
            d_model=32,
            seeds=3,
            steps=1000,
            variants=("as we run it", "batch / 4", "start x 3", "L x 2"),
        ),
        ours=names_of(SensitivitySettings),
        run=variants,
        draw=draw_variants,
        checks=tuple(
            above(
                f"{claim} under every variant",
                lambda t, column=column: lowest(every(t[column], t.variant)),
                least,
            )
            for column, (_, claim, least) in CONCLUSIONS.items()
        ),
    ),
)
