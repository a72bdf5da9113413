"""The bridge by mixing: efficacy as a growing fraction of the context supports another target.

For the one-layer model the fraction is the mixing rate of figure C.13, at a length near that of the
prompts. For language models it is the fraction of the prompt's tokens in hijacking sentences, at
every dose of figure 2a. On both sides, efficacy is the fraction of contexts or facts with
score(other target) > score(target).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analyses.bridge.sides import LANGUAGE, ONE_LAYER, OURS, Sides, facts_of
from analyses.paper.context_mixing import WAYS, MixingSettings, mixed
from analyses.paper.hijack_curves import RISES, CurveSettings, curves, moves, verdicts
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import FEW, above, lowest, mean, near, paired
from analyses.reproduction.drawing import OVER_SEEDS, WILSON, draw_intervals, draw_means
from analyses.reproduction.settings import scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.prompts.schemes import get_scheme
from hijacklens.prompts.tokens import locate
from hijacklens.prompts.wordings import make_prompts
from hijacklens.statistics import Interval, fraction

ONE_LAYER_WAYS = dict(
    zip(WAYS, ("the trained one-layer model", "equation 5.1", "the Bayes rule"), strict=True)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingSides(Sides):
    """The bridge of mixing rate and dose."""

    length: int = 16
    """About that of the prompts (`tokens` in the table)."""
    rates: tuple[float, ...]
    contexts: int
    scheme: str = "do-not-think"
    doses: tuple[int, ...] = (0, 1, 2, 3, 5)


def mixing(settings: MixingSides, bench: Workbench) -> pd.DataFrame:
    """Return whether the other target wins, by the fraction of the context that supports it.

    There is a row per way of answering in the one-layer task (`model`), rate and seed (`wins`:
    efficacy), and the rows of `curves` per language model, fact and dose, with the prompt's
    `tokens`. The fraction of the context is `share`.
    """
    common: dict[str, Any] = asdict(settings) | {"bits": (settings.bits,)}
    names = {each.name for each in fields(MixingSettings)} & set(common)
    task = MixingSettings(**{name: common[name] for name in names})
    answers = mixed(task, bench).rename(columns={"rate": "share", "way": "model"})
    parts = [answers[["model", "seed", "share", "wins"]].assign(side=ONE_LAYER)]
    facts, scheme = facts_of(settings, bench), get_scheme(settings.scheme)
    table = curves(
        CurveSettings(
            schemes=(settings.scheme,),
            relations=("all",),
            limit=settings.limit,
            doses=settings.doses,
            seed=settings.seed,
        ),
        bench,
    )
    for name, items in table.groupby("model", sort=False):
        tokenizer = bench.language_model(str(name)).tokenizer
        prompts, _ = make_prompts(facts, scheme, settings.doses, tokenizer, seed=settings.seed)
        sizes = []
        for fact, prompt in prompts:
            located = locate(tokenizer, prompt)
            share = len(located.spans["hijack"]) / len(located.ids)
            sizes.append((fact.case_id, prompt.dose, len(located.ids), share))
        measured = pd.DataFrame(sizes, columns=["case_id", "dose", "tokens", "share"])
        found = items.merge(measured, on=["case_id", "dose"], how="left")
        parts.append(found.assign(side=LANGUAGE))
    return pd.concat(parts, ignore_index=True)


def draw_mixing(table: pd.DataFrame, settings: MixingSides) -> Figure:
    """Draw efficacy against the fraction of the context, a curve per model and way of answering."""
    with plots.canvas(width=5.4, height=4.4) as (figure, (axes,)):
        size = f"m = {settings.bits}, L = {settings.length}, by mixing rate"
        for i, way in enumerate(WAYS):
            by: Any = _one_layer(table, way).groupby("share")["wins"]
            draw_means(axes, by, i, label=f"one-layer, {way}: {size}", markersize=4)
        language = verdicts(table).groupby("model", sort=False)
        for i, (name, items) in enumerate(language, start=len(WAYS)):
            by = items.groupby("dose")
            efficacy = [fraction(int(rows["wins"].sum()), len(rows)) for _, rows in by]
            x, length = by["share"].mean(), by["tokens"].mean()[1]
            label = f"{name}, {items['case_id'].nunique()} facts, {length:.0f} tokens at dose 1"
            draw_intervals(axes, x, efficacy, i, capsize=2, label=plots.escape(label))
            for dose, place, interval in zip(x.index, x, efficacy, strict=True):
                axes.annotate(
                    f"{dose:.0f}",
                    (place, interval.value),
                    xytext=(5, 5) if i % 2 else (5, -11),
                    textcoords="offset points",
                    fontsize=8,
                    color=plots.series(i)[0],
                )
        axes.set(
            xlabel="fraction of the context's tokens for the other target (numbers: dose)",
            ylabel="efficacy: fraction with other > own target",
            ylim=(-0.04, 1.04),
        )
        bars = f"{WILSON}; one-layer: {OVER_SEEDS.format(settings.seeds)}"
        plots.legend_below(figure, [axes], bars=bars, columns=1)
        return figure


def _one_layer(table: Any, way: str) -> Any:
    return table[(table.side == ONE_LAYER) & (table.model == way)]


def _curve(table: Any, way: str = "trained") -> Any:
    """Return the efficacy in the one-layer task by mixing rate, a column per seed."""
    return _one_layer(table, way).pivot(index="share", columns="seed", values="wins")


def _ahead(table: Any, way: str) -> Interval:
    """Return the rise by one sentence minus the one-layer rise at the same fraction of tokens."""
    curve = _curve(table, way).mean(axis=1)
    rises = []
    for _, items in verdicts(table).groupby("model"):
        facts = ["relation_id", "case_id"]
        wide = items.pivot(index=facts, columns="dose", values=["wins", "share"])
        one_layer_rise = np.interp(wide["share"][1], curve.index, curve) - curve.iloc[0]
        rises.append(mean(wide["wins"][1] - wide["wins"][0] - one_layer_rise, "relation_id"))
    return lowest(rises)


ANALYSES = (
    Analysis(
        id="bridge-mixing",
        settings=scales(
            MixingSides(
                bits=8,
                d_model=256,
                rates=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
                contexts=8192,
            ),
            bits=6,
            d_model=32,
            seeds=2,
            steps=1500,
            rates=(0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0),
            contexts=2048,
            limit=40,
        ),
        ours=(*OURS, "rates", "contexts", "scheme", "doses"),
        run=mixing,
        draw=draw_mixing,
        checks=(
            above(
                "one-layer: efficacy grows by .5 from rate 0 to 1",
                lambda t: mean(
                    paired(_one_layer(t, "trained"), "wins", ["seed"], share=(1.0, 0.0))
                ),
                0.5,
            ),
            near(
                "one-layer: efficacy at rate .5 is one half, as the two labels are alike",
                lambda t: mean(_one_layer(t, "trained").query("share == 0.5").wins),
                0.5,
                0.05,
            ),
            moves(RISES, (0, 1), up=True, about="relations like these"),
            *(
                above(
                    "one sentence raises efficacy in every language model more than the same "
                    f"fraction of tokens does with {name} (paired; relations like these)",
                    lambda t, way=way: _ahead(t, way),
                    0.0,
                    **FEW,
                )
                for way, name in ONE_LAYER_WAYS.items()
            ),
        ),
    ),
)
