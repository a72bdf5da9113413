"""How dose curves of language models are drawn: efficacy by dose, and by the size of the model."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from hijacklens import plots
from hijacklens.prompts.schemes import get_scheme
from hijacklens.statistics import Interval, fraction

LINE = 46
"""Characters in a line of a title, where two panels share the width of a page."""
POINTS: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.2, "capsize": 2}
Efficacy: TypeAlias = Mapping[tuple[Any, ...], Interval]
"""By scheme, relation, model and dose."""


def draw_doses(
    verdicts: pd.DataFrame, *, schemes: Sequence[str], relations: Sequence[str], rule: str
) -> Figure:
    """Efficacy against the dose with Wilson intervals over facts, a panel per scheme and relation.

    Models stand side by side at a dose, so that equal values stay visible. Of several models, as
    many panels follow of efficacy against the number of their weights, at the least dose above 0
    (hollow) and at the largest (filled), with the number of layers below each size.

    Args:
        verdicts: A row per model, scheme, relation, fact and dose, with `wins` and `ties` (0 or 1)
            and the `layers` and `parameters` of the model.
        schemes: Names of schemes, with a panel for each relation.
        relations: Ids of relations; `all` pools them.
        rule: By which targets were scored, for the label of the axis.
    """
    cells = [(scheme, relation) for scheme in schemes for relation in relations]
    keys = ["scheme", "relation", "model", "dose"]
    groups: Any = verdicts.groupby(keys)["wins"]
    found: Any = {key: fraction(int(wins.sum()), len(wins)) for key, wins in groups}
    models = verdicts.drop_duplicates("model")
    doses = sorted(int(dose) for dose in verdicts["dose"].unique())
    by_size = len(models) > 1 and max(doses) > 0
    label = f"efficacy score, rule {rule}\n(share with false > true)"
    with _axes(len(cells), by_size=by_size) as (figure, axes):
        curves, sizes = axes[: len(cells)], axes[len(cells) :]
        for panel, cell in zip(curves, cells, strict=True):
            _draw_curves(panel, found, cell, models, doses)
            panel.set_title(_title(verdicts, *cell), fontsize=8.5)
        plots.label_outer(curves, x="dose (sentences)", y=label)
        if by_size:
            ends = sorted({next(dose for dose in doses if dose > 0), doses[-1]})
            for panel, cell in zip(sizes, cells, strict=True):
                _draw_sizes(panel, found, cell, models, ends)
                panel.set_title(f"{_sentence(*cell)}\n{_place(cell[1])}, by size", fontsize=8.5)
            plots.label_outer(sizes, x="weights (log scale); layers", y=label)
        # Curves that all stay low get an axis of their own; a marker at 0 or 1 stays whole.
        highest = max((interval.high for interval in found.values()), default=1.0)
        top = 1.0 if highest > 0.7 else 1.1 * highest
        axes[0].set_ylim(-0.05 * top, 1.05 * top)
        plots.legend_below(figure, axes, bars="95% Wilson intervals over facts", columns=4)
        return figure


@contextmanager
def _axes(count: int, *, by_size: bool) -> Iterator[tuple[Figure, list[Axes]]]:
    """The panels of the curves, then as many for the sizes, which stand beside or below them."""
    if not by_size or count == 1:
        with plots.panels(count + by_size, height=2.9, share_y=True) as found:
            yield found
        return
    rows = -(-count // 2)
    with plots.canvas(2 * rows, 2, width=plots.PAGE / 2, height=2.2, share_y=True) as (
        figure,
        all_,
    ):
        for start in (0, 2 * rows):
            for blank in all_[start + count : start + 2 * rows]:
                blank.set_axis_off()
        yield figure, all_[:count] + all_[2 * rows : 2 * rows + count]


def _draw_curves(
    panel: Axes, found: Efficacy, cell: tuple[str, str], models: pd.DataFrame, doses: Sequence[int]
) -> None:
    for i, name in enumerate(models["model"]):
        keys = {dose: (*cell, name, dose) for dose in doses}
        own = {dose: found[key] for dose, key in keys.items() if key in found}
        colour, marker = plots.series(i)
        panel.errorbar(
            [dose + 0.12 * _aside(i, len(models)) for dose in own],
            [interval.value for interval in own.values()],
            yerr=plots.whiskers(list(own.values())),
            color=colour,
            marker=marker,
            label=name,
            **POINTS,
        )
    panel.set_xticks(doses)


def _draw_sizes(
    panel: Axes, found: Efficacy, cell: tuple[str, str], models: pd.DataFrame, ends: Sequence[int]
) -> None:
    weights = models["parameters"].astype(float)
    span = max(2.0, weights.max() / weights.min())
    # Models of one size, and the doses of a model, stand side by side.
    alike: Any = models.groupby("parameters")["model"]
    places = zip(weights, alike.cumcount(), alike.transform("size"), strict=True)
    for i, (name, (weight, k, count)) in enumerate(zip(models["model"], places, strict=True)):
        colour, marker = plots.series(i)
        for side, dose in enumerate(ends):
            if (interval := found.get((*cell, name, dose))) is None:
                continue
            aside = 0.05 * _aside(k, count) + 0.02 * _aside(side, len(ends))
            panel.errorbar(
                [weight * span**aside],
                [interval.value],
                yerr=plots.whiskers([interval]),
                linestyle="none",
                color=colour,
                marker=marker,
                markerfacecolor=colour if dose == ends[-1] else "white",
                **POINTS,
            )
    panel.set_xscale("log")
    panel.set_xlim(weights.min() / span**0.15, weights.max() * span**0.15)
    sizes = models.drop_duplicates(["parameters", "layers"]).sort_values("parameters")
    labels = [
        f"{_count(weight)}\n{layers} layers"
        for weight, layers in zip(sizes["parameters"], sizes["layers"], strict=True)
    ]
    # Sizes that are close have their labels on two levels.
    levels = ["\n\n" * (k % 2) if len(labels) > 2 else "" for k in range(len(labels))]
    texts = [level + text for level, text in zip(levels, labels, strict=True)]
    panel.set_xticks(sizes["parameters"].astype(float), texts, fontsize=7)
    panel.xaxis.set_minor_locator(NullLocator())
    for dose in ends:
        face = "#444444" if dose == ends[-1] else "white"
        label = f"by size: dose {dose}"
        panel.plot([], [], "o", color="#444444", markerfacecolor=face, markersize=4.5, label=label)


def _aside(i: int, count: int) -> float:
    """How far the i-th of several stands from their middle, in steps."""
    return i - (count - 1) / 2


def _title(verdicts: pd.DataFrame, scheme: str, relation: str) -> str:
    """The sentence, the relation, and how many facts and ties there are, over all doses."""
    own = verdicts[(verdicts["scheme"] == scheme) & (verdicts["relation"] == relation)]
    counts = own.groupby("model")["case_id"].nunique()
    ends = {counts.min(), counts.max()} if len(counts) else {0}
    n = " to ".join(str(count) for count in sorted(ends))
    ties = int(own["ties"].sum())
    tied = f"{ties or 'no'} {'tie' if ties == 1 else 'ties'}"
    return f"{_sentence(scheme, relation)}\n{_place(relation)}, n = {n}, {tied}"


def _sentence(scheme: str, relation: str) -> str:
    """The template of a scheme as it is read: `“Do not think of {false}.”`."""
    known = get_scheme(scheme)
    text = known.template or (known.templates or {}).get(relation)
    if text is None:
        return f"{scheme}: a sentence per relation"
    filled = re.sub(
        r"\{(\w+)\}", lambda m: f"{{{m[1].removeprefix('target_').replace('_', ' ')}}}", text
    )
    return textwrap.fill(f"“{filled}”", LINE)


def _place(relation: str) -> str:
    return "all relations" if relation == "all" else relation


def _count(weights: int) -> str:
    """A number of weights: `135M`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if weights >= unit:
            number = weights / unit
            return f"{number:.{1 if number < 10 else 0}f}{name}"
    return str(weights)
