"""Averages of shift accounts over many facts, aligned by span, as a result.

Every part is a mean over facts with its standard error and 95% interval, about relations like these
or, if the facts have one relation, about these facts (`hijacklens.statistics.independent`). Each
interval is for one part alone: among hundreds of heads some intervals exclude zero by chance. The
parts of every fact are kept for other analyses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from hijacklens.prompts.correspondence import SPANS
from hijacklens.results.exhibits import Drawing, Exhibit, Table, Text
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring.items import SkippedTable
from hijacklens.scoring.result import PairSettings
from hijacklens.statistics import Estimate, clustered, independent
from probes.account import PARTS, SINGLE
from probes.logit_shift.figures import READING, VALUES, check_axes, heat_map

MEANS = {"shift": "mean shift (logits)", "low": "95% low", "high": "95% high"}
PARTS_FILE = Stored("parts.npz")


@dataclass(frozen=True, eq=False, kw_only=True)
class AverageShift(Result):
    """What wrote the logit shift of many facts; made by `logit_shift.average`. Units: logits."""

    attention: Annotated[Float[np.ndarray, "fact span layer head"], PARTS_FILE]
    """Attended tokens summed by span, in the order of `SPANS` (results of earlier versions have no
    `opening`); without value biases."""
    value_bias: Annotated[Float[np.ndarray, "fact layer head"], PARTS_FILE]
    output_bias: Annotated[Float[np.ndarray, "fact layer"], PARTS_FILE]
    mlp: Annotated[Float[np.ndarray, "fact layer"], PARTS_FILE]
    single: Annotated[Float[np.ndarray, "fact part"], PARTS_FILE]
    """The parts of `probes.account.SINGLE`, in its order; folders of earlier versions lack the
    last, `other`."""
    facts: pd.DataFrame
    """A row per fact: case_id, relation_id, subject, bare, hijacked, shift, residual."""
    skipped: SkippedTable
    """Facts that could not be used: case_id, relation_id, subject, reason."""
    settings: PairSettings
    provenance: Provenance

    figures: ClassVar = {
        "span_layer": {"by": ("span", "layer")},
        "layer_head": {"by": ("layer", "head")},
    }
    derived: ClassVar = {"averages.csv": "to_dataframe", "summary.csv": "summary"}

    @property
    def by_head(self) -> Float[np.ndarray, "fact layer head"]:
        """What each head wrote to the shift of each fact, value biases included."""
        return self.attention.sum(1) + self.value_bias

    @property
    def shift(self) -> Estimate:
        """The mean shift as the model gives it, with its interval."""
        return clustered(self.facts["shift"].to_numpy(float), self._independent[0])

    @property
    def _independent(self) -> tuple[np.ndarray, str]:
        return independent(self.facts["relation_id"])

    @property
    def residual(self) -> float:
        """The largest residual of a fact, in logits."""
        return float(self.facts["residual"].abs().max())

    def to_dataframe(self) -> pd.DataFrame:
        """A row per part: kind, span, layer, head, shift (mean), stderr, low, high, n."""
        n, spans, layers, heads = self.attention.shape
        none = [pd.NA]
        rows = [
            *product(["attention"], SPANS[:spans], range(layers), range(heads)),
            *product(["value_bias"], none, range(layers), range(heads)),
            *product(["output_bias", "mlp"], none, range(layers), none),
            *product(SINGLE[: self.single.shape[1]], none, none, none),
        ]
        types = {"kind": "string", "span": "string", "layer": "Int64", "head": "Int64"}
        labels = pd.DataFrame(rows, columns=list(types)).astype(types)
        values = np.concatenate([getattr(self, name).reshape(n, -1) for name in PARTS], axis=1)
        return self._table(labels, values)

    def summary(self) -> pd.DataFrame:
        """The parts by kind, and attention by span, with the columns of `to_dataframe`.

        `estimand` says what the intervals are about.
        """
        rows = [("attention", span) for span in SPANS[: self.attention.shape[1]]]
        rows += [(kind, "") for kind in (*PARTS[1:-1], *SINGLE[: self.single.shape[1]])]
        sums = [
            self.attention.sum((2, 3)),
            self.value_bias.sum((1, 2))[:, None],
            self.output_bias.sum(1, keepdims=True),
            self.mlp.sum(1, keepdims=True),
            self.single,
        ]
        table = self._table(pd.DataFrame(rows, columns=["kind", "span"]), np.concatenate(sums, 1))
        shown = (table["shift"] != 0) | (table["stderr"] > 0)
        return table.loc[shown].assign(estimand=self._independent[1]).reset_index(drop=True)

    def _table(self, labels: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
        found = [clustered(part, self._independent[0]) for part in values.T]
        statistics = [(part.value, part.error, part.low, part.high) for part in found]
        labels[["shift", "stderr", "low", "high"]] = np.where(
            np.isfinite(statistics), statistics, np.nan
        )
        return labels.assign(n=len(values))

    def plot(self, *, by: Sequence[str] = ("span", "layer")) -> Figure:
        """Draw a map of the mean shift: layers by spans or heads, the vertical axis first.

        Raises:
            InputError: Other axes.
        """
        check_axes(by, ("span", "head"))
        table = self.to_dataframe()
        spans = table.loc[table["shift"] != 0, "span"]
        return heat_map(
            table.loc[(table["kind"] != "attention") | table["span"].isin(spans)],
            by,
            label="mean part of the shift\n(logits; red: towards the false target)",
            title=(
                f"{self.settings.title} · {self.settings.facts.title}, "
                f"{len(self.facts)} facts\n{self.settings.scheme.name}, dose "
                f"{self.settings.dose}: mean shift {self.shift.value:+.2f}"
            ),
        )

    def exhibits(self) -> list[Exhibit]:
        """Both maps, the sums by kind and span, every part, the facts and what was skipped."""
        skipped = Table("Facts that were skipped", self.skipped, file="skipped.csv", folded=True)
        note = (
            "Logit of the false target minus that of the true one; the residual is the shift minus "
            "the sum of the parts."
        )
        axes = ("kind", "span", "layer", "head")
        return [
            Text("How to read it", (READING, f"Intervals are about {self._independent[1]}.")),
            Drawing("Mean shift by span and layer", self.plot(by=("span", "layer"))),
            Drawing("Mean shift by layer and head", self.plot(by=("layer", "head"))),
            Table("Parts by kind", self.summary(), file="average-summary.csv", labels=MEANS),
            Table(
                "Every part", self.to_dataframe(), "", "averages.csv", filters=axes, labels=MEANS
            ),
            Table(
                "Facts",
                self.facts,
                note,
                file="facts.csv",
                filters=("relation_id",),
                labels=VALUES,
                folded=True,
            ),
            *([skipped] if len(self.skipped) else []),
        ]

    def findings(self) -> dict[str, Any]:
        """Return the counts, the mean shift with its interval and the largest residual."""
        return {
            "unit": "logits",
            "n": len(self.facts),
            "n_skipped": len(self.skipped),
            "bare": float(self.facts["bare"].mean()),
            "hijacked": float(self.facts["hijacked"].mean()),
            **self.shift.columns("shift"),
            "residual": self.residual,
            "estimand": self._independent[1],
        }

    def glance(self) -> Glance:
        """The mean shift with its interval, and its largest parts by kind and span."""
        settings, parts = self.settings, self.summary()
        largest = parts.sort_values("shift", key=abs, ascending=False, kind="stable").head(6)
        whole = {"kind": "the total shift", "span": "", "shift": self.shift.value}
        whole |= {"low": self.shift.low, "high": self.shift.high}
        rows = [whole, *largest.to_dict("records")]
        columns = {
            "part (logits)": "{kind}",
            "to": "{span}",
            "mean": "{shift:signed}",
            "95% interval": "[{low:signed}, {high:signed}]",
        }
        return Glance(
            f"{settings.title} · {settings.facts.title}, {len(self.facts)} facts, "
            f"{len(self.skipped)} skipped · {settings.scheme.name}, dose {settings.dose} · "
            f"largest residual {self.residual:.1e} logits",
            (Grid.of(rows, columns),),
            (f"intervals: {self._independent[1]}",),
            steps=("summary()", "to_dataframe()", "by_head", "plot()", "save(folder)"),
        )
