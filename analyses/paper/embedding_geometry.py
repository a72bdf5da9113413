"""Figures 3b, C.4 to C.6 and C.9 to C.12: the geometry that training gives the embeddings.

3b, C.5        mean inner product by Hamming distance, with the fit of equation 5.2
C.4            accuracy of trained and of frozen embeddings as d crosses V
C.6            as C.5 with W_V = I, where Theorem 3 says that inner products are linear
C.9 to C.12    singular values of W_E, with the gap that equation 5.2 predicts
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import Check, above, every, exact, lowest, mean, near, paired
from analyses.reproduction.drawing import draw_means, draw_over_widths, draw_panels, over_seeds
from analyses.reproduction.settings import (
    RECIPE_OURS,
    WidthSettings,
    best_rows,
    identity_value,
    scales,
    trained_by_size,
)
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.one_layer.trained import TrainingResult
from probes import geometry
from probes.geometry.spectra import spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometrySettings(WidthSettings):
    """Figures 3b, C.5, C.6 and the spectra: one width per m, below V in all of these figures."""

    identity: bool = False
    """Whether W_V is frozen at the identity."""

    def __post_init__(self) -> None:
        if len(self.bits) != len(self.d_models):
            raise InputError(
                f"bits are {self.bits} and d_models {self.d_models}; give one width for each m."
            )


def trained_against_frozen(settings: WidthSettings, bench: Workbench) -> pd.DataFrame:
    """Return the accuracy per m, d, condition and seed at the condition's better learning rate."""
    frozen = {"trained": (), "frozen": ("W_E",)}
    rows = [
        {"bits": bits, "dim": d_model, "condition": condition, **row}
        for bits in settings.bits
        for d_model in settings.d_models
        for condition, freeze in frozen.items()
        for row in best_rows(
            bench.trained(
                settings.task(bits, settings.length), settings.recipe(d_model, freeze=freeze)
            )
        )
    ]
    return pd.DataFrame(rows)


draw_widths = partial(
    draw_over_widths,
    column="condition",
    names={"trained": "trained $W_E$", "frozen": "$W_E$ frozen at its start"},
    value="accuracy",
    label="accuracy",
)


def inner_by_distance(settings: GeometrySettings, bench: Workbench) -> pd.DataFrame:
    """Return the mean inner product per m, seed and Hamming distance, with the seed's fit."""
    fitted = ["a", "b", "b0", "jump", "r2", "r2_means"]
    parts = []
    for result, columns in _results(settings, bench):
        line = geometry.fit(_by_name(result), result.task)
        rows = line.to_dataframe().merge(line.fits.filter(["model", *fitted]), on="model")
        rows = rows.rename(columns={"mean": "inner", "std": "spread"})
        parts.append(_per_seed(rows, columns, ["distance", "inner", "spread", *fitted]))
    return pd.concat(parts, ignore_index=True)


def spectra(settings: GeometrySettings, bench: Workbench) -> pd.DataFrame:
    """Return the singular values of W_E per seed, with the prediction of the fit and the gap.

    By section 7.3 of the reference page the Gram matrix of equation 5.2 has m equal eigenvalues
    above its bulk; the eigenvalue of the constant function depends on b and is unrestricted.

    Raises:
        InputError: The settings have several m.
    """
    if len(settings.bits) > 1:
        raise InputError(f"bits are {settings.bits}; a figure of spectra has one m.")
    gap = ["ratio", "top_share", "bit_share", "predicted_ratio_squeezed"]
    parts = []
    for result, columns in _results(settings, bench):
        singular = spectrum(_by_name(result), task=result.task)
        gaps = singular.summary()
        after_bits: Any = gaps[gaps["top"] == result.task.bits][["model", *gap]]
        rows = singular.to_dataframe().merge(after_bits, on="model")
        parts.append(_per_seed(rows, columns, ["index", "value", "predicted", "squeezed", *gap]))
    return pd.concat(parts, ignore_index=True)


def _results(settings: GeometrySettings, bench: Workbench) -> Any:
    sizes = zip(settings.bits, settings.d_models, strict=True)
    return trained_by_size(settings, bench, sizes, **identity_value(settings.identity))


def _by_name(result: TrainingResult) -> dict[str, Any]:
    return {f"seed {seed}": model for seed, model in enumerate(result.best())}


def _per_seed(rows: pd.DataFrame, columns: dict[str, Any], values: list[str]) -> Any:
    """Return the columns that identify a run, its seed, and the values."""
    seeds: Any = rows["model"].str.removeprefix("seed ").astype(int)
    return rows.assign(**columns, seed=seeds)[[*columns, "seed", *values]]


def draw_inner(table: pd.DataFrame, settings: GeometrySettings) -> Figure:
    """Draw the mean inner product over Hamming distance, the spread over pairs, and the fit.

    The dashed fit is the least-squares line over all pairs of distinct tokens, so the many pairs at
    middle distances weigh more than the few at large distances.
    """
    widths = dict(zip(settings.bits, settings.d_models, strict=True))

    def draw(panel: Axes, rows: Any, bits: int) -> None:
        by = rows.groupby("distance")
        means, spread = by["inner"].mean(), by["spread"].mean()
        label = "mean over pairs and seeds"
        draw_means(panel, by["inner"], 0, linestyle="none", label=label)
        panel.fill_between(
            spread.index,
            means - spread,
            means + spread,
            color=plots.series(0)[0],
            alpha=0.2,
            linewidth=0,
            label="± standard deviation over pairs",
        )
        a, b, b0 = (rows[name].mean() for name in ("a", "b", "b0"))
        label = "equation 5.2: b $-$ aD, fitted to D ≥ 1"
        panel.plot([1, bits], [b - a, b - a * bits], "--", color="black", lw=1, label=label)
        panel.set_title(
            f"m = {bits}, d = {widths[bits]}\na = {a:.3g}, b = {b:.3g}, $b_0$ = {b0:.3g}",
            fontsize=9,
        )
        panel.set_xticks(range(bits + 1))

    label = f"inner product{', $W_V$ = I' if settings.identity else ''}"
    legend = over_seeds(settings, columns=2)
    return draw_panels(table, draw, x="Hamming distance D", y=label, legend=legend, share_y=False)


PREDICTIONS = (
    ("squeezed", "--", "black", "equation 5.2, its bulk shared among d"),
    ("predicted", ":", "#666666", "equation 5.2, all V values"),
)


def draw_spectra(table: pd.DataFrame, settings: GeometrySettings) -> Figure:
    """Draw singular values by index in a panel per seed, with the predictions of equation 5.2.

    Each mode of the prediction has its own height: the m bits, the bulk, and the constant. Dotted:
    all V values of the equation, of which a model of width d can have only d. Dashed: the squares
    of the bulk are shared among the values that the model has.
    """
    (bits,), (d_model,) = settings.bits, settings.d_models

    def draw(panel: Axes, rows: Any, seed: int) -> None:
        colour, _ = plots.series(0)
        panel.plot(rows["index"], rows["value"], ".", color=colour, label="trained $W_E$")
        for column, style, shade, label in PREDICTIONS:
            options = {"color": shade, "linewidth": 1, "drawstyle": "steps-mid", "label": label}
            panel.plot(rows["index"], rows[column], style, **options)
        panel.axvline(bits + 0.5, color="#999999", linewidth=0.8, label="after index m")
        panel.set_ylim(0, None)

    return draw_panels(
        table,
        draw,
        x="index",
        y="singular value",
        legend={"columns": 2},
        by="seed",
        title=f"m = {bits}, d = {d_model}, seed {{}}",
        height=2.2,
    )


def _trained_gain(table: Any, d_model: Any) -> Any:
    """Return the trained minus the frozen accuracy at one d, per m and seed."""
    ends = ("trained", "frozen")
    return paired(table[table.dim == d_model], "accuracy", ["bits", "seed"], condition=ends)


def _fall_above_vocab(table: Any) -> Any:
    """Return the gain at the smallest d minus 4 times that at the largest, if it is above V."""
    least, most = table.dim.min(), table.dim.max()
    above_vocab: Any = table[(2**table.bits < most) & (least < most)]
    gains = [_trained_gain(above_vocab, d_model) for d_model in (least, most)]
    return mean(gains[0] - 4 * gains[1], "bits")


def _by_seed(table: Any, column: str) -> list[Any]:
    """Return one interval per m for a column that has one number per seed."""
    return every(table.groupby(["bits", "seed"])[column].first(), "bits")


FALLS = above(
    "the inner product falls with the Hamming distance for every m (slope a of eq. 5.2)",
    lambda t: lowest(_by_seed(t, "a")),
    0.0,
)
JUMPS = above(
    "the diagonal is above the line for every m (b0 - b)",
    lambda t: lowest(_by_seed(t, "jump")),
    0.0,
)


def _linear(least: float) -> Check:
    return above(
        "the mean inner products are linear in D >= 1 for every m (R squared of the means, each "
        "distance weighted by its number of pairs)",
        lambda t: lowest(_by_seed(t, "r2_means")),
        least,
    )


def _inner(name: str, *, bits: Any, d_models: Any, quick: Any, identity: bool = False) -> Analysis:
    return Analysis(
        id=name,
        settings=scales(
            GeometrySettings(bits=bits, d_models=d_models, identity=identity),
            **quick,
            seeds=3,
            steps=2000,
        ),
        ours=(*RECIPE_OURS, "d_models", "length"),
        run=inner_by_distance,
        draw=draw_inner,
        checks=(FALLS, _linear(0.95)) if identity else (FALLS, JUMPS, _linear(0.8)),
    )


def _spectrum(name: str, bits: int, d_model: int) -> Analysis:
    return Analysis(
        id=name,
        settings=scales(
            GeometrySettings(bits=(bits,), d_models=(d_model,), seeds=4), seeds=2, steps=2500
        ),
        ours=(*(name for name in RECIPE_OURS if name != "seeds"), "length"),
        run=spectra,
        draw=draw_spectra,
        checks=(
            above(
                "singular value m is above 1.2 times the next one, in every run",
                lambda t: exact(t.ratio.min()),
                1.2,
            ),
            above(
                "the m largest directions are those of the bits, in every run (fraction)",
                lambda t: exact(t.bit_share.min()),
                0.9,
                origin="own",
            ),
            near(
                "the m largest values hold the fraction of the sum of squares that equation 5.2 "
                "predicts (measured - predicted)",
                _energy,
                0.0,
                0.03,
                origin="own",
            ),
            near(
                "the gap is as wide as equation 5.2 predicts with an even bulk (ratio s_m / "
                "s_(m+1), measured over predicted)",
                _gap_to_prediction,
                1.0,
                0.25,
                scales=("full",),
                remark="measured at the end of a full training only",
                origin="own",
            ),
        ),
    )


def _energy(table: Any) -> Any:
    """Return the measured minus the predicted fraction of squares in the m largest values."""
    squares = table.assign(value=table.value**2, squeezed=table.squeezed**2)
    top = squares[squares["index"] <= squares.bits]
    by_seed = [rows.groupby("seed")[["value", "squeezed"]].sum() for rows in (top, squares)]
    fractions = by_seed[0] / by_seed[1]
    return mean(fractions.value - fractions.squeezed)


def _gap_to_prediction(table: Any) -> Any:
    """Return the ratio of singular values m and m + 1 over the ratio that is predicted."""
    gaps = table.groupby("seed")[["ratio", "predicted_ratio_squeezed"]].first()
    return mean(gaps.ratio / gaps.predicted_ratio_squeezed)


ANALYSES = (
    _inner("fig3b", bits=(8,), d_models=(128,), quick={"bits": (6,), "d_models": (32,)}),
    Analysis(
        id="figc4",
        settings=scales(
            WidthSettings(d_models=(8, 16, 32, 64, 128, 256, 512)),
            bits=(5,),
            d_models=(8, 32, 128),
            seeds=3,
            steps=2000,
        ),
        ours=(*RECIPE_OURS, "d_models", "length"),
        run=trained_against_frozen,
        draw=draw_widths,
        checks=(
            above(
                "trained embeddings gain more than .1 at the smallest d for every m",
                lambda t: lowest(every(_trained_gain(t, t.dim.min()), "bits")),
                0.1,
            ),
            above(
                "at the largest d, above V, the gain is under a quarter of that, on average over m",
                _fall_above_vocab,
                0.0,
                scales=("full",),
                remark="the quick scale has one m only",
            ),
        ),
    ),
    _inner("figc5", bits=(7, 8), d_models=(64, 128), quick={"bits": (6, 7), "d_models": (32, 64)}),
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
