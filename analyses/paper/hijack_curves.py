"""Figures 2a, 2b and B.1 to B.4: context hijacking of language models.

Efficacy is the share of facts with score(o_) > score(o*); hijacking raises it, reverse hijacking
lowers it (some summaries of the paper have the opposite sign). By which rule the paper scores a
target of several tokens is not known: figures and checks go by `first`, tables have the margin by
every rule, and where targets have several tokens a check asks whether the rules agree.

All doses score the same facts, so changes between doses are paired. Models that are named together
are drawn together, against the dose and against their size. Several relations in one figure are
pooled in the checks that say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.paper.dose_drawing import draw_doses
from analyses.paper.example_answers import FIGURE_1, size_of
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import Check, above, below, highest, lowest, mean
from analyses.reproduction.workbench import Workbench
from hijacklens.scoring.efficacy import RULES, Rule, margin
from hijacklens.scoring.hijack import hijack
from hijacklens.statistics import Interval

RULE: Rule = "first"
"""By which the figures are drawn."""


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


COLUMNS = (
    "kind",
    "model",
    "layers",
    "parameters",
    "scheme",
    "relation",
    "case_id",
    "dose",
    *(f"margin_{rule}" for rule in RULES),
    "reason",
)


def curves(settings: CurveSettings, bench: Workbench) -> pd.DataFrame:
    """How far every fact gives way at every dose, and the facts that could not be scored.

    Rows of kind

    - `item`: a model, scheme, panel (`relation`), fact and dose, with the margin
      score(o_) - score(o*) in nats by each rule: `margin_first`, `margin_sum`, `margin_mean`. The
      false target wins where it is above 0, and 0 is a tie. A model knows a fact by a rule where
      the margin at dose 0 is below 0, so retention of the known ones needs no column.
    - `skipped`: a fact that a scheme (or `all`) could not score at every dose, with the `reason`.

    `layers` and `parameters`, the number of weights, are the size of the model.
    """
    parts = []
    for name in dict.fromkeys(bench.models):
        model = bench.language_model(name)
        size = size_of(model)
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
            scored = items[["scheme", "case_id", "dose"]].assign(
                kind="item", **{f"margin_{rule}": margin(items, rule) for rule in RULES}
            )
            skipped = result.skipped[["scheme", "case_id", "reason"]].assign(kind="skipped")
            parts += [
                rows.assign(model=name, relation=relation, **size)
                for rows in (scored, skipped)
                if len(rows)
            ]
    table = pd.concat(parts, ignore_index=True).reindex(columns=list(COLUMNS))
    return table.astype({"case_id": "Int64", "dose": "Int64"})  # a skipped fact has no dose


def verdicts(table: pd.DataFrame, rule: Rule = RULE) -> pd.DataFrame:
    """The items of a table of `curves`, with `wins` (of the false target) and `ties`, 0 or 1."""
    items = table[table["kind"] == "item"].drop(columns="reason")
    margins = items[f"margin_{rule}"]
    return items.assign(
        dose=items["dose"].astype(int),
        wins=(margins > 0).astype(float),
        ties=(margins == 0).astype(float),
    )


def draw_curves(table: pd.DataFrame, settings: CurveSettings) -> Figure:
    """Efficacy by dose and, of several models, by their size, a panel per scheme and relation."""
    return draw_doses(
        verdicts(table), schemes=settings.schemes, relations=settings.relations, rule=RULE
    )


def dose_change(verdicts: Any, start: int, end: int) -> list[Interval]:
    """How efficacy changes between two doses, paired over facts: one per model and scheme.

    Args:
        verdicts: A row per `model`, `scheme`, `relation`, `case_id` and `dose`, with `wins`, 0 or
            1. Facts of all relations are pooled.
        start: A dose.
        end: Another; its efficacy minus that of `start` is what is measured.

    Returns:
        Mean differences in -1..1 with their 95% Student intervals; not a number where one of the
        doses was not run.
    """
    keys = ["model", "scheme", "relation", "case_id"]
    wide = verdicts.pivot(index=keys, columns="dose", values="wins").reindex(columns=[start, end])
    return [mean(own) for _, own in (wide[end] - wide[start]).groupby(["model", "scheme"])]


def moves(
    claim: str,
    start: int,
    end: int,
    *,
    up: bool,
    rules: Sequence[Rule] = (RULE,),
    scheme: str | None = None,
    relation: str | None = None,
    **more: Any,
) -> Check:
    """A claim that efficacy rises (`up`) or falls between two doses, in every model.

    Args:
        claim: How it begins.
        start: The dose before.
        end: The dose after.
        up: Whether it rises.
        rules: By every one of which it has to.
        scheme: The only scheme that it is about.
        relation: The only relation that it is about.
        **more: `scales` and `remark` of a `Check`.
    """

    def measure(table: Any) -> Interval:
        own = table
        for column, value in (("scheme", scheme), ("relation", relation)):
            own = own if value is None else own[own[column] == value]
        found = [
            change for rule in rules for change in dose_change(verdicts(own, rule), start, end)
        ]
        # With nothing scored there is no number, and no claim holds.
        return (lowest if up else highest)(found or [mean([])])

    make = above if up else below
    return make(f"{claim}, in every model (paired)", measure, 0.0, **more)


def _left_open(remark: str) -> dict[str, Any]:
    """Decided at the scale of the paper only, with the reason."""
    return {"scales": ("paper",), "remark": remark}


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


RELATIONS = ("P103", "P131", "P190", "P641")
SATURATED = (
    "the packaged models give way to one sentence, and the generic scheme hardly moves them further"
)
CEILING = "decided on all facts only: where one sentence turns nearly all, few are left to rise"
FLOOR = "decided on all facts only: where a model knows most of them, few verdicts are left to fall"
FEW = "decided on all facts only: growth beyond one sentence is small, and quick has few facts"
EACH = "decided on all facts only: at quick scale a relation has 25, too few by themselves"

RISES = "one sentence raises efficacy"
FALLS = "one sentence of the reverse lowers efficacy"
GROWS = "five sentences raise efficacy above one sentence"
SINKS = "five sentences of the reverse lower efficacy below one sentence"
BY_RULES = "by each of the three rules"
POOLED = "relations pooled"

ANALYSES = (
    FIGURE_1,
    _curve(
        "fig2a",
        schemes=("do-not-think",),
        relations=("all",),
        checks=(
            moves(RISES, 0, 1, up=True),
            moves(f"{RISES} {BY_RULES}", 0, 1, up=True, rules=RULES),
            moves(GROWS, 1, 5, up=True, **_left_open(SATURATED)),
        ),
        quick=120,
    ),
    _curve(
        "figb1",
        schemes=("do-not-think-true",),
        relations=("all",),
        checks=(
            moves(FALLS, 0, 1, up=False),
            moves(f"{FALLS} {BY_RULES}", 0, 1, up=False, rules=RULES),
            moves(SINKS, 1, 5, up=False, **_left_open(FLOOR)),
        ),
        quick=120,
    ),
    _curve(
        "fig2b",
        schemes=("relation",),
        relations=("P190",),
        checks=(
            moves(RISES, 0, 1, up=True),
            moves(f"{RISES} {BY_RULES}", 0, 1, up=True, rules=RULES),
            moves(GROWS, 1, 5, up=True, **_left_open(CEILING)),
        ),
        quick=40,
    ),
    _curve(
        "figb2",
        schemes=("relation",),
        relations=RELATIONS,
        checks=(
            moves(f"{RISES}, {POOLED}", 0, 1, up=True),
            moves(f"{RISES} {BY_RULES}, {POOLED}", 0, 1, up=True, rules=RULES),
            moves(f"{GROWS}, {POOLED}", 1, 5, up=True, **_left_open(FEW)),
            *(
                moves(f"{each}: {RISES}", 0, 1, up=True, relation=each, **_left_open(EACH))
                for each in RELATIONS
            ),
        ),
        quick=25,
    ),
    _curve(
        "figb3",
        schemes=("relation-true",),
        relations=RELATIONS,
        checks=(
            moves(f"{FALLS}, {POOLED}", 0, 1, up=False),
            moves(f"{FALLS} {BY_RULES}, {POOLED}", 0, 1, up=False, rules=RULES),
            moves(f"{SINKS}, {POOLED}", 1, 5, up=False, **_left_open(FLOOR)),
            *(
                moves(f"{each}: {FALLS}", 0, 1, up=False, relation=each, **_left_open(EACH))
                for each in RELATIONS
            ),
        ),
        quick=25,
    ),
    # The targets are languages, of one token each in the packaged models: the rules cannot differ.
    _curve(
        "figb4",
        schemes=("near-word", "near-word-true"),
        relations=("P1412",),
        checks=(
            moves("one near-word sentence raises efficacy", 0, 1, up=True, scheme="near-word"),
            moves(
                "five near-word sentences raise efficacy above one sentence",
                1,
                5,
                up=True,
                scheme="near-word",
                **_left_open(FEW),
            ),
            moves(
                "one sentence of its reverse lowers efficacy",
                0,
                1,
                up=False,
                scheme="near-word-true",
                **_left_open(FLOOR),
            ),
            moves(
                "five sentences of its reverse lower efficacy below one sentence",
                1,
                5,
                up=False,
                scheme="near-word-true",
                **_left_open(FLOOR),
            ),
        ),
        quick=40,
    ),
)
