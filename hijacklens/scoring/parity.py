"""Parity: how far two runs of the same facts agree, such as one in bfloat16 and one in float32.

Sixteen-bit weights and activations move scores by hundredths of a nat, so facts whose targets are
that close to each other change their verdict (false target wins, true target wins, tie). `compare`
lists them, under each rule, with both margins score(o_) - score(o*).

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
from hijacklens.results.provenance import Provenance
from hijacklens.results.result import Result
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
    """Two runs beside each other: a row per model, fact, scheme, dose and rule."""

    verdicts: pd.DataFrame
    """`model, case_id, scheme, dose, rule`, the margins `reference` and `other` and their
    `difference` in nats, and whether the verdict `flipped`."""
    runs: Mapping[str, tuple[ComparedModel, ...]]
    """The models of both runs, under `reference` and `other`."""
    provenance: Provenance
    figures: ClassVar = {"parity": {}}
    derived: ClassVar = {"summary.csv": "summary"}

    def to_dataframe(self) -> pd.DataFrame:
        """All rows."""
        return self.verdicts.copy()

    @property
    def flips(self) -> pd.DataFrame:
        """The rows whose verdict differs, those with the widest margin in the reference first."""
        rows = self.verdicts.loc[self.verdicts["flipped"]]
        widest = np.argsort(-np.abs(rows["reference"].to_numpy(dtype=float)), kind="stable")
        return rows.iloc[widest].reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """A row per model, scheme, dose and rule.

        Columns: `n`, `flipped` and its `share`, and of the differences of margins, in nats, the
        `median` and the `largest` without their sign.
        """
        table = self.verdicts.assign(size=self.verdicts["difference"].abs())
        groups = table.groupby(["model", "scheme", "dose", "rule"], sort=False)
        found = groups.agg(
            n=("flipped", "size"),
            flipped=("flipped", "sum"),
            median=("size", "median"),
            largest=("size", "max"),
        ).reset_index()
        found.insert(6, "share", found["flipped"] / found["n"])
        return found

    def plot(self, *, rule: Rule = "first") -> Figure:
        """Margins of both runs against each other; verdicts that differ stand out."""
        rows = self.verdicts[self.verdicts["rule"] == rule]
        with plots.canvas() as (figure, (ax,)):
            for label, flipped, i in (("same verdict", False, 0), ("another verdict", True, 1)):
                chosen = rows[rows["flipped"] == flipped]
                colour, marker = plots.series(i)
                ax.scatter(
                    chosen["reference"],
                    chosen["difference"],
                    s=14,
                    color=colour,
                    marker=marker,
                    label=f"{label} ({len(chosen)})",
                    linewidths=0,
                )
            # Between these lines and the axis a difference is as large as the margin.
            low, high = ax.get_xlim()
            ends = np.array([min(low, 0.0), 0.0, max(high, 0.0)])
            bottom, top = ax.get_ylim()
            ax.plot(ends, -ends, color="#888888", linewidth=0.8, linestyle=":", label="margin gone")
            ax.set_xlim(low, high)
            ax.set_ylim(bottom, top)
            ax.set_xlabel(f"margin in the reference, nats (rule: {rule})")
            ax.set_ylabel("margin in the other run, minus that")
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
    """Which verdicts of a run differ from those of a reference run on the same facts.

    Args:
        reference: The run that counts as right, such as one in float32.
        other: The same models, facts, schemes and doses, in another dtype or on another device.

    Raises:
        InputError: The runs have not the same items, or probes in another order.
    """
    left, right = (result.items.set_index(list(KEYS)).sort_index() for result in (reference, other))
    if reference.settings.probes != other.settings.probes:
        raise InputError("the two runs had different probes on; compare runs with the same.")
    if not left.index.equals(right.index):
        apart = left.index.symmetric_difference(right.index)
        first = dict(zip(KEYS, apart[0], strict=True))
        raise InputError(
            f"the two runs do not hold the same items: {len(apart)} are in one of them only, such "
            f"as {first}. Score the same models, facts, schemes and doses in both."
        )
    parts = []
    for rule in RULES:
        here, there = margin(left, rule), margin(right, rule)
        table = left.index.to_frame(index=False).assign(rule=rule)
        table["reference"], table["other"] = here.to_numpy(), there.to_numpy()
        table["difference"] = table["other"] - table["reference"]
        table["flipped"] = np.sign(table["reference"]) != np.sign(table["other"])
        parts.append(table)
    runs = {
        name: tuple(
            ComparedModel(
                **{item.name: getattr(model, item.name) for item in fields(ComparedModel)}
            )
            for model in run.settings.models
        )
        for name, run in (("reference", reference), ("other", other))
    }
    return Parity(pd.concat(parts, ignore_index=True), runs, Provenance.now())
