"""The bridge by a known world: does the hijack need facts and talk in the same documents?

world-switch      small GPT-2s trained on pocket worlds that differ in one knob (`sharing`): recall,
                  the shift by scheme and dose, and its regression on the exact log-likelihood
                  ratio of the context
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, exact, lowest, mean, near, paired
from analyses.reproduction.drawing import draw_intervals
from analyses.reproduction.settings import names_of, scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.facts.loading import load_facts
from hijacklens.models.loading import load_model
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.scoring.efficacy import margin
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.statistics import Interval
from hijacklens.world.distribution import Reader
from hijacklens.world.trained import Recipe, TrainedWorld
from hijacklens.world.training import train_world
from hijacklens.world.world import SCHEMES, World

TALK = Scheme(name="talk", template=SCHEMES["talk"])
NEGATION = get_scheme("do-not-think")
MOST = 3
"""The dose of the checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchSettings:
    """Worlds that differ in the fraction of facts drawn by the topic of their document."""

    sharings: tuple[float, ...] = (0.0, 0.5, 1.0)
    seeds: int = 5
    doses: tuple[int, ...] = (0, 1, 2, 3)
    bits: int = World.bits
    subjects: int = World.subjects
    name_words: int = World.name_words
    relations: int = World.relations
    steps: int = Recipe.steps


def switch(settings: SwitchSettings, bench: Workbench) -> pd.DataFrame:
    """Return a row per world, seed, scheme and dose."""
    rows = []
    for sharing, seed in product(settings.sharings, range(settings.seeds)):
        world = World(
            sharing=sharing,
            bits=settings.bits,
            subjects=settings.subjects,
            name_words=settings.name_words,
            relations=settings.relations,
        )
        trained = trained_world(world, Recipe(steps=settings.steps, seed=seed), bench)
        measured = summary(readings(trained, doses=settings.doses))
        rows.append(measured.assign(sharing=sharing, seed=seed, **trained.scores))
    return pd.concat(rows, ignore_index=True)


def trained_world(world: World, recipe: Recipe, bench: Workbench) -> TrainedWorld:
    """Train a world on first use; read it from the folder of the workbench after that."""
    text = json.dumps([world.record(), asdict(recipe)], sort_keys=True)
    name = f"world-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return train_world(world, recipe, out=bench.work / name, quiet=bench.quiet)


def readings(
    trained: TrainedWorld, *, doses: tuple[int, ...], folder: Path | None = None
) -> pd.DataFrame:
    """Return a row per query, scheme and dose, with the exact log-likelihood ratio of its context.

    Args:
        trained: A trained world.
        doses: Numbers of sentences, 0 among them.
        folder: The model of a checkpoint; None for the trained one.
    """
    model, facts = load_model(folder or trained.model), load_facts(trained.facts)
    options: Any = {"execution": Execution(store=False), "quiet": True}
    result = hijack(model, facts, schemes=[NEGATION, TALK], doses=doses, **options)
    table = result.to_dataframe()
    table["margin"] = margin(table, "first")
    bare = table["margin"].where(table["dose"] == 0)
    bare = bare.groupby([table["scheme"], table["case_id"]]).transform("max")
    table["shift"] = table["margin"] - bare
    ratio = _ratios(trained.world)
    by_case = {fact.case_id: fact for fact in facts}
    rows: Any = table.itertuples()
    texts = {scheme.name: scheme for scheme in (NEGATION, TALK)}
    table["ratio"] = [
        ratio(texts[row.scheme].sentence(by_case[row.case_id]), row.dose, by_case[row.case_id])
        for row in rows
    ]
    return table


def _ratios(world: World) -> Any:
    """Return a function that gives the log-likelihood ratio of repeated sentences, in nats."""
    reader = Reader(world, knows=False)

    @cache
    def ratio(sentences: str, prompt: str, true: str, false: str) -> float:
        return reader.margin(sentences + prompt, true, false) - reader.margin(prompt, true, false)

    return lambda sentence, dose, fact: ratio(
        f"{sentence} " * dose, fact.prompt, fact.target_true, fact.target_false
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return means over queries, and the regression of shifts on exact ratios."""
    rows = []
    groups: Any = table.groupby(["scheme", "dose"], sort=False)
    for (scheme, dose), group in groups:
        x, y = group["ratio"].to_numpy(), group["shift"].to_numpy()
        spread = x.std() > 0.01
        slope = np.polyfit(x, y, 1)[0] if spread else np.nan
        rows.append(
            {
                "scheme": scheme,
                "dose": dose,
                "efficacy": (group["margin"] > 0).mean(),
                "shift": y.mean(),
                "ratio": x.mean(),
                "slope": slope,
                "r2": np.corrcoef(x, y)[0, 1] ** 2 if spread else np.nan,
            }
        )
    return pd.DataFrame(rows)


def draw_switch(table: pd.DataFrame, settings: SwitchSettings) -> Figure:
    """Draw the shift by dose for both schemes, a curve per world, and efficacy by sharing."""
    with plots.panels(3, height=2.9) as (figure, axes):
        for panel, scheme in zip(axes, (TALK, NEGATION), strict=False):
            for i, sharing in enumerate(settings.sharings):
                rows = _rows(table, scheme.name, sharing)
                _draw(panel, rows.groupby("dose")["shift"], i, f"sharing {sharing:g}")
            exact_ratio = _rows(table, scheme.name, 1.0).groupby("dose")["ratio"].mean()
            if len(exact_ratio):
                panel.plot(
                    exact_ratio.index,
                    exact_ratio,
                    ":",
                    color="black",
                    label="exact ratio, sharing 1",
                )
            panel.set(title=scheme.name, xlabel="dose", ylabel="mean shift (nats)")
            panel.set_xticks(sorted(table["dose"].unique()))
        for i, scheme in enumerate((TALK, NEGATION), start=len(settings.sharings)):
            rows = table[(table.scheme == scheme.name) & (table.dose == MOST)]
            _draw(axes[2], rows.groupby("sharing")["efficacy"], i, scheme.name)
        axes[2].set(title=f"dose {MOST}", xlabel="sharing", ylabel="efficacy")
        plots.legend_below(figure, axes, bars=f"95% intervals over {settings.seeds} seeds")
        return figure


def _draw(panel: Axes, groups: Any, i: int, label: str) -> None:
    """Draw means over seeds with their intervals as the i-th series of a panel."""
    found = [mean(values) for _, values in groups]
    draw_intervals(panel, list(groups.groups), found, i, label=label, capsize=2, markersize=4)


def _rows(table: Any, scheme: str, sharing: float, dose: int | None = None) -> Any:
    found = table[(table.scheme == scheme) & (table.sharing == sharing)]
    return found if dose is None else found[found.dose == dose]


def _growth(table: Any, scheme: str) -> Interval:
    """Return efficacy at the highest dose minus at dose 0, over seeds."""
    rows = table[(table.scheme == scheme) & (table.sharing == 1.0)]
    return mean(paired(rows, "efficacy", ["seed"], dose=(MOST, 0)))


def _farthest(table: Any) -> Interval:
    """Return the shift farthest from zero among all seeds and schemes without sharing."""
    shifts = table[(table.sharing == 0.0) & (table.dose == MOST)]["shift"]
    return exact(shifts.loc[shifts.abs().idxmax()]) if len(shifts) else mean(shifts)


def _least_step(table: Any, scheme: str) -> Interval:
    """Return the smallest rise of the mean shift from one value of sharing to the next."""
    rows = table[(table.scheme == scheme) & (table.dose == MOST)]
    return exact(rows.groupby("sharing")["shift"].mean().diff().min())


FULL_ONLY: Any = {"scales": ("full",), "remark": "two seeds of a tiny world do not decide it"}
ANALYSES = (
    Analysis(
        id="world-switch",
        settings=scales(
            SwitchSettings(),
            seeds=2,
            bits=3,
            subjects=16,
            name_words=1,
            relations=1,
            steps=300,
        ),
        ours=names_of(SwitchSettings),
        run=switch,
        draw=draw_switch,
        checks=(
            above(
                "sharing 1: recall of the most frequent tenth of the queries",
                lambda t: mean(_rows(t, "talk", 1.0, 0)["recall_frequent"]),
                0.9,
                **FULL_ONLY,
            ),
            *(
                above(
                    f"sharing 1: {MOST} sentences of {name} move every seed to the false target",
                    lambda t, name=name: lowest(
                        [exact(value) for value in _rows(t, name, 1.0, MOST)["shift"]]
                    ),
                    0.0,
                )
                for name in ("talk", "do-not-think")
            ),
            *(
                above(
                    f"sharing 1: efficacy is higher after {MOST} sentences of {name} than before",
                    lambda t, name=name: _growth(t, name),
                    0.0,
                    **FULL_ONLY,
                )
                for name in ("talk", "do-not-think")
            ),
            near(
                "sharing 0: the shift of no seed and scheme is far from zero",
                _farthest,
                0.0,
                0.15,
                **FULL_ONLY,
            ),
            above(
                "the shift of talk grows with sharing, step by step",
                lambda t: _least_step(t, "talk"),
                0.0,
                **FULL_ONLY,
            ),
            above(
                "sharing 1: queries whose context speaks more for the false target shift more "
                "(slope on the exact log-likelihood ratio)",
                lambda t: mean(_rows(t, "talk", 1.0, MOST)["slope"]),
                0.0,
                **FULL_ONLY,
            ),
        ),
    ),
)
