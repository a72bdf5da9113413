"""Which conclusions rest on settings that the paper does not state.

A setting of ours is changed alone, and four conclusions are drawn anew:

    gain     trained minus identity accuracy (figure 3a), above 0
    recall   accuracy with equation 5.1 in place of the trained W_V, over the trained one (C.2)
    slope    a of equation 5.2 fitted to the trained embeddings (C.5), above 0
    inside   attention inside the cluster less the share of tokens there, clusters by the first bit
             (3c), above 0

Of the recipe: batch, steps, learning rate, weight decay, start, d_a. Of the task and the model:
L, d, omega, beta. Not changed are what only measures (evaluation, contexts), the number of seeds,
and `mix_last` of figure C.13. At omega = 1 there would be no noise, and no cluster to select.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from analyses.paper.attention_selection import share_inside
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, lowest, mean
from analyses.reproduction.drawing import BOUND, OVER_SEEDS
from analyses.reproduction.settings import RECIPE_OURS, RecipeSettings, identity_value
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.one_layer import memory
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.recipe import Recipe
from hijacklens.one_layer.task import ConceptTask
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
"""Name -> factor on a setting."""
CONCLUSIONS = ("gain", "recall", "slope", "inside")
THRESHOLDS = {"gain": 0.0, "recall": 0.7, "slope": 0.0, "inside": 0.0}
"""What each is held against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivitySettings(RecipeSettings):
    """The point from which settings are changed."""

    bits: int
    d_model: int
    length: int
    variants: tuple[str, ...] = tuple(CHANGES)
    learning_rates: tuple[float, ...] = (0.01,)
    weight_decay: float = 0.01
    contexts: int = 512
    """On which the attention is measured."""

    def changed(self, factors: Mapping[str, float]) -> tuple[SensitivitySettings, Recipe]:
        """The settings and the recipe with some of them multiplied by a factor."""
        sizes = {name: getattr(self, name) for name in SIZES}
        own = replace(self, **_times(sizes, factors))
        recipe = own.recipe(
            own.d_model,
            **_times(
                {
                    "d_attn": own.d_model,
                    "init_scale": own.d_model**-0.5,
                    "weight_decay": own.weight_decay,
                },
                factors,
            ),
        )
        rate = factors.get("learning_rate", 1.0)
        return own, replace(recipe, learning_rates=tuple(rate * lr for lr in own.learning_rates))


SIZES = ("batch", "steps", "length", "d_model", "omega", "beta")
"""Settings that a factor acts on before the recipe is made of them."""


def _times(values: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    return {name: type(old)(old * factors.get(name, 1)) for name, old in values.items()}


def variants(settings: SensitivitySettings, bench: Workbench) -> pd.DataFrame:
    """The four numbers per variant and seed."""
    rows = []
    for variant in settings.variants:
        own, recipe = settings.changed(CHANGES[variant])
        task = own.task(own.bits, own.length)
        result = bench.trained(task, recipe)
        frozen = replace(recipe, **identity_value(True))
        identity = bench.trained(task, frozen).summary()["accuracy"].to_numpy()
        trained = result.summary()["accuracy"].to_numpy()
        built = result.accuracy(_constructed_for(task))["accuracy"]
        models = {
            f"seed {seed}": model for seed, model in zip(recipe.seeds, result.models, strict=True)
        }
        slopes = geometry.fit(models, task).fits["a"].to_numpy()
        clusters = own.task(own.bits, own.length, support="first-bit")
        shares = [
            share_inside(model, clusters, settings.contexts)
            for model in bench.trained(clusters, recipe).models
        ]
        for seed in range(settings.seeds):
            rows.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "trained": trained[seed],
                    "gain": trained[seed] - identity[seed],
                    "recall": built.to_numpy()[seed] / trained[seed],
                    "slope": slopes[seed],
                    "inside": shares[seed][0] - shares[seed][1],
                }
            )
    return pd.DataFrame(rows)


def _constructed_for(task: ConceptTask) -> Callable[[OneLayerTransformer], Tensor]:
    return lambda model: memory.constructed(model.W_E, task)


def draw_variants(table: pd.DataFrame, settings: SensitivitySettings) -> Figure:
    """A panel per conclusion: mean and standard error over seeds, a row per variant.

    Dotted: what each conclusion is held against.
    """
    labels = {
        "gain": "trained minus\nidentity, accuracy",
        "recall": "eq. 5.1 over\ntrained, accuracy",
        "slope": "slope a of eq. 5.2",
        "inside": "attention inside\nbeyond uniform",
    }
    names = list(settings.variants)
    width, height = plots.PAGE / len(CONCLUSIONS), 1.2 + 0.2 * len(names)
    with plots.canvas(1, len(CONCLUSIONS), width=width, height=height, share_y=True) as (
        figure,
        axes,
    ):
        colour, marker = plots.series(0)
        for panel, column in zip(axes, CONCLUSIONS, strict=True):
            by: Any = table.groupby("variant")[column]
            panel.errorbar(
                by.mean().loc[names],
                range(len(names)),
                xerr=by.sem().loc[names],
                color=colour,
                marker=marker,
                linestyle="none",
                capsize=2,
            )
            panel.axvline(THRESHOLDS[column], color="black", **BOUND)
            panel.set_xlabel(labels[column], fontsize=8)
            panel.tick_params(axis="x", labelsize=8)
        axes[0].set_yticks(range(len(names)), names, fontsize=8)
        axes[0].invert_yaxis()
        figure.suptitle(
            f"changed from m = {settings.bits}, d = {settings.d_model}, L = {settings.length}; "
            "bars: " + OVER_SEEDS.format(settings.seeds),
            fontsize=9,
        )
        return figure


def _least(table: Any, column: str) -> Any:
    return lowest([mean(own[column]) for _, own in table.groupby("variant")])


ANALYSES = (
    Analysis(
        id="sensitivity",
        settings={
            "quick": SensitivitySettings(
                bits=5,
                d_model=32,
                length=64,
                seeds=3,
                steps=1000,
                variants=("as we run it", "batch / 4", "start x 3", "L x 2"),
            ),
            "paper": SensitivitySettings(bits=6, d_model=64, length=64, seeds=5, steps=4000),
        },
        ours=(
            *RECIPE_OURS,
            "bits",
            "d_model",
            "length",
            "learning_rates",
            "weight_decay",
            "contexts",
            "variants",
        ),
        run=variants,
        draw=draw_variants,
        checks=(
            above(
                "a trained W_V beats the identity under every variant",
                lambda t: _least(t, "gain"),
                THRESHOLDS["gain"],
            ),
            above(
                "equation 5.1 keeps .7 of the trained accuracy under every variant",
                lambda t: _least(t, "recall"),
                THRESHOLDS["recall"],
            ),
            above(
                "inner products fall with the Hamming distance under every variant",
                lambda t: _least(t, "slope"),
                THRESHOLDS["slope"],
            ),
            above(
                "attention selects the cluster under every variant (inside - uniform)",
                lambda t: _least(t, "inside"),
                THRESHOLDS["inside"],
            ),
        ),
    ),
)
