"""Parity: how far two runs of the same facts agree, such as one in bfloat16 and one in float32.

Sixteen-bit weights and activations move scores by hundredths of a nat. Facts whose two targets are
that close change their verdict (false target wins, true target wins, tie). `compare` lists these
facts under each rule, with both margins score(o_) - score(o*).

    full = hl.hijack(hl.load_model("gpt2"), facts)
    half = hl.hijack(hl.load_model("gpt2", dtype="bfloat16"), facts)
    compare(full, half).flips
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.scoring.efficacy import RULES, Rule, margin
from hijacklens.scoring.result import HijackResult

KEYS = ("model", "case_id", "scheme", "dose")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModel:
    """A model in one of the two runs."""

    name: str
    dtype: str
    device: str
    revision: str | None
    weights_hash: str


@dataclass(frozen=True, eq=False)
class Parity(Result):
    """The verdicts of two runs: a row per model, fact, scheme, dose and rule."""

    verdicts: pd.DataFrame
    """`model, case_id, scheme, dose, rule`, the margins `reference` and `other` and their
    `difference` in nats, and whether the verdict `flipped`."""
    runs: Mapping[str, tuple[ComparedModel, ...]]
    """The models of both runs, under `reference` and `other`."""
    provenance: Provenance
    figures: ClassVar = {"parity": {}}
    derived: ClassVar = {"summary.csv": "summary"}

    def to_dataframe(self) -> pd.DataFrame:
        """Return all rows."""
        return self.verdicts.copy()

    @property
    def flips(self) -> pd.DataFrame:
        """The rows whose verdict differs, sorted by margin in the reference, widest first."""
        rows = self.verdicts.loc[self.verdicts["flipped"]]
        widest = np.argsort(-np.abs(rows["reference"].to_numpy(dtype=float)), kind="stable")
        return rows.iloc[widest].reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """Return a row per model, scheme, dose and rule.

        Columns: `n`; how many verdicts `flipped`, and their `share` of `n`; the `median` and the
        `largest` absolute difference of the margins, in nats.
        """
        table = self.verdicts.assign(size=self.verdicts["difference"].abs())
        groups = table.groupby(["model", "scheme", "dose", "rule"], sort=False)
        summary = groups.agg(
            n=("flipped", "size"),
            flipped=("flipped", "sum"),
            median=("size", "median"),
            largest=("size", "max"),
        ).reset_index()
        summary.insert(6, "share", summary["flipped"] / summary["n"])
        return summary

    def plot(self, *, rule: Rule = "first") -> Figure:
        """Draw the change of the margin against the margin; verdicts that differ are marked."""
        rows = self.verdicts[self.verdicts["rule"] == rule]
        with plots.canvas() as (figure, (ax,)):
            for label, flipped, i in (("same verdict", False, 0), ("another verdict", True, 1)):
                points = rows[rows["flipped"] == flipped]
                colour, marker = plots.series(i)
                style: Any = {"s": 14, "color": colour, "marker": marker, "linewidths": 0}
                label = f"{label} ({len(points)})"
                ax.scatter(points["reference"], points["difference"], label=label, **style)
            # On this line the difference is as large as the margin, so that the margin vanishes.
            low, high = ax.get_xlim()
            ends = np.array([min(low, 0.0), 0.0, max(high, 0.0)])
            bottom, top = ax.get_ylim()
            ax.plot(ends, -ends, color="#888888", linewidth=0.8, linestyle=":", label="margin gone")
            ax.set(
                xlim=(low, high), ylim=(bottom, top), ylabel="margin in the other run, minus that"
            )
            ax.set_xlabel(f"margin in the reference, nats (rule: {rule})")
            ax.legend(fontsize=8)
        return figure

    def glance(self) -> Glance:
        """The number of verdicts that differ, under each rule."""
        groups: Any = self.summary().groupby(["model", "rule"], sort=False)
        sums = {"n": "sum", "flipped": "sum", "largest": "max"}
        columns = {
            "model": "{model}",
            "rule": "{rule}",
            "items": "{n:d}",
            "verdicts that differ": "{flipped:d}",
            "largest difference (nats)": "{largest:.3g}",
        }
        return Glance(
            "two runs of the same facts, the first as the reference",
            (Grid.of(groups.agg(sums).reset_index(), columns),),
            steps=("flips", "summary()", "plot()", "save(folder)"),
        )

    def findings(self) -> dict[str, Any]:
        """Return the number of items, and how many verdicts differ under each rule."""
        rules = self.verdicts["rule"].to_numpy()
        flipped = self.verdicts["flipped"].to_numpy()
        return {
            "items": int(len(self.verdicts) / len(RULES)),
            "flipped": {rule: int((flipped & (rules == rule)).sum()) for rule in RULES},
        }


def compare(reference: HijackResult, other: HijackResult) -> Parity:
    """Return the verdicts of a run that differ from those of a reference run on the same facts.

    Args:
        reference: The run to compare with, such as one in float32.
        other: A run of the same models, facts, schemes and doses in another dtype or on another
            device.

    Raises:
        InputError: The runs have different items, or different probes.
    """
    left, right = (result.items.set_index(list(KEYS)).sort_index() for result in (reference, other))
    if reference.settings.probes != other.settings.probes:
        raise InputError("the two runs had different probes; compare runs with the same probes.")
    if not left.index.equals(right.index):
        unshared = left.index.symmetric_difference(right.index)
        first = dict(zip(KEYS, unshared[0], strict=True))
        raise InputError(
            f"the two runs do not hold the same items: {len(unshared)} are in one of them only, "
            f"such as {first}. Score the same models, facts, schemes and doses in both."
        )
    parts = []
    for rule in RULES:
        table = left.index.to_frame(index=False).assign(rule=rule)
        table["reference"], table["other"] = (margin(side, rule).array for side in (left, right))
        table["difference"] = table["other"] - table["reference"]
        table["flipped"] = np.sign(table["reference"]) != np.sign(table["other"])
        parts.append(table)
    names = [item.name for item in fields(ComparedModel)]
    models, other_models = (
        tuple(
            ComparedModel(**{name: getattr(model, name) for name in names})
            for model in run.settings.models
        )
        for run in (reference, other)
    )
    runs = {"reference": models, "other": other_models}
    return Parity(pd.concat(parts, ignore_index=True), runs, Provenance.now())
