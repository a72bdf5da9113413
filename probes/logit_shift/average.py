"""Averages of shift accounts over many facts, aligned by span, as a result.

Every part is a mean over facts with its standard error and the ends of a 95% interval from a
bootstrap over facts (percentiles of 2,000 seeded resamples). Intervals are for one part at a time:
with hundreds of heads some lie off zero by chance. The parts of every single fact are kept, so
that other questions can be asked of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.results.glance import Glance
from hijacklens.results.provenance import Provenance, provenance_from
from hijacklens.results.result import Result
from hijacklens.scoring.items import read_skipped
from hijacklens.statistics import RESAMPLES, Interval, paired_mean
from probes.account import SINGLE
from probes.inputs.alignment import SPANS
from probes.logit_shift.figures import check_axes, heat_map, shows

if TYPE_CHECKING:
    from hijacklens.results.exhibits import Exhibit

ARRAYS = ("attention", "value_bias", "output_bias", "mlp", "single")
PARTS, FACTS, SKIPPED = "parts.npz", "facts.parquet", "skipped.csv"


def averages(
    values: Float[np.ndarray, "fact part"], *, seed: int
) -> Float[np.ndarray, "part statistic"]:
    """Mean, standard error and the ends of a 95% bootstrap interval over facts, for each part.

    Standard error and interval are `nan` for a single fact.
    """
    n = len(values)
    mean = values.mean(0)
    if n == 1:
        missing = np.full_like(mean, np.nan)
        return np.stack([mean, missing, missing, missing], 1)
    # A resample counts how often each fact is drawn, so its mean is a product.
    draw = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    ends = [
        np.percentile(draw @ block / n, [2.5, 97.5], axis=0)
        for block in np.array_split(values, max(1, values.shape[1] // 1000), axis=1)
    ]
    low, high = np.concatenate(ends, axis=1)
    return np.stack([mean, values.std(0, ddof=1) / n**0.5, low, high], 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class AverageShift(Result):
    """What wrote the logit shift of many facts; made by `logit_shift.average`. Units: logits."""

    attention: Float[np.ndarray, "fact span layer head"]
    """Source tokens summed by span, in the order of `alignment.SPANS`; without value biases."""
    value_bias: Float[np.ndarray, "fact layer head"]
    output_bias: Float[np.ndarray, "fact layer"]
    mlp: Float[np.ndarray, "fact layer"]
    single: Float[np.ndarray, "fact part"]
    """The parts that belong to no layer, in the order of `account.SINGLE`."""
    facts: pd.DataFrame
    """A row per fact: case_id, relation_id, subject, bare, hijacked, shift, residual."""
    skipped: pd.DataFrame
    """Facts that could not be used: case_id, relation_id, subject, reason."""
    settings: Mapping[str, Any]
    provenance: Provenance

    figure_names = ()

    @property
    def by_head(self) -> Float[np.ndarray, "fact layer head"]:
        """What each head wrote to the shift of each fact, value biases included."""
        return self.attention.sum(1) + self.value_bias

    @property
    def shift(self) -> Interval:
        """The mean shift as the model gives it, with its interval."""
        return paired_mean(self.facts["shift"].to_numpy(float), seed=self.settings["seed"])

    @property
    def residual(self) -> float:
        """The largest residual of a fact, in logits."""
        return float(self.facts["residual"].abs().max())

    def to_dataframe(self) -> pd.DataFrame:
        """A row per part: kind, span, layer, head, shift (mean), stderr, low, high, n."""
        n, spans, layers, heads = self.attention.shape
        span, layer, head = (a.ravel() for a in np.indices((spans, layers, heads)))
        of_layer = np.arange(layers)
        per_head = [a.ravel() for a in np.indices((layers, heads))]
        blocks = [
            pd.DataFrame(
                {
                    "kind": "attention",
                    "span": np.array(SPANS)[span],
                    "layer": layer,
                    "head": head,
                }
            ),
            pd.DataFrame({"kind": "value_bias", "layer": per_head[0], "head": per_head[1]}),
            pd.DataFrame({"kind": "output_bias", "layer": of_layer}),
            pd.DataFrame({"kind": "mlp", "layer": of_layer}),
            pd.DataFrame({"kind": list(SINGLE)}),
        ]
        kinds = {"kind": "string", "span": "string", "layer": "Int64", "head": "Int64"}
        labels = pd.concat(
            [block.reindex(columns=list(kinds)).astype(kinds) for block in blocks],
            ignore_index=True,
        )
        values = np.concatenate([getattr(self, name).reshape(n, -1) for name in ARRAYS], axis=1)
        return self._table(labels, values)

    def summary(self) -> pd.DataFrame:
        """The same by kind, attention by span too: kind, span, shift, stderr, low, high, n."""
        spans = self.attention.sum((2, 3))
        rest = [
            self.value_bias.sum((1, 2)),
            self.output_bias.sum(1),
            self.mlp.sum(1),
            *self.single.T,
        ]
        labels = pd.DataFrame(
            {
                "kind": ["attention"] * len(SPANS) + ["value_bias", "output_bias", "mlp", *SINGLE],
                "span": [*SPANS, *[""] * len(rest)],
            }
        )
        table = self._table(labels, np.concatenate([spans, np.stack(rest, 1)], axis=1))
        kept = (table["shift"] != 0) | (table["stderr"] > 0)
        return table.loc[kept].reset_index(drop=True)

    def _table(self, labels: pd.DataFrame, values: np.ndarray) -> pd.DataFrame:
        statistics = averages(values, seed=self.settings["seed"])
        for i, name in enumerate(("shift", "stderr", "low", "high")):
            labels[name] = statistics[:, i]
        labels["n"] = len(values)
        return labels

    def plot(self, *, by: Sequence[str] = ("span", "layer")) -> Figure:
        """A map of the mean shift by layer and span, or layer and head.

        Args:
            by: `("span", "layer")` or `("layer", "head")`, or the other way round.

        Raises:
            InputError: Other axes.
        """
        axis = check_axes(by, ("span", "head"))
        labels = self.to_dataframe()
        order = [s for s in SPANS if (labels.loc[labels["span"] == s, "shift"] != 0).any()]
        rest = self.summary()
        loose = rest[rest["kind"].isin(SINGLE)]
        named = ", ".join(f"{r.kind} {r.shift:+.2f}" for r in loose.itertuples() if shows(r.shift))
        return heat_map(
            labels.loc[(labels["kind"] != "attention") | labels["span"].isin(order)],
            by,
            label="mean part of the shift\n(logits; red: towards the false target)",
            title=(
                f"{self.settings['model']['name']} · {self.settings['facts']['name']}, "
                f"{len(self.facts)} facts\n{self.settings['scheme']}, dose "
                f"{self.settings['dose']}: mean shift {self.shift.value:+.2f}"
            ),
            note=f"beside the layers: {named or 'nothing above 0.005'}",
            order=order if axis == "span" else (),
        )

    def exhibits(self) -> list[Exhibit]:
        """Both maps, the sums by kind and span, every part, and the facts."""
        from probes.logit_shift.exhibits import average_exhibits

        return average_exhibits(self)

    def configuration(self) -> dict[str, Any]:
        """The settings, the counts, the mean shift with its interval and the largest residual."""
        shift = self.shift
        return {
            **self.settings,
            "unit": "logits",
            "n": len(self.facts),
            "n_skipped": len(self.skipped),
            "bare": float(self.facts["bare"].mean()),
            "hijacked": float(self.facts["hijacked"].mean()),
            "shift": shift.value,
            "shift_low": shift.low,
            "shift_high": shift.high,
            "residual": self.residual,
            "resamples": RESAMPLES,
        }

    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """Tables, the parts of every fact, and the maps by span and layer and by layer and head."""

        def write_parts(path: Path) -> None:
            with path.open("wb") as file:  # a name would get another ending
                np.savez_compressed(file, **{name: getattr(self, name) for name in ARRAYS})

        found: dict[str, Callable[[Path], None]] = {
            PARTS: write_parts,
            FACTS: lambda path: self.facts.to_parquet(path, index=False),
            SKIPPED: lambda path: self.skipped.to_csv(path, index=False),
            "averages.csv": lambda path: self.to_dataframe().to_csv(path, index=False),
            "summary.csv": lambda path: self.summary().to_csv(path, index=False),
        }
        maps = {"span_layer": ("span", "layer"), "layer_head": ("layer", "head")}
        for name, by in maps.items():
            figure = self.plot(by=by)
            for ending in ("svg", "png"):
                found[f"{name}.{ending}"] = lambda path, figure=figure: plots.write(figure, path)
        return found

    @classmethod
    def read(cls, folder: Path, record: Mapping[str, Any]) -> AverageShift:
        """Read the parts of every fact back; averages are computed from them."""
        try:
            with np.load(folder / PARTS, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in ARRAYS}
            facts = pd.read_parquet(folder / FACTS)
            skipped = read_skipped(folder / SKIPPED)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"the result in {str(folder)!r} is not whole: {error}") from error
        names = ("model", "facts", "scheme", "dose", "probes", "seed")
        settings = {name: record[name] for name in names}
        return cls(
            **arrays,
            facts=facts,
            skipped=skipped,
            settings=settings,
            provenance=provenance_from(record),
        )

    def glance(self) -> Glance:
        """The mean shift with its interval, and what wrote it, by kind and span."""
        total, settings = self.shift, self.settings
        parts = self.summary()
        largest = parts["shift"].abs().sort_values(ascending=False, kind="stable").index[:6]
        rows = [
            (
                f"{row['kind']} to {row['span']}" if row["span"] else str(row["kind"]),
                f"{row['shift']:+.2f}",
                f"[{row['low']:+.2f}, {row['high']:+.2f}]",
            )
            for row in parts.loc[largest].to_dict("records")
        ]
        whole = ("the whole shift", f"{total.value:+.2f}", f"[{total.low:+.2f}, {total.high:+.2f}]")
        return Glance(
            f"{settings['model']['name']} · {settings['facts']['name']}, {len(self.facts)} facts, "
            f"{len(self.skipped)} skipped · {settings['scheme']}, dose {settings['dose']} · "
            f"largest residual {self.residual:.1e} logits",
            ("part (logits)", "mean", "95% interval"),
            (whole, *rows),
            ("summary()", "to_dataframe()", "by_head", "plot()", "save(folder)"),
        )
