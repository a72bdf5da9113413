"""Figure 1: the answers of models after contexts about Chicago.

The paper shows one prompt per model, and we know the text for one of them. Here every model gets
all contexts, so that models can be compared.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import above, below, exact
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.models.identity import identify
from hijacklens.scoring.answers import answer

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
"""Contexts of figure 1. The first two are the paper's. We do not know the texts that it uses for
Gemma and LLaMA, so the others are ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """Figure 1: contexts, and tokens per answer."""

    contexts: tuple[str, ...] = tuple(CONTEXTS)
    tokens: int = 6


def size_of(model: Any) -> dict[str, int]:
    """Return the number of layers of a model and the number of its weights (`parameters`)."""
    return {"layers": int(model.cfg.n_layers), "parameters": identify(model).parameters}


def answers(settings: AnswerSettings, bench: Workbench) -> pd.DataFrame:
    """Return the answer of each model after each context.

    `answer` is the greedy continuation up to the end of its first line. `logprob_...` (nats) and
    `rank_...` (0 is the most likely) refer to the first token of each city. `layers` and
    `parameters`, the number of weights, give the size of the model.
    """
    rows = []
    for name in dict.fromkeys(bench.models):
        model = bench.language_model(name)
        size = size_of(model)
        for context in settings.contexts:
            text = f"{CONTEXTS[context]} {QUESTION}".strip()
            reply = answer(model, text, targets=TARGETS, top=1, tokens=settings.tokens)
            true, false = reply.targets
            rows.append(
                {
                    "model": name,
                    **size,
                    "context": context,
                    "prompt": text,
                    "answer": reply.completion.strip().split("\n")[0],
                    "logprob_paris": true.logprob,
                    "logprob_chicago": false.logprob,
                    "rank_paris": true.rank,
                    "rank_chicago": false.rank,
                }
            )
    return pd.DataFrame(rows)


def _odds(table: Any) -> Any:
    """Return the log-odds of Chicago against Paris in every row, in nats."""
    return table.logprob_chicago - table.logprob_paris


def _shifts(table: Any) -> Any:
    """Return each model's largest log-odds of Chicago after a context minus those without one."""
    odds = table.assign(odds=_odds(table))
    plain = odds[odds.context == "question alone"].set_index("model").odds
    return odds[odds.context != "question alone"].groupby("model").odds.max() - plain


def draw_answers(table: pd.DataFrame, settings: AnswerSettings) -> Figure:
    """Draw the log-odds of Chicago against Paris by context, with the answer next to each bar."""
    models = list(table["model"].unique())
    prompts = table.drop_duplicates("context")["prompt"]
    texts = [
        textwrap.fill(prompt.removesuffix(QUESTION).strip() or "(the question alone)", 36)
        for prompt in prompts
    ]
    lines = max(text.count("\n") + 1 for text in texts)
    row = max(0.24 * len(models), 0.12 * lines) + 0.12  # inches: one answer per bar, or the context
    with plots.canvas(width=plots.PAGE, height=row * len(texts) + 1.1) as (figure, (axes,)):
        for i, model in enumerate(models):
            rows = table[table["model"] == model]
            odds = _odds(rows)
            step = 0.8 / len(models)
            places = [k + (i + 0.5) * step - 0.4 for k in range(len(rows))]
            colour, _ = plots.series(i)
            axes.barh(places, odds, height=step * 0.9, color=colour, label=plots.escape(model))
            for place, end, text in zip(places, odds, rows["answer"], strict=True):
                axes.annotate(
                    f'"{text}"',
                    (max(end, 0), place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    parse_math=False,
                )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(texts)), texts, fontsize=7.5, parse_math=False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.25)
        axes.set_xlabel("log P(Chicago) - log P(Paris), nats; in quotes: the answer")
        axes.set_title(f'Context before "{QUESTION}"', fontsize=9, loc="left")
        plots.legend_below(figure, [axes])
        return figure


ANALYSES = (
    Analysis(
        id="fig1",
        settings={"quick": AnswerSettings(), "full": AnswerSettings()},
        ours=("contexts", "tokens"),
        run=answers,
        draw=draw_answers,
        checks=(
            below(
                "without a context every model prefers Paris (largest log-odds of Chicago, nats)",
                lambda t: exact(_odds(t[t.context == "question alone"]).max()),
                0.0,
            ),
            above(
                "the paper's sentence raises the odds of Chicago in every model (smallest shift, "
                "nats)",
                lambda t: exact(
                    _shifts(t[t.context.isin(["question alone", "one sentence"])]).min()
                ),
                0.0,
            ),
            above(
                "in every model some context raises the odds of Chicago (smallest over models of "
                "the largest shift, nats)",
                lambda t: exact(_shifts(t).min()),
                0.0,
            ),
            above(
                "after some context some model prefers Chicago (largest log-odds, nats)",
                lambda t: exact(_odds(t[t.context != "question alone"]).max()),
                0.0,
            ),
        ),
    ),
)
