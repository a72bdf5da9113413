"""Figure 1 over facts: how often a target becomes the most likely next token after one sentence.

The paper's figure 1 shows single prompts after which a model answers the false target. Here the
same is counted over facts, with the generic sentence "Do not think of {o_}.".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.paper.example_answers import size_of
from analyses.reproduction.analysis import Analysis
from analyses.reproduction.check import Check, above, below, highest, lowest, mean, paired
from analyses.reproduction.drawing import WILSON, draw_intervals, draw_panels, sideways
from analyses.reproduction.settings import scales
from analyses.reproduction.workbench import Workbench
from hijacklens import plots
from hijacklens.scoring.hijack import hijack
from hijacklens.statistics import fraction

SCHEME = "do-not-think"
TARGETS = ("true", "false")
SAME = 1e-6
"""Nats below the most likely token within which a target's first token is that token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelySettings:
    """Figure 1 over facts."""

    limit: int | None = None
    """Number of facts, a seeded sample; None for all facts."""
    doses: tuple[int, ...] = (0, 1)
    seed: int = 0


def most_likely(settings: LikelySettings, bench: Workbench) -> pd.DataFrame:
    """Return for every fact and dose whether the first token of a target is the most likely one.

    Columns: `model`, `layers`, `parameters`, `relation_id`, `case_id`, `dose`, and `true` and
    `false`, 0 or 1.
    """
    parts = []
    for name in dict.fromkeys(bench.models):
        model = bench.language_model(name)
        result = hijack(
            model,
            bench.scored.limit(settings.limit, seed=settings.seed),
            schemes=[SCHEME],
            doses=settings.doses,
            seed=settings.seed,
            quiet=bench.quiet,
        )
        items = result.to_dataframe()
        likely = {
            target: (items["top_logprob"] - items[f"first_{target}"] <= SAME).astype(int)
            for target in TARGETS
        }
        rows = items[["relation_id", "case_id", "dose"]]
        parts.append(rows.assign(model=name, **size_of(model), **likely))
    return pd.concat(parts, ignore_index=True)


def draw_most_likely(table: pd.DataFrame, settings: LikelySettings) -> Figure:
    """Draw the fractions of facts by dose: a panel for the true and one for the false target."""
    models = list(table["model"].unique())
    long = table.melt(["model", "dose"], list(TARGETS), "target", "likely")

    def draw(panel: Axes, rows: Any, entry: Any) -> None:
        for i, model in enumerate(models):
            groups = rows[rows["model"] == model].groupby("dose")["likely"]
            bars = [fraction(int(likely.sum()), len(likely)) for _, likely in groups]
            x = [int(dose) + 0.12 * sideways(i, len(models)) for dose, _ in groups]
            draw_intervals(panel, x, bars, i, label=plots.escape(model), capsize=2, markersize=4)
        panel.set_xticks(settings.doses)
        panel.set_ylim(bottom=0)

    return draw_panels(
        long,
        draw,
        by="target",
        title="most likely next token: the {} target's first",
        x="dose (sentences)",
        y="fraction of facts",
        legend={"bars": f"{WILSON} over facts", "columns": 3},
    )


def _claim(make: Any, verb: str, target: str) -> Check:
    """Claim that one sentence makes a target the most likely token more or less often."""

    def measure(table: Any) -> Any:
        changes = paired(table, target, ["model", "relation_id", "case_id"], dose=(1, 0))
        changes = changes.rename("change").reset_index()
        by_model = [
            mean(rows["change"], rows["relation_id"]) for _, rows in changes.groupby("model")
        ]
        return (lowest if make is above else highest)(by_model)

    return make(
        f"after one sentence the first token of the {target} target is the most likely one {verb} "
        "often, in every model (paired; relations like these)",
        measure,
        0.0,
    )


ANALYSES = (
    Analysis(
        id="fig1-facts",
        settings=scales(LikelySettings(), limit=120),
        ours=("limit", "doses", "seed"),
        run=most_likely,
        draw=draw_most_likely,
        checks=(_claim(above, "more", "false"), _claim(below, "less", "true")),
    ),
)
