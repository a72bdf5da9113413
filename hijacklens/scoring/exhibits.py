"""What a report shows of a hijack run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hijacklens.results.exhibits import Drawing, Exhibit, Facts, Table, Text
from hijacklens.scoring.efficacy import ALL, RULES, Rule

if TYPE_CHECKING:
    from hijacklens.scoring.result import HijackResult

PANELS = 2
"""Panels of a drawing: more would be too small to read on a laptop."""
MEANING = {
    "efficacy": "the share of facts with score(false) > score(true): hijacking raises it. "
    "Some summaries of the paper say that it lowers ES: they mean retention.",
    "retention": "the share of facts with score(true) > score(false). Ties are counted by "
    "themselves.",
    "95% interval": "Wilson's, over the facts; the band around a curve and the two columns behind "
    "efficacy.",
    "rule": "how a target is scored: by its first token, the sum over its tokens, or their mean.",
    "known": "the facts whose true target wins on the bare query, under the same rule.",
    "shift": "score(false) - score(true), hijacked minus bare, in nats.",
}
DIFFER = {
    "any": "any two",
    "first_sum": "first and sum",
    "first_mean": "first and mean",
    "sum_mean": "sum and mean",
}
EACH = ("model", "scheme")


def hijack_exhibits(result: HijackResult) -> list[Exhibit]:
    """From top to bottom: what was asked, curves, summary, facts, rules, skipped facts."""
    summary = result.full_summary
    shown: list[Exhibit] = [_asked(result)]
    parts = _parts(result)
    for rule in RULES:
        shown.extend(_curves(parts, rule))
    labels = {"efficacy_low": "low", "efficacy_high": "high", "mean_shift": "shift (nats)"}
    shown.append(
        Table(
            "Efficacy and retention",
            summary,
            note="Choose a relation, a rule, or the facts that the model knows.",
            file="summary.csv",
            filters=(*EACH, "dose", "rule", "relation", "facts"),
            chosen={"rule": RULES[0], "relation": ALL, "facts": ALL},
            labels=labels,
        )
    )
    shown.append(Facts("Facts before and after", result.items, result.prompts))
    shown.append(
        Table(
            "How often the rules differ",
            result.disagreement(),
            note="The share of facts on which the three rules, or two of them, do not give the "
            "same verdict.",
            file="rules.csv",
            filters=EACH,
            shares=tuple(DIFFER),
            labels=DIFFER,
            folded=True,
        )
    )
    if len(result.skipped):
        shown.append(
            Table(
                "Facts that could not be scored",
                result.skipped,
                file="skipped.csv",
                filters=EACH,
                folded=True,
            )
        )
    return shown


def _asked(result: HijackResult) -> Text:
    """The run in words, its sentences, and what the numbers mean."""
    settings = result.settings
    models = ", ".join(model["name"] for model in settings["models"])
    doses = ", ".join(str(dose) for dose in settings["doses"] if dose)
    facts = result.items["case_id"].nunique()
    sentences = [
        f"{models} completed {facts} facts of {settings['facts']['name']}, bare (dose 0) and "
        f"behind hijacking sentences, {doses} of them (the dose)."
    ]
    if settings["probes"]:
        sentences.append(f"Probes changed the models: {', '.join(settings['probes'])}.")
    if settings["facts"].get("note"):
        sentences.append(f"The facts: {settings['facts']['note'].rstrip('.')}.")
    points = []
    for scheme in settings["schemes"]:
        texts = scheme["text"]
        listed = [texts] if isinstance(texts, str) else list(dict.fromkeys(texts.values()))
        more = f" and {len(listed) - 1} more, by relation" if len(listed) > 1 else ""
        points.append(f"{scheme['name']}: “{listed[0]}”{more}" if listed else scheme["name"])
    return Text("What was asked", sentences, points, MEANING)


def _parts(result: HijackResult) -> list[HijackResult]:
    """The run, a few models at a time where each has a panel."""
    models = list(result.items["model"].unique())
    if len(models) <= PANELS or result.items["scheme"].nunique() == 1:
        return [result]
    starts = range(0, len(models), PANELS)
    few = [result.items["model"].isin(models[start : start + PANELS]) for start in starts]
    return [replace(result, items=result.items[rows]) for rows in few]


def _curves(parts: Sequence[HijackResult], rule: Rule) -> list[Drawing]:
    """The curves under a rule; those of the first rule are open."""
    drawn = []
    for part in parts:
        of = f" ({', '.join(part.items['model'].unique())})" if len(parts) > 1 else ""
        drawn.append(
            Drawing(
                f"Efficacy by dose, rule {rule}{of}",
                part.plot(rule=rule),
                alt=_described(part, rule),
                folded=rule != RULES[0],
            )
        )
    return drawn


def _described(result: HijackResult, rule: Rule) -> str:
    """The curves in words: efficacy at the lowest and the highest dose."""
    lines = []
    groups: Any = result.summary(rule=rule).groupby(list(EACH), sort=False)
    for (model, scheme), group in groups:
        rows = group.sort_values("dose")
        ends = [rows.iloc[i] for i in (0, -1)]
        words = [f"{end['efficacy']:.3f} at dose {end['dose']}" for end in ends]
        lines.append(f"{model}, {scheme}: {' to '.join(words)}")
    return (
        f"Curves of efficacy (rule {rule}) against dose with 95% intervals. {'; '.join(lines)}. "
        "The table below has all values."
    )
