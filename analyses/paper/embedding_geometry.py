"""Figures 3b, C.5, C.6 and C.9 to C.12: the geometry that training gives the embeddings.

3b, C.5        mean inner product by Hamming distance, with the fit of equation 5.2
C.6            the same with W_V = I, where Theorem 3 says the law is linear
C.9 to C.12    singular values of W_E, with the gap that equation 5.2 predicts

Figure C.4, of this family too, is in `analyses.paper.embedding_widths`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.paper.embedding_widths import FIGURE_C4
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import Check, above, exact, lowest, mean, near
from analyses.reproduction.drawing import OVER_SEEDS
from analyses.reproduction.settings import RECIPE_OURS, TrainingSettings, identity_value
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.one_layer.trained import TrainingResult
from probes import geometry
from probes.geometry.spectra import spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometrySettings(TrainingSettings):
    """Figures 3b, C.5, C.6 and the spectra: one width per m."""

    d_models: tuple[int, ...]
    """Width d for each of `bits`; below V in all of these figures."""
    length: int
    identity: bool = False
    """Whether W_V is frozen at the identity."""


def inner_by_distance(settings: GeometrySettings, bench: Workbench) -> pd.DataFrame:
    """Mean inner product per m, seed and Hamming distance, with the seed's fit of equation 5.2."""
    rows = []
    for result, place in _results(settings, bench):
        models = {f"seed {seed}": model for seed, model in enumerate(result.best())}
        found = geometry.fit(models, result.task)
        fits = found.fits.set_index("model")
        for row in found.to_dataframe().to_dict("records"):
            fit = fits.loc[row["model"]]
            rows.append(
                {
                    **place,
                    "seed": int(str(row["model"]).removeprefix("seed ")),
                    "distance": row["distance"],
                    "inner": row["mean"],
                    "spread": row["std"],
                    **{name: fit[name] for name in ("a", "b", "b0", "jump", "r2", "r2_means")},
                }
            )
    return pd.DataFrame(rows)


def spectra(settings: GeometrySettings, bench: Workbench) -> pd.DataFrame:
    """Singular values of W_E per seed, with the prediction of the fit and the gap.

    By section 7.3 the Gram matrix of equation 5.2 has m equal eigenvalues above its bulk; that of
    the constant function depends on b and may be anything.
    """
    rows = []
    for result, place in _results(settings, bench):
        models = {f"seed {seed}": model for seed, model in enumerate(result.best())}
        found = spectrum(models, task=result.task)
        gaps = found.summary()
        gap = gaps[gaps["top"] == result.task.bits].set_index("model")
        for row in found.to_dataframe().to_dict("records"):
            own = gap.loc[row["model"]]
            rows.append(
                {
                    **place,
                    "seed": int(str(row["model"]).removeprefix("seed ")),
                    "index": row["index"],
                    "value": row["value"],
                    "predicted": row["predicted"],
                    "squeezed": row["squeezed"],
                    **{
                        str(name): own[name]
                        for name in ("ratio", "top_share", "bit_share", "predicted_ratio_squeezed")
                    },
                }
            )
    return pd.DataFrame(rows)


def _results(
    settings: GeometrySettings, bench: Workbench
) -> Iterator[tuple[TrainingResult, dict[str, Any]]]:
    """Trained models and the columns that say which; `lr` is the better learning rate."""
    for bits, d_model in zip(settings.bits, settings.d_models, strict=True):
        task = settings.task(bits, settings.length)
        recipe = settings.recipe(d_model, **identity_value(settings.identity))
        result = bench.trained(task, recipe)
        yield result, {"bits": bits, "dim": d_model, "lr": result.best_learning_rate}


def draw_inner(table: pd.DataFrame, settings: GeometrySettings) -> Figure:
    """Mean inner product over Hamming distance, the spread over pairs, and the mean fit dashed.

    The fit is the least-squares line over all pairs of distinct tokens, so that the many pairs at
    middle distances weigh more than the few that are far apart.
    """
    with plots.panels(len(settings.bits)) as (figure, axes):
        for panel, bits, d_model in zip(axes, settings.bits, settings.d_models, strict=True):
            rows = table[table["bits"] == bits]
            by: Any = rows.groupby("distance")["inner"]
            colour, marker = plots.series(0)
            panel.errorbar(
                by.mean().index,
                by.mean(),
                yerr=by.sem(),
                color=colour,
                marker=marker,
                capsize=2,
                linestyle="none",
                label="mean over pairs and seeds",
            )
            spread: Any = rows.groupby("distance")["spread"].mean()
            panel.fill_between(
                spread.index,
                by.mean() - spread,
                by.mean() + spread,
                color=colour,
                alpha=0.2,
                linewidth=0,
                label="± standard deviation over pairs",
            )
            a, b, b0 = (rows[name].mean() for name in ("a", "b", "b0"))
            ends = [1, bits]
            panel.plot(
                ends,
                [b - a * end for end in ends],
                "--",
                color="black",
                linewidth=1,
                label="equation 5.2: b $-$ aD, fitted to D ≥ 1",
            )
            panel.set_title(
                f"m = {bits}, d = {d_model}\na = {a:.3g}, b = {b:.3g}, $b_0$ = {b0:.3g}", fontsize=9
            )
            panel.set_xticks(range(bits + 1))
        where = ", $W_V$ = I" if settings.identity else ""
        plots.label_outer(axes, x="Hamming distance D", y=f"inner product{where}")
        plots.legend_below(figure, axes, bars=OVER_SEEDS.format(settings.seeds), columns=2)
        return figure


PREDICTIONS = (
    ("squeezed", "--", "black", "equation 5.2, its bulk shared among d"),
    ("predicted", ":", "#666666", "equation 5.2, all V values"),
)


def draw_spectra(table: pd.DataFrame, settings: GeometrySettings) -> Figure:
    """Singular values by index, a panel per seed; dashed what the fit of equation 5.2 predicts.

    Each mode of the prediction has its own height: the m of the bits, the bulk, and the constant.
    Dotted: the equation has V values, of which a model of width d can have only d; dashed, the
    bulk's squares are shared among those that it has.
    """
    seeds = sorted(table["seed"].unique())
    (bits,) = settings.bits
    with plots.panels(len(seeds), height=2.2, share_y=True) as (figure, axes):
        for panel, seed in zip(axes, seeds, strict=True):
            rows: Any = table[table["seed"] == seed]
            colour, _ = plots.series(0)
            panel.plot(rows["index"], rows["value"], ".", color=colour, label="trained $W_E$")
            for column, style, shade, label in PREDICTIONS:
                panel.plot(
                    rows["index"],
                    rows[column],
                    style,
                    color=shade,
                    linewidth=1,
                    drawstyle="steps-mid",
                    label=label,
                )
            panel.axvline(bits + 0.5, color="#999999", linewidth=0.8, label="after index m")
            panel.set_title(f"m = {bits}, d = {settings.d_models[0]}, seed {seed}", fontsize=9)
            panel.set_ylim(0, None)
        plots.label_outer(axes, x="index", y="singular value")
        plots.legend_below(figure, axes, columns=2)
        return figure


def _by_seed(table: Any, column: str) -> list[Any]:
    """A column that is one number per seed, as one interval per m."""
    values = table.groupby(["bits", "seed"])[column].first()
    return [mean(own) for _, own in values.groupby("bits")]


FALLS = above(
    "the inner product falls with the Hamming distance for every m (slope a of eq. 5.2)",
    lambda t: lowest(_by_seed(t, "a")),
    0.0,
)
JUMPS = above(
    "the diagonal stands above the line for every m (b0 - b)",
    lambda t: lowest(_by_seed(t, "jump")),
    0.0,
)


def _linear(least: float) -> Check:
    return above(
        "the mean inner products are linear in D >= 1 for every m (R squared of the means, each "
        "distance weighed by its pairs)",
        lambda t: lowest(_by_seed(t, "r2_means")),
        least,
    )


def _inner(name: str, *, bits: Any, d_models: Any, quick: Any, identity: bool = False) -> Analysis:
    shared: dict[str, Any] = {"length": 256, "identity": identity}
    return Analysis(
        id=name,
        settings={
            "quick": GeometrySettings(
                **quick, **shared, seeds=3, steps=2000, learning_rates=(0.01,)
            ),
            "paper": GeometrySettings(bits=bits, d_models=d_models, **shared, seeds=5, steps=4000),
        },
        ours=(*RECIPE_OURS, "d_models", "length"),
        run=inner_by_distance,
        draw=draw_inner,
        checks=(FALLS, _linear(0.95)) if identity else (FALLS, JUMPS, _linear(0.8)),
    )


def _spectrum(name: str, bits: int, d_model: int) -> Analysis:
    shared: dict[str, Any] = {"bits": (bits,), "d_models": (d_model,), "length": 256}
    return Analysis(
        id=name,
        settings={
            "quick": GeometrySettings(**shared, seeds=2, steps=2500, learning_rates=(0.01,)),
            "paper": GeometrySettings(**shared, seeds=4, steps=4000),
        },
        ours=(*(name for name in RECIPE_OURS if name != "seeds"), "length"),
        run=spectra,
        draw=draw_spectra,
        checks=(
            above(
                "singular value m is above 1.2 times the next one, in every run",
                lambda t: _least(t, "ratio"),
                1.2,
            ),
            above(
                "the m largest directions are those of the bits, in every run (share)",
                lambda t: _least(t, "bit_share"),
                0.9,
            ),
            near(
                "the m largest hold the share of the squares that equation 5.2 predicts "
                "(measured - predicted)",
                _energy,
                0.0,
                0.03,
            ),
            near(
                "the gap is as wide as equation 5.2 predicts with an even bulk (ratio s_m / "
                "s_(m+1), measured over predicted)",
                _gap_to_prediction,
                1.0,
                0.25,
                scales=("paper",),
                remark="measured at the end of a full training only",
            ),
        ),
    )


def _least(table: Any, column: str) -> Any:
    return exact(table.groupby("seed")[column].first().min())


def _energy(table: Any) -> Any:
    """The share of the m largest values in the sum of squares, less that predicted, over runs."""
    found = []
    for _, own in table.groupby("seed"):
        top = own["index"] <= own["bits"]
        measured, predicted = (
            (own[name][top] ** 2).sum() / (own[name] ** 2).sum() for name in ("value", "squeezed")
        )
        found.append(measured - predicted)
    return mean(found)


def _gap_to_prediction(table: Any) -> Any:
    """The ratio of singular values m and m + 1 over the one that equation 5.2 predicts."""
    gaps = table.groupby("seed")[["ratio", "predicted_ratio_squeezed"]].first()
    return mean(gaps["ratio"] / gaps["predicted_ratio_squeezed"])


ANALYSES = (
    _inner(
        "fig3b",
        bits=(8,),
        d_models=(128,),
        quick={"bits": (6,), "d_models": (32,)},
    ),
    FIGURE_C4,
    _inner(
        "figc5",
        bits=(7, 8),
        d_models=(64, 128),
        quick={"bits": (6, 7), "d_models": (32, 64)},
    ),
    _inner(
        "figc6",
        bits=(5, 6, 7, 8),
        d_models=(16, 32, 64, 128),
        quick={"bits": (5, 6), "d_models": (16, 32)},
        identity=True,
    ),
    _spectrum("figc9", 7, 32),
    _spectrum("figc10", 7, 64),
    _spectrum("figc11", 8, 32),
    _spectrum("figc12", 8, 64),
)
