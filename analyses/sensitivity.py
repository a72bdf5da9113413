"""Which conclusions rest on settings that the paper does not state.

Every setting marked as ours is changed alone, down and up, and three conclusions are drawn anew:

    gain     trained minus identity accuracy (figure 3a), above 0
    recall   accuracy with equation 5.1 in place of the trained W_V, over the trained one (C.2)
    slope    a of equation 5.2 fitted to the trained embeddings (C.5), above 0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.check import above, lowest, mean
from analyses.registry import Analysis
from analyses.training_settings import RecipeSettings, identity_value
from analyses.workbench import Workbench
from hijacklens import plots
from hijacklens.concepts import memory
from probes.geometry import inner_products

CHANGES: dict[str, dict[str, Any]] = {
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
}
"""Name -> factor on a setting of the recipe."""
CONCLUSIONS = ("gain", "recall", "slope")


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivitySettings(RecipeSettings):
    """The point from which settings are changed."""

    bits: int
    dim: int
    length: int
    variants: tuple[str, ...] = tuple(CHANGES)
    learning_rates: tuple[float, ...] = (0.01,)
    weight_decay: float = 0.01


def variants(settings: SensitivitySettings, bench: Workbench) -> pd.DataFrame:
    """The three numbers per variant and seed."""
    task = settings.task(settings.bits, settings.length)
    plain = settings.recipe(
        settings.dim,
        d_attn=settings.dim,
        init_scale=settings.dim**-0.5,
        weight_decay=settings.weight_decay,
    )
    rows = []
    for variant in settings.variants:
        recipe = replace(
            plain,
            **{
                name: type(getattr(plain, name))(getattr(plain, name) * factor)
                for name, factor in CHANGES[variant].items()
            },
        )
        result = bench.trained(task, recipe)
        frozen = replace(recipe, **identity_value(True))
        identity = bench.trained(task, frozen).summary()["accuracy"].to_numpy()
        trained = result.summary()["accuracy"].to_numpy()
        built = result.accuracy(lambda model: memory.constructed(model.W_E, task))["accuracy"]
        models = {
            f"seed {seed}": model for seed, model in zip(recipe.seeds, result.models, strict=True)
        }
        slopes = inner_products(models, task).fits["a"].to_numpy()
        for seed in range(settings.seeds):
            rows.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "trained": trained[seed],
                    "gain": trained[seed] - identity[seed],
                    "recall": built.to_numpy()[seed] / trained[seed],
                    "slope": slopes[seed],
                }
            )
    return pd.DataFrame(rows)


def draw_variants(table: pd.DataFrame, settings: SensitivitySettings) -> Figure:
    """A panel per conclusion: mean and standard error over seeds, a row per variant."""
    labels = {
        "gain": "trained minus identity,\naccuracy",
        "recall": "eq. 5.1 over trained,\naccuracy",
        "slope": "slope a of eq. 5.2",
    }
    names = list(settings.variants)
    with plots.canvas(1, 3, width=2.7, height=3.2, share_y=True) as (figure, axes):
        for i, (panel, column) in enumerate(zip(axes, CONCLUSIONS, strict=True)):
            by: Any = table.groupby("variant")[column]
            colour, marker = plots.series(i)
            panel.errorbar(
                by.mean().loc[names],
                range(len(names)),
                xerr=by.sem().loc[names],
                color=colour,
                marker=marker,
                linestyle="none",
                capsize=2,
            )
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_xlabel(labels[column])
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        return figure


def _least(table: Any, column: str) -> Any:
    return lowest([mean(own[column]) for _, own in table.groupby("variant")])


ANALYSES = (
    Analysis(
        id="sensitivity",
        settings={
            "quick": SensitivitySettings(
                bits=5,
                dim=32,
                length=64,
                seeds=3,
                steps=1000,
                variants=("as we run it", "batch / 4", "start x 3", "d_a = d / 4"),
            ),
            "paper": SensitivitySettings(bits=6, dim=64, length=64, seeds=5, steps=4000),
        },
        ours=("bits", "dim", "length", "seeds", "steps", "variants"),
        run=variants,
        draw=draw_variants,
        checks=(
            above(
                "a trained W_V beats the identity under every variant",
                lambda t: _least(t, "gain"),
                0.0,
            ),
            above(
                "equation 5.1 keeps .7 of the trained accuracy under every variant",
                lambda t: _least(t, "recall"),
                0.7,
            ),
            above(
                "inner products fall with the Hamming distance under every variant",
                lambda t: _least(t, "slope"),
                0.0,
            ),
        ),
    ),
)
