"""Figures 3a, C.1, C.2 and C.3: the role of the value matrix of a trained model.

3a, C.1   accuracy of a trained W_V and of a fixed identity on short contexts
C.2       accuracy if equation 5.1 or a random construction replaces the trained W_V
C.3       smallest principal angle between the trained W_V and these constructions, rank m
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, every, highest, lowest, mean, paired
from analyses.reproduction.drawing import BOUND, draw_over_widths, draw_panels, over_seeds
from analyses.reproduction.settings import (
    RECIPE_OURS,
    LengthSettings,
    WidthSettings,
    best_rows,
    identity_value,
    scales,
    trained_by_size,
)
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.one_layer import memory
from hijacklens.statistics import Interval
from probes.geometry.subspaces import value_angles


def trained_against_identity(settings: LengthSettings, bench: Workbench) -> pd.DataFrame:
    """Return the accuracy per m, L, condition and seed at the condition's better learning rate."""
    rows = []
    conditions = ("trained", "identity")
    for length, bits, condition in product(settings.lengths, settings.bits, conditions):
        recipe = settings.recipe(settings.d_model, **identity_value(condition == "identity"))
        for row in best_rows(bench.trained(settings.task(bits, length), recipe)):
            rows.append({"bits": bits, "length": length, "condition": condition, **row})
    return pd.DataFrame(rows)


def draw_contrast(table: pd.DataFrame, settings: LengthSettings) -> Figure:
    """Draw bars over m for both conditions in a panel per L; dotted: accuracy of the Bayes rule."""
    bits = list(settings.bits)

    def draw(panel: Axes, rows: Any, length: int) -> None:
        for i, condition in enumerate(("trained", "identity")):
            by = rows[rows["condition"] == condition].groupby("bits")["accuracy"]
            panel.bar(
                [k + (i - 0.5) * 0.38 for k in range(len(bits))],
                by.mean().loc[bits],
                yerr=by.sem().loc[bits],
                width=0.36,
                color=plots.series(i)[0],
                hatch="" if i == 0 else "//",
                edgecolor="white",
                error_kw={"elinewidth": 1, "capsize": 2},
                label="$W_V$ trained" if i == 0 else "$W_V$ fixed to the identity",
            )
        for k, bayes in enumerate(rows.groupby("bits")["bayes_accuracy"].mean().loc[bits]):
            panel.plot([k - 0.45, k + 0.45], [bayes] * 2, color="black", **BOUND)
        panel.plot([], [], color="black", **BOUND, label="Bayes rule")
        panel.set_xticks(range(len(bits)), [f"m = {m}" for m in bits])
        panel.set_ylim(0, 1.02)

    legend = over_seeds(settings)
    options = {"by": "length", "title": "L = {}", "height": 2.6}
    return draw_panels(table, draw, x="", y="accuracy", legend=legend, **options)


def replaced(settings: WidthSettings, bench: Workbench) -> pd.DataFrame:
    """Return the accuracy with the trained, the constructed and a random W_V per m, d and seed."""
    parts = []
    for result, columns in _results(settings, bench):
        task = result.task
        values: dict[str, Any] = {
            "trained": None,
            "constructed": lambda model, task=task: memory.constructed(model.W_E, task),
            "random": lambda model, task=task: memory.random(
                model.W_E, task, torch.Generator().manual_seed(model.config.seed)
            ),
        }
        for name, value in values.items():
            accuracy = result.accuracy(value)
            best: Any = accuracy[accuracy["lr"] == columns["lr"]]
            parts.append(best.assign(**columns, memory=name))
    names = ["bits", "dim", "lr", "seed", "memory", "accuracy"]
    return pd.concat(parts, ignore_index=True).reindex(columns=names)


def angles(settings: WidthSettings, bench: Workbench) -> pd.DataFrame:
    """Return the smallest principal angle in degrees to each reference per m, d, seed and side."""
    parts = []
    for result, columns in _results(settings, bench):
        for seed, model in enumerate(result.best()):
            table = value_angles(model, result.task, draws=1, seed=seed).to_dataframe()
            smallest: Any = table[table["index"] == 1]
            parts.append(smallest.assign(**columns, seed=seed))
    names = ["bits", "dim", "lr", "seed", "reference", "side", "degrees"]
    return pd.concat(parts, ignore_index=True).reindex(columns=names)


def _results(settings: WidthSettings, bench: Workbench) -> Any:
    return trained_by_size(settings, bench, product(settings.bits, settings.d_models))


draw_replaced = partial(
    draw_over_widths,
    column="memory",
    names={"trained": "trained $W_V$", "constructed": "equation 5.1", "random": "random memory"},
    value="accuracy",
    label="accuracy",
)
draw_angles = partial(
    draw_over_widths,
    column="reference",
    names={
        "constructed": "to equation 5.1",
        "random": "to a random memory",
        "gaussian": "to a Gaussian start",
    },
    value="degrees",
    label="smallest principal\nangle (degrees)",
)


CELL = ["bits", "dim"]
"""Seeds of a cell are alike: claims on average are about m and d like these."""
CELLS = "the quick scale has four cells of m and d only"


def _gain(table: Any) -> Any:
    """Return trained minus identity accuracy per L, m and seed (with equal starts and contexts)."""
    ends = ("trained", "identity")
    return paired(table, "accuracy", ["length", "bits", "seed"], condition=ends)


def _gain_at_short(table: Any) -> Interval:
    """Return the gain at the shortest L minus that at the longest, over m."""
    gain, ends = _gain(table).rename("gain").reset_index(), (table.length.min(), table.length.max())
    return mean(paired(gain, "gain", ["bits", "seed"], length=ends), "bits")


def _cost(table: Any, name: str) -> Any:
    """Return the trained minus the replaced accuracy per m, d and seed."""
    return paired(table, "accuracy", [*CELL, "seed"], memory=("trained", name))


def _wider(table: Any, name: str) -> Interval:
    """Return the smallest angle to a reference minus that to the constructed memory."""
    runs = [*CELL, "seed"]
    difference = paired(table, "degrees", [*runs, "side"], reference=(name, "constructed"))
    # The two sides of one matrix are not two runs.
    return mean(difference.groupby(runs).mean(), CELL)


def _contrast(name: str, lengths: tuple[int, ...], *checks: Any) -> Analysis:
    better = above(
        "a trained W_V is more accurate than the identity for every m at the shortest L",
        lambda t: lowest(every(_gain(t)[t.length.min()], "bits")),
        0.0,
    )
    return Analysis(
        id=name,
        settings=scales(
            LengthSettings(lengths=lengths, seeds=10), bits=(5, 6), d_model=64, seeds=3, steps=2000
        ),
        ours=(*RECIPE_OURS, "d_model"),
        run=trained_against_identity,
        draw=draw_contrast,
        checks=(better, *checks),
    )


def _replacement(name: str, run: Any, draw: Any, *checks: Any) -> Analysis:
    return Analysis(
        id=name,
        settings=scales(
            WidthSettings(d_models=(16, 32, 64, 128, 256, 512)),
            bits=(5, 6),
            d_models=(16, 64),
            seeds=3,
            steps=1500,
        ),
        ours=(*RECIPE_OURS, "d_models", "length"),
        run=run,
        draw=draw,
        checks=checks,
    )


ANALYSES = (
    _contrast("fig3a", (64,)),
    _contrast(
        "figc1",
        (64, 128),
        above(
            "the gain is larger at the shortest L than at the longest",
            _gain_at_short,
            0.0,
            scales=("full",),
            remark="the quick scale has two m only",
        ),
        above(
            "a trained W_V is more accurate than the identity for every m at every L",
            lambda t: lowest(every(_gain(t), ["length", "bits"])),
            0.0,
            scales=("full",),
            remark="at the longest L the gain is small and quick has few seeds",
        ),
    ),
    _replacement(
        "figc2",
        replaced,
        draw_replaced,
        below(
            "equation 5.1 in place of W_V costs less than .05 on average over m and d",
            lambda t: mean(_cost(t, "constructed"), CELL),
            0.05,
            scales=("full",),
            remark=CELLS,
        ),
        below(
            "equation 5.1 costs less than .05 at every m and d (largest cost)",
            lambda t: highest(every(_cost(t, "constructed"), CELL)),
            0.05,
            scales=("full",),
            remark="over three seeds at one m and d the interval is too wide",
        ),
        above(
            "a random memory costs more than .3 at every m and d",
            lambda t: lowest(every(_cost(t, "random"), CELL)),
            0.3,
        ),
    ),
    _replacement(
        "figc3",
        angles,
        draw_angles,
        *(
            above(
                f"the smallest angle to a {other} is wider than to equation 5.1, on average",
                lambda t, name=name: _wider(t, name),
                0.0,
                scales=("full",),
                remark=CELLS,
            )
            for name, other in {"random": "random memory", "gaussian": "Gaussian start"}.items()
        ),
    ),
)
