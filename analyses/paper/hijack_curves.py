"""Figures 2a, 2b and B.1 to B.4: context hijacking of language models.

Efficacy is the fraction of facts with score(o_) > score(o*). Hijacking raises it and reverse
hijacking lowers it (some summaries of the paper have the opposite sign). We do not know by which
rule the paper scores a target of several tokens. Figures and checks use `first`; tables have the
margin by every rule, and if targets have several tokens a check tests whether the rules agree.

All doses score the same facts, so changes between doses are paired. If several models are named,
each figure shows all of them against the dose, and more than two against their size as well. Checks
on figures with several relations pool them if their claim says so.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analyses.paper.example_answers import size_of
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import FEW, Check, above, below, highest, lowest, mean, paired
from analyses.reproduction.drawing import WILSON, draw_intervals, sideways
from analyses.reproduction.settings import scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.prompts.schemes import get_scheme
from hijacklens.scoring.efficacy import RULES, Rule, margin
from hijacklens.scoring.hijack import hijack
from hijacklens.statistics import Interval, clustered, fraction

RULE: Rule = "first"
"""The scoring rule of the figures."""
LINE = 46
"""Characters in a line of a title, for two panels across a page."""
POINTS: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.2, "capsize": 2}
MARGINS: dict[Rule, str] = {rule: f"margin_{rule}" for rule in RULES}
SIZE = ("layers", "parameters")
COLUMNS = (
    "kind",
    "model",
    *SIZE,
    "scheme",
    "relation",
    "relation_id",
    "case_id",
    "dose",
    *MARGINS.values(),
    "reason",
)
Efficacy: TypeAlias = Mapping[tuple[Any, ...], Interval]
"""Efficacy by scheme, relation, model and dose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSettings:
    """Figures 2 and B: a panel per scheme and relation."""

    schemes: tuple[str, ...]
    relations: tuple[str, ...]
    """One panel each; `all` pools the facts of every relation."""
    limit: int | None = None
    """Facts per panel, a seeded sample; None for all facts."""
    doses: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    seed: int = 0


def curves(settings: CurveSettings, bench: Workbench) -> pd.DataFrame:
    """Return the margin of every fact at every dose, and the facts that could not be scored.

    Rows of kind

    - `item`: a model, scheme, panel (`relation`), fact and dose, with the margin
      score(o_) - score(o*) in nats by each rule: `margin_first`, `margin_sum`, `margin_mean`. The
      false target wins if the margin is above 0; 0 is a tie. A model knows a fact by a rule if the
      margin at dose 0 is below 0, so the table needs no column for retention.
    - `skipped`: a fact that a scheme could not score at every dose, with the `reason`. The scheme
      `all` marks facts that no scheme could score.

    `layers` and `parameters`, the number of weights, give the size of the model.
    """
    parts = []
    for name in dict.fromkeys(bench.models):
        model = bench.language_model(name)
        size = size_of(model)
        for relation in settings.relations:
            facts = bench.scored if relation == "all" else bench.scored.where(relation=relation)
            result = hijack(
                model,
                facts.limit(settings.limit, seed=settings.seed),
                schemes=settings.schemes,
                doses=settings.doses,
                seed=settings.seed,
                quiet=bench.quiet,
            )
            items = result.to_dataframe()
            scored = items[["scheme", "relation_id", "case_id", "dose"]].assign(
                kind="item", **{name: margin(items, rule) for rule, name in MARGINS.items()}
            )
            skipped = result.skipped[["scheme", "relation_id", "case_id", "reason"]].assign(
                kind="skipped"
            )
            parts += [
                rows.assign(model=name, relation=relation, **size)
                for rows in (scored, skipped)
                if len(rows)
            ]
    table = pd.concat(parts, ignore_index=True).reindex(columns=list(COLUMNS))
    return table.astype({"case_id": "Int64", "dose": "Int64"})  # a skipped fact has no dose


def verdicts(table: pd.DataFrame, rule: Rule = RULE) -> pd.DataFrame:
    """Return the items of `curves` with `wins` (of the false target) and `ties`, 0 or 1."""
    items = table[table["kind"] == "item"].drop(columns="reason")
    margins = items[MARGINS[rule]]
    return items.assign(
        dose=items["dose"].astype(int),
        wins=(margins > 0).astype(float),
        ties=(margins == 0).astype(float),
    )


def draw_curves(table: pd.DataFrame, settings: CurveSettings) -> Figure:
    """Draw efficacy against the dose with Wilson intervals over facts.

    There is a panel per scheme and relation. Models are side by side at a dose, so that equal
    values stay visible. With more than two models, a second panel per scheme and relation shows
    efficacy against the number of weights, at the smallest dose above 0 (hollow) and at the largest
    (filled), with the number of layers below each size.
    """
    items = verdicts(table)
    cells = list(product(settings.schemes, settings.relations))
    keys = ["scheme", "relation", "model", "dose"]
    groups: Any = items.groupby(keys)["wins"]
    efficacy: Any = {key: fraction(int(wins.sum()), len(wins)) for key, wins in groups}
    models = items.drop_duplicates("model")
    doses = sorted(int(dose) for dose in items["dose"].unique())
    by_size = len(models) > 2 and max(doses) > 0
    label = f"efficacy score, rule {RULE}\n(fraction with false > true)"
    grid = plots.panels(len(cells), height=2.9, share_y=True)
    if by_size:  # a row per cell, with its sizes on the right
        grid = plots.canvas(len(cells), 2, width=plots.PAGE / 2, height=2.4, share_y=True)
    with grid as (figure, axes):
        curves, sizes = (axes[::2], axes[1::2]) if by_size else (axes, [])
        for panel, cell in zip(curves, cells, strict=True):
            _draw_curves(panel, efficacy, cell, models, doses)
            panel.set_title(_title(items, *cell), fontsize=8.5)
        plots.label_outer(curves, x="dose (sentences)", y=label)
        if by_size:
            ends = sorted({next(dose for dose in doses if dose > 0), doses[-1]})
            for panel, cell in zip(sizes, cells, strict=True):
                _draw_sizes(panel, efficacy, cell, models, ends)
                title = f"{_sentence(*cell)}\n{_relation(cell[1])}, by size"
                panel.set_title(title, fontsize=8.5)
            plots.label_outer(sizes, x="weights (log scale); layers", y=label)
        # Low curves get a shorter axis; the margins keep markers at 0 or 1 from being clipped.
        highest = max((interval.high for interval in efficacy.values()), default=1.0)
        top = 1.0 if highest > 0.7 else 1.1 * highest
        axes[0].set_ylim(-0.05 * top, 1.05 * top)
        plots.legend_below(figure, axes, bars=f"{WILSON} over facts", columns=4)
        return figure


def _draw_curves(
    panel: Axes,
    efficacy: Efficacy,
    cell: tuple[str, str],
    models: pd.DataFrame,
    doses: Sequence[int],
) -> None:
    for i, name in enumerate(models["model"]):
        keys = {dose: (*cell, name, dose) for dose in doses}
        curve = {dose: efficacy[key] for dose, key in keys.items() if key in efficacy}
        x = [dose + 0.12 * sideways(i, len(models)) for dose in curve]
        draw_intervals(panel, x, curve.values(), i, label=plots.escape(name), **POINTS)
    panel.set_xticks(doses)


def _draw_sizes(
    panel: Axes,
    efficacy: Efficacy,
    cell: tuple[str, str],
    models: pd.DataFrame,
    ends: Sequence[int],
) -> None:
    weights = models["parameters"].astype(float)
    span = max(2.0, weights.max() / weights.min())
    # Models of one size are side by side, and so are the doses of a model.
    same_size: Any = models.groupby("parameters")["model"]
    places = zip(weights, same_size.cumcount(), same_size.transform("size"), strict=True)
    for i, (name, (weight, k, count)) in enumerate(zip(models["model"], places, strict=True)):
        for side, dose in enumerate(ends):
            if (interval := efficacy.get((*cell, name, dose))) is None:
                continue
            shift = 0.05 * sideways(k, count) + 0.02 * sideways(side, len(ends))
            face = plots.series(i)[0] if dose == ends[-1] else "white"
            style = {"linestyle": "none", "markerfacecolor": face, **POINTS}
            draw_intervals(panel, [weight * span**shift], [interval], i, **style)
    panel.set_xscale("log")
    panel.set_xlim(weights.min() / span**0.15, weights.max() * span**0.15)
    sizes = models.drop_duplicates(["parameters", "layers"]).sort_values("parameters")
    # The labels of close sizes alternate between two levels.
    labels = [
        ("\n\n" * (k % 2) if len(sizes) > 2 else "") + f"{_count(weight)}\n{layers} layers"
        for k, (weight, layers) in enumerate(zip(sizes["parameters"], sizes["layers"], strict=True))
    ]
    panel.set_xticks(sizes["parameters"].astype(float), labels, fontsize=7)
    panel.xaxis.set_minor_locator(NullLocator())
    for dose in ends:
        face = "#444444" if dose == ends[-1] else "white"
        label = f"by size: dose {dose}"
        panel.plot([], [], "o", color="#444444", markerfacecolor=face, markersize=4.5, label=label)


def _title(verdicts: pd.DataFrame, scheme: str, relation: str) -> str:
    """Return the sentence, the relation, and the numbers of facts and ties, over all doses."""
    rows = verdicts[(verdicts["scheme"] == scheme) & (verdicts["relation"] == relation)]
    counts = rows.groupby("model")["case_id"].nunique()
    ends = {counts.min(), counts.max()} if len(counts) else {0}
    n = " to ".join(str(count) for count in sorted(ends))
    ties = int(rows["ties"].sum())
    tied = f"{ties or 'no'} {'tie' if ties == 1 else 'ties'}"
    return f"{_sentence(scheme, relation)}\n{_relation(relation)}, n = {n}, {tied}"


def _sentence(scheme: str, relation: str) -> str:
    """Return the template of a scheme in words: `“Do not think of {false}.”`."""
    known = get_scheme(scheme)
    text = known.template or (known.templates or {}).get(relation)
    if text is None:
        return f"{scheme}: a sentence per relation"
    filled = re.sub(
        r"\{(\w+)\}", lambda m: f"{{{m[1].removeprefix('target_').replace('_', ' ')}}}", text
    )
    return textwrap.fill(f"“{filled}”", LINE)


def _relation(relation: str) -> str:
    return "all relations" if relation == "all" else relation


def _count(weights: int) -> str:
    """Return a number of weights in short: `135M`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if weights >= unit:
            number = weights / unit
            return f"{number:.{1 if number < 10 else 0}f}{name}"
    return str(weights)


def dose_change(verdicts: Any, start: int, end: int) -> list[Interval]:
    """Return the change of efficacy between two doses, paired over facts, per model and scheme.

    The panel `all` is about relations like these, so its interval is clustered by relation.
    Relations with panels are the ones that the claim names, so the interval is about these facts:
    Student's t, extended to 0 if McNemar's exact test finds no change at .05.

    Args:
        verdicts: A row per `model`, `scheme`, `relation`, `case_id` and `dose`, with `wins`, 0 or
            1. Facts of all relations are pooled.
        start: The dose that is subtracted.
        end: The dose from whose efficacy it is subtracted.

    Returns:
        Mean differences in -1..1 with their 95% intervals; none if a dose was not run at all.
    """
    keys = ["model", "scheme", "relation", "relation_id", "case_id"]
    ids = verdicts.get("relation_id", verdicts["relation"])  # earlier tables lack it
    named = verdicts.assign(relation_id=ids.where(ids.notna(), verdicts["relation"]))
    changes = paired(named, "wins", keys, dose=(end, start))
    return [_change(of_run) for _, of_run in changes.groupby(["model", "scheme"])]


def _change(changes: Any) -> Interval:
    values = changes.to_numpy(dtype=float)
    if set(changes.index.get_level_values("relation")) == {"all"}:
        return clustered(values, changes.index.get_level_values("relation_id").to_numpy(str))
    found = mean(values)
    if clustered(values).p < 0.05:
        return found
    return Interval(found.value, min(found.low, 0.0), max(found.high, 0.0))


def moves(
    claim: str,
    doses: tuple[int, int],
    *,
    up: bool,
    rules: Sequence[Rule] = (RULE,),
    only: Mapping[str, str] | None = None,
    about: str = "these facts",
    **more: Any,
) -> Check:
    """Claim that efficacy rises (`up`) or falls between two doses, in every model.

    Args:
        claim: How the claim begins.
        doses: The first and the second dose.
        up: Whether efficacy rises.
        rules: Scoring rules; the claim must hold by each.
        only: Entries to which the claim is restricted, such as `{"relation": "P190"}`.
        about: The estimand: `these facts`, or `relations like these` for the panel `all`.
        **more: Other fields of a `Check`.
    """

    def measure(rows: Any) -> Interval:
        for column, entry in (only or {}).items():
            rows = rows[rows[column] == entry]
        changes = [change for rule in rules for change in dose_change(verdicts(rows, rule), *doses)]
        return (lowest if up else highest)(changes)

    make = above if up else below
    return make(f"{claim}, in every model (paired; {about})", measure, 0.0, **more)


RELATIONS = ("P103", "P131", "P190", "P641")
RISES = "one sentence raises efficacy"
FALLS = "one sentence of the reverse lowers efficacy"
GROWS = "five sentences raise efficacy above one sentence"
SINKS = "five sentences of the reverse lower efficacy below one sentence"
BY_RULES = "by each of the three rules"


def _curve(name: str, scheme: str, relations: tuple[str, ...], *, quick: int) -> Analysis:
    """Return the analysis of one scheme, or of a reverse, whose name ends with `-true`.

    Several relations are pooled and also checked one by one. `quick` is the number of facts per
    panel at quick scale.
    """
    up = not scheme.endswith("-true")
    pooled, each = (", relations pooled", relations) if len(relations) > 1 else ("", ())
    about = "relations like these" if relations == ("all",) else "these facts"
    named = "".join(f"{name}: " for name in relations if name != "all" and not each)
    one, five = (named + claim for claim in ((RISES, GROWS) if up else (FALLS, SINKS)))
    checks = (
        moves(one + pooled, (0, 1), up=up, about=about),
        moves(f"{one} {BY_RULES}{pooled}", (0, 1), up=up, rules=RULES, about=about),
        moves(five + pooled, (1, 5), up=up, about=about, **FEW),
        *(
            moves(f"{relation}: {one}", (0, 1), up=up, only={"relation": relation}, **FEW)
            for relation in each
        ),
    )
    return _analysis(name, (scheme,), relations, quick=quick, checks=checks)


def _analysis(
    name: str,
    schemes: tuple[str, ...],
    relations: tuple[str, ...],
    *,
    quick: int,
    checks: tuple[Check, ...],
) -> Analysis:
    return Analysis(
        id=name,
        settings=scales(CurveSettings(schemes=schemes, relations=relations), limit=quick),
        ours=("limit", "seed", "doses"),
        run=curves,
        draw=draw_curves,
        checks=checks,
    )


NEAR, REVERSE = {"scheme": "near-word"}, {"scheme": "near-word-true"}

ANALYSES = (
    _curve("fig2a", "do-not-think", ("all",), quick=120),
    _curve("figb1", "do-not-think-true", ("all",), quick=120),
    _curve("fig2b", "relation", ("P190",), quick=40),
    _curve("figb2", "relation", RELATIONS, quick=25),
    _curve("figb3", "relation-true", RELATIONS, quick=25),
    # The targets are languages, of one token each in the packaged models: the rules cannot differ.
    _analysis(
        "figb4",
        ("near-word", "near-word-true"),
        ("P1412",),
        quick=40,
        checks=(
            moves(f"near-word: {RISES}", (0, 1), up=True, only=NEAR),
            moves(f"near-word: {GROWS}", (1, 5), up=True, only=NEAR, **FEW),
            moves(f"near-word: {FALLS}", (0, 1), up=False, only=REVERSE, **FEW),
            moves(f"near-word: {SINKS}", (1, 5), up=False, only=REVERSE, **FEW),
        ),
    ),
)
