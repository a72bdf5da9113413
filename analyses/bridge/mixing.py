"""The bridge by mixing: efficacy as a growing fraction of the context supports another target.

For the one-layer model the fraction is the mixing rate of figure C.13. For language models it is
the fraction of the prompt's tokens in hijacking sentences, at every dose of figure 2a. On both
sides, efficacy is the fraction of contexts or facts with score(other target) > score(target).
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
from analyses.reproduction.drawing import OVER_SEEDS, WILSON, draw_intervals, draw_means
from analyses.reproduction.settings import scales
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
    """Return whether the other target wins, by the fraction of the context that supports it.

    There is a row per one-layer model and rate (`wins`: efficacy; `second`: the fraction of
    contexts whose best label is the second), and per language model, fact and dose (`wins`: 0 or
    1). The fraction of the context is `share`.
    """
    parts = [pd.DataFrame(_mixed(settings, bench))]
    scheme = get_scheme(settings.scheme)
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
    for name, items in verdicts(table).groupby("model", sort=False):
        tokenizer = bench.language_model(str(name)).tokenizer
        facts = facts_of(settings, bench)
        prompts, _ = make_prompts(facts, scheme, settings.doses, tokenizer, seed=settings.seed)
        fractions = {}
        for fact, prompt in prompts:
            located = locate(tokenizer, prompt)
            fractions[fact.case_id, prompt.dose] = len(located.spans["hijack"]) / len(located.ids)
        by_item = [fractions[key] for key in zip(items["case_id"], items["dose"], strict=True)]
        parts.append(items.assign(side=LANGUAGE, share=by_item))
    return pd.concat(parts, ignore_index=True)


def _mixed(settings: MixingSides, bench: Workbench) -> Iterator[dict[str, Any]]:
    result = one_layer(settings, bench)
    for seed, model in enumerate(result.best()):
        for rate in settings.rates:
            draw = torch.Generator().manual_seed(100_000 * seed + round(1_000 * rate))
            mixed = result.task.sample_mixed(settings.contexts, rate, draw)
            scores = answers(model, result.task)(mixed.tokens)
            first, second = (
                scores.gather(1, label[:, None])[:, 0] for label in (mixed.first, mixed.second)
            )
            yield {
                "side": ONE_LAYER,
                "model": f"seed {seed}",
                "share": rate,
                "wins": float((second > first).double().mean()),
                "second": float((second == scores.amax(1)).double().mean()),
            }


def draw_mixing(table: pd.DataFrame, settings: MixingSides) -> Figure:
    """Draw efficacy against the fraction of the context, a curve per language model and one more.

    The one-layer models share a curve. The dotted line is the fraction of contexts whose best label
    is the second, in the one-layer models.
    """
    rates = _side(table, ONE_LAYER).groupby("share")
    with plots.canvas(width=5.4, height=4.4) as (figure, (axes,)):
        draw_means(axes, rates["wins"], 0, label=f"one-layer, m = {settings.bits}, by mixing rate")
        label = "one-layer, second label first"
        axes.plot(rates["second"].mean(), ":", color=plots.series(0)[0], lw=1.2, label=label)
        language = _side(table, LANGUAGE).groupby("model", sort=False)
        for i, (name, items) in enumerate(language, start=1):
            by = items.groupby("dose")
            efficacy = [fraction(int(rows["wins"].sum()), len(rows)) for _, rows in by]
            x = by["share"].mean()
            label = f"{name}, {items['case_id'].nunique()} facts, by dose"
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
        plots.legend_below(figure, [axes], bars=bars, columns=2)
        return figure


def _side(table: Any, side: str) -> Any:
    return table[table.side == side]


def _curve(table: Any) -> Any:
    """Return the efficacy of the one-layer models by mixing rate, a column per seed."""
    return _side(table, ONE_LAYER).pivot(index="share", columns="model", values="wins")


def _ahead(table: Any) -> Interval:
    """Return the rise by one sentence minus the one-layer rise at the same fraction of tokens."""
    curve = _curve(table).mean(axis=1)
    rises = []
    for _, items in _side(table, LANGUAGE).groupby("model"):
        wide = items.pivot(index="case_id", columns="dose", values=["wins", "share"])
        one_layer_rise = np.interp(wide["share"][1], curve.index, curve) - curve.iloc[0]
        rises.append(mean(wide["wins"][1] - wide["wins"][0] - one_layer_rise))
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
                "one sentence raises efficacy in every language model more than the same fraction "
                "of tokens does in the one-layer model (paired)",
                _ahead,
                0.0,
                scales=("paper",),
                remark="over the 40 facts of the quick scale the interval is too wide",
            ),
        ),
    ),
)
