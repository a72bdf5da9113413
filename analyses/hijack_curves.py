"""Figures 1, 2a, 2b and B.1 to B.4: context hijacking of language models.

Efficacy is the share of facts with score(o_) > score(o*), by the rule `first`; hijacking raises
it, reverse hijacking lowers it (some summaries of the paper have the opposite sign). All doses
score the same facts, so changes between doses are paired. Models that are named together are drawn
together, so depth and size can be compared by naming several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.check import Check, above, below, exact, lowest, mean
from analyses.registry import Analysis
from analyses.workbench import Workbench
from hijacklens import plots
from hijacklens.scoring.answers import answer
from hijacklens.scoring.hijack import hijack
from hijacklens.statistics import Interval, share

TARGETS = ("Paris", "Chicago")
QUESTION = "The Eiffel Tower is in the city of"
CONTEXTS = {
    "question alone": "",
    "one sentence": "The Eiffel Tower is not in Chicago.",
    "three sentences": " ".join(["The Eiffel Tower is not in Chicago."] * 3),
    "argument": "The Eiffel Tower is not in Chicago. However, the Chicago river is in Chicago. "
    "Therefore, the Chicago river is in the city of Chicago.",
    "do not think, five times": " ".join(["Do not think of Chicago."] * 5),
}
"""Contexts of figure 1. The first two are the paper's; the strings it uses for Gemma and LLaMA are
not known, so the others are ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """Figure 1: what each model says behind each context."""

    contexts: tuple[str, ...] = tuple(CONTEXTS)
    tokens: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSettings:
    """Figures 2 and B: a panel per scheme and relation."""

    schemes: tuple[str, ...]
    relations: tuple[str, ...]
    """A panel each; `all` pools the facts of every relation."""
    limit: int | None
    """Facts per panel, a seeded sample; None for all that there are."""
    doses: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    seed: int = 0


def answers(settings: AnswerSettings, bench: Workbench) -> pd.DataFrame:
    """The greedy answer and the log-probabilities of both targets per model and context."""
    rows = []
    for name in bench.models:
        model = bench.language_model(name)
        for context in settings.contexts:
            text = f"{CONTEXTS[context]} {QUESTION}".strip()
            found = answer(model, text, targets=TARGETS, top=1, tokens=settings.tokens)
            true, false = found.targets
            rows.append(
                {
                    "model": name,
                    "context": context,
                    "prompt": text,
                    "answer": found.completion.strip().split("\n")[0],
                    "logprob_paris": true.logprob,
                    "logprob_chicago": false.logprob,
                    "rank_paris": true.rank,
                    "rank_chicago": false.rank,
                }
            )
    return pd.DataFrame(rows)


def draw_answers(table: pd.DataFrame, settings: AnswerSettings) -> Figure:
    """Log-odds of Chicago against Paris by context, a colour per model, the answer beside it."""
    models = list(table["model"].unique())
    with plots.canvas(width=7.4, height=0.5 + 0.32 * len(models) * len(settings.contexts)) as (
        figure,
        (axes,),
    ):
        for i, model in enumerate(models):
            rows = table[table["model"] == model]
            odds = rows["logprob_chicago"] - rows["logprob_paris"]
            step = 0.8 / len(models)
            places = [k + (i + 0.5) * step - 0.4 for k in range(len(rows))]
            colour, _ = plots.series(i)
            axes.barh(places, odds, height=step * 0.9, color=colour, label=model)
            for place, end, text in zip(places, odds, rows["answer"], strict=True):
                axes.annotate(
                    f'"{text}"',
                    (max(end, 0), place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                    parse_math=False,
                )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(settings.contexts)), settings.contexts)
        axes.invert_yaxis()
        axes.margins(x=0.3)
        axes.set_xlabel("log P(Chicago) - log P(Paris), nats")
        axes.legend(fontsize=8, loc="lower left")
        return figure


def curves(settings: CurveSettings, bench: Workbench) -> pd.DataFrame:
    """A row per model, scheme, panel, fact and dose: the margin score(o_) - score(o*) in nats."""
    parts = []
    for name in bench.models:
        model = bench.language_model(name)
        for relation in settings.relations:
            chosen = bench.scored
            if relation != "all":
                chosen = chosen.where(relation=relation)
            result = hijack(
                model,
                chosen.limit(settings.limit, seed=settings.seed),
                schemes=settings.schemes,
                doses=settings.doses,
                seed=settings.seed,
                quiet=bench.quiet,
            )
            items = result.to_dataframe()
            parts.append(
                pd.DataFrame(
                    {
                        "model": name,
                        "scheme": items["scheme"],
                        "relation": relation,
                        "case_id": items["case_id"],
                        "dose": items["dose"],
                        "margin": items["first_false"] - items["first_true"],
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def draw_curves(table: pd.DataFrame, settings: CurveSettings) -> Figure:
    """Efficacy against dose with Wilson intervals, a panel per scheme and relation."""
    panels = [(scheme, relation) for scheme in settings.schemes for relation in settings.relations]
    models = list(table["model"].unique())
    with plots.canvas(1, len(panels), width=2.9, height=2.8, share_y=True) as (figure, axes):
        for panel, (scheme, relation) in zip(axes, panels, strict=True):
            rows: Any = table[(table["scheme"] == scheme) & (table["relation"] == relation)]
            for i, model in enumerate(models):
                own: Any = rows[rows["model"] == model]
                found = [
                    share(int((of_dose["margin"] > 0).sum()), len(of_dose))
                    for _, of_dose in own.groupby("dose")
                ]
                colour, marker = plots.series(i)
                values = [interval.value for interval in found]
                panel.errorbar(
                    sorted(own["dose"].unique()),
                    values,
                    yerr=[
                        [interval.value - interval.low for interval in found],
                        [interval.high - interval.value for interval in found],
                    ],
                    color=colour,
                    marker=marker,
                    capsize=2,
                    label=model,
                )
            n = rows.groupby("model")["case_id"].nunique().max()
            panel.set_title(f"{scheme}\n{relation}, n = {n}", fontsize=9)
            panel.set_xlabel("dose (sentences)")
            panel.set_xticks(settings.doses)
            panel.set_ylim(-0.02, 1.02)  # a marker at 0 or 1 stays whole
        axes[0].set_ylabel("efficacy score: share false > true")
        axes[-1].legend(fontsize=8)
        return figure


def change(table: Any, start: int, end: int) -> list[Interval]:
    """The paired change of efficacy between two doses over facts, per model and scheme."""
    wins = (table.margin > 0).astype(float)
    wide = table.assign(win=wins).pivot_table(
        index=["model", "scheme", "relation", "case_id"], columns="dose", values="win"
    )
    moved = wide[end] - wide[start]
    return [mean(own) for _, own in moved.groupby(["model", "scheme"])]


def _highest(intervals: list[Interval]) -> Interval:
    return max(intervals, key=lambda interval: interval.high)


RISES = above(
    "one sentence raises efficacy, in every model (paired)",
    lambda t: lowest(change(t, 0, 1)),
    0.0,
)
FALLS = below(
    "one sentence of the reverse lowers efficacy, in every model (paired)",
    lambda t: _highest(change(t, 0, 1)),
    0.0,
)


def grows(remark: str) -> Check:
    """Five sentences against one."""
    return above(
        "five sentences raise efficacy above one sentence, in every model (paired)",
        lambda t: lowest(change(t, 1, 5)),
        0.0,
        scales=("paper",),
        remark=remark,
    )


def _curve(
    name: str,
    *,
    schemes: tuple[str, ...],
    relations: tuple[str, ...],
    checks: tuple[Check, ...],
    quick: int,
) -> Analysis:
    def at(limit: int | None) -> CurveSettings:
        return CurveSettings(schemes=schemes, relations=relations, limit=limit)

    return Analysis(
        id=name,
        settings={"quick": at(quick), "paper": at(None)},
        ours=("limit", "seed", "doses"),
        run=curves,
        draw=draw_curves,
        checks=checks,
    )


RELATIONS = ("P190", "P103", "P131", "P641")
SATURATED = (
    "the packaged models give way to one sentence, and the generic scheme hardly moves them further"
)
FLOOR = "decided on all facts only: where a model knows most of them, few verdicts are left to fall"
FEW = "decided on all facts only: at quick scale the change is smaller than its interval"

ANALYSES = (
    Analysis(
        id="fig1",
        settings={"quick": AnswerSettings(), "paper": AnswerSettings()},
        ours=("contexts", "tokens"),
        run=answers,
        draw=draw_answers,
        checks=(
            below(
                "asked plainly, every model prefers Paris (largest log-odds of Chicago, nats)",
                lambda t: exact(_odds(t[t.context == "question alone"]).max()),
                0.0,
            ),
            above(
                "in every model some context raises the odds of Chicago (least best shift, nats)",
                lambda t: exact(_best_shift(t).min()),
                0.0,
            ),
            above(
                "some model then prefers Chicago (largest log-odds, nats)",
                lambda t: exact(_odds(t[t.context != "question alone"]).max()),
                0.0,
            ),
        ),
    ),
    _curve(
        "fig2a",
        schemes=("do-not-think",),
        relations=("all",),
        checks=(RISES, grows(SATURATED)),
        quick=120,
    ),
    _curve(
        "figb1",
        schemes=("do-not-think-true",),
        relations=("all",),
        checks=(FALLS,),
        quick=120,
    ),
    _curve(
        "fig2b",
        schemes=("relation",),
        relations=("P190",),
        checks=(RISES,),
        quick=40,
    ),
    _curve(
        "figb2",
        schemes=("relation",),
        relations=RELATIONS,
        checks=(RISES, grows(FEW)),
        quick=25,
    ),
    _curve(
        "figb3",
        schemes=("relation-true",),
        relations=RELATIONS,
        checks=(FALLS,),
        quick=25,
    ),
    _curve(
        "figb4",
        schemes=("near-word", "near-word-true"),
        relations=("P1412",),
        checks=(
            above(
                "one near-word sentence raises efficacy, in every model (paired)",
                lambda t: lowest(change(t[t.scheme == "near-word"], 0, 1)),
                0.0,
            ),
            below(
                "one sentence of its reverse lowers efficacy, in every model (paired)",
                lambda t: _highest(change(t[t.scheme == "near-word-true"], 0, 1)),
                0.0,
                scales=("paper",),
                remark=FLOOR,
            ),
        ),
        quick=40,
    ),
)


def _odds(table: Any) -> Any:
    return table.logprob_chicago - table.logprob_paris


def _best_shift(table: Any) -> Any:
    """Per model, the largest log-odds of Chicago over the contexts minus those of the question."""
    odds = table.assign(odds=_odds(table))
    plain = odds[odds.context == "question alone"].set_index("model").odds
    return odds[odds.context != "question alone"].groupby("model").odds.max() - plain
