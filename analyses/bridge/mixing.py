"""The bridge by mixing: efficacy as more and more of a context speaks for another target.

On the one-layer model the share is the mixing rate of figure C.13, on language models the share of
the prompt's tokens that stand in hijacking sentences, at every dose of figure 2a. Efficacy is on
both sides the share with score(other target) > score(target).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from analyses.bridge.sides import LANGUAGE, ONE_LAYER, OURS, Sides, facts_of, one_layer
from analyses.paper.hijack_curves import CurveSettings, curves, dose_change, verdicts
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, lowest, mean, near
from analyses.reproduction.drawing import OVER_SEEDS
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.one_layer.evaluation import answers
from hijacklens.prompts.schemes import get_scheme
from hijacklens.prompts.tokens import locate
from hijacklens.scoring.items import make_prompts
from hijacklens.statistics import Interval, fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingSides(Sides):
    """The bridge of mixing rate and dose."""

    rates: tuple[float, ...]
    contexts: int
    scheme: str = "do-not-think"
    doses: tuple[int, ...] = (0, 1, 2, 3, 5)


def mixing(settings: MixingSides, bench: Workbench) -> pd.DataFrame:
    """Whether the other target wins, against the share of the context that speaks for it.

    A row per one-layer model and rate (`wins`: efficacy; `second`: the share that answers the
    second label before all others), and per language model, fact and dose (`wins`: 0 or 1).
    """
    parts = [pd.DataFrame(_mixed(settings, bench))]
    facts = facts_of(settings, bench)
    found = curves(
        CurveSettings(
            schemes=(settings.scheme,),
            relations=("all",),
            limit=settings.limit,
            doses=settings.doses,
            seed=settings.seed,
        ),
        bench,
    )
    prompts, _ = make_prompts(
        facts, get_scheme(settings.scheme), settings.doses, seed=settings.seed
    )
    for name, own in verdicts(found).groupby("model", sort=False):
        tokenizer = bench.language_model(str(name)).tokenizer
        shares = {}
        for fact, prompt in prompts:
            located = locate(tokenizer, prompt)
            shares[fact.case_id, prompt.dose] = len(located.spans["hijack"]) / len(located.ids)
        at = [shares[key] for key in zip(own["case_id"], own["dose"], strict=True)]
        parts.append(own.assign(side=LANGUAGE, share=at))
    return pd.concat(parts, ignore_index=True)


def _mixed(settings: MixingSides, bench: Workbench) -> Iterator[dict[str, Any]]:
    result = one_layer(settings, bench)
    for seed, model in enumerate(result.best()):
        for rate in settings.rates:
            draw = torch.Generator().manual_seed(100_000 * seed + round(1_000 * rate))
            mixed = result.task.sample_mixed(settings.contexts, rate, draw)
            scores = answers(model, result.task)(mixed.tokens)
            first, second = (
                scores.gather(1, t[:, None])[:, 0] for t in (mixed.first, mixed.second)
            )
            yield {
                "side": ONE_LAYER,
                "model": f"seed {seed}",
                "share": rate,
                "wins": float((second > first).double().mean()),
                "second": float((second == scores.amax(1)).double().mean()),
            }


def draw_mixing(table: pd.DataFrame, settings: MixingSides) -> Figure:
    """Efficacy against the share of the context, the one-layer model's curve and a line a model.

    Dotted: how often the one-layer model answers the second label before all others.
    """
    one = table[table["side"] == ONE_LAYER].groupby("share")
    with plots.canvas(width=5.4, height=4.4) as (figure, (axes,)):
        colour, marker = plots.series(0)
        label = f"one-layer, m = {settings.bits}, by mixing rate"
        axes.errorbar(
            one["wins"].mean().index,
            one["wins"].mean(),
            yerr=one["wins"].sem(),
            color=colour,
            marker=marker,
            capsize=2,
            label=label,
        )
        axes.plot(
            one["second"].mean(), ":", color=colour, lw=1.2, label="one-layer, second label first"
        )
        language: Any = table[table["side"] == LANGUAGE]
        for i, (name, own) in enumerate(language.groupby("model", sort=False), start=1):
            colour, marker = plots.series(i)
            by = own.groupby("dose")
            found = [fraction(int(of["wins"].sum()), len(of)) for _, of in by]
            x = by["share"].mean()
            axes.errorbar(
                x,
                [interval.value for interval in found],
                yerr=plots.whiskers(found),
                color=colour,
                marker=marker,
                capsize=2,
                label=f"{name}, {own['case_id'].nunique()} facts, by dose",
            )
            for dose, place, interval in zip(x.index, x, found, strict=True):
                axes.annotate(
                    f"{dose:.0f}",
                    (place, interval.value),
                    xytext=(5, 5) if i % 2 else (5, -11),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
        axes.set(
            xlabel="share of the context's tokens for the other target (numbers: dose)",
            ylabel="efficacy: share other > own target",
            ylim=(-0.04, 1.04),
        )
        bars = f"95% Wilson intervals; one-layer: {OVER_SEEDS.format(settings.seeds)}"
        plots.legend_below(figure, [axes], bars=bars, columns=2)
        return figure


def _side(table: Any, side: str) -> Any:
    return table[table.side == side]


def _curve(table: Any) -> Any:
    """Efficacy of the one-layer models by mixing rate, a column per seed."""
    return _side(table, ONE_LAYER).pivot(index="share", columns="model", values="wins")


def _ahead(table: Any) -> Interval:
    """Rise of efficacy by one sentence minus the one-layer rise at the same share of tokens."""
    curve = _curve(table).mean(axis=1)
    found = []
    for _, own in _side(table, LANGUAGE).groupby("model"):
        wide = own.pivot(index="case_id", columns="dose", values=["wins", "share"])
        there = np.interp(wide["share"][1], curve.index, curve) - curve.iloc[0]
        found.append(mean(wide["wins"][1] - wide["wins"][0] - there))
    return lowest(found)


ANALYSES = (
    Analysis(
        id="bridge-mixing",
        settings={
            "quick": MixingSides(
                bits=6,
                d_model=32,
                length=256,
                seeds=2,
                steps=1500,
                learning_rates=(0.01,),
                rates=(0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0),
                contexts=2048,
                limit=40,
            ),
            "paper": MixingSides(
                bits=8,
                d_model=256,
                length=256,
                seeds=5,
                steps=4000,
                rates=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
                contexts=8192,
                limit=None,
            ),
        },
        ours=(*OURS, "rates", "contexts", "scheme", "doses"),
        run=mixing,
        draw=draw_mixing,
        checks=(
            above(
                "one-layer: efficacy grows by .9 from rate 0 to 1",
                lambda t: mean(_curve(t).loc[1.0] - _curve(t).loc[0.0]),
                0.9,
            ),
            near(
                "one-layer: efficacy at rate .5 is one half, as the two labels are alike",
                lambda t: mean(_curve(t).loc[0.5]),
                0.5,
                0.05,
            ),
            above(
                "one sentence raises efficacy, in every language model (paired)",
                lambda t: lowest(dose_change(_side(t, LANGUAGE), 0, 1)),
                0.0,
            ),
            above(
                "one sentence moves every language model further than the one-layer model at the "
                "same share of tokens (paired)",
                _ahead,
                0.0,
                scales=("paper",),
                remark="over the 40 facts of the quick scale the interval is too wide",
            ),
        ),
    ),
)
