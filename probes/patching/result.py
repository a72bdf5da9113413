"""The result of a patching sweep: the logit difference after each patch, fact by fact.

    share, denoise    (hijacked - patched) / (hijacked - clean)    1: as if never hijacked
    share, noise      (patched - clean) / (hijacked - clean)       1: the patch alone hijacks

Both are ratios of means over the facts, so that facts with a small shift do not dominate; they
can lie outside 0..1, and are undefined if the mean shift is below 0.05 logits. Logit differences
are (logit o_ - logit o*) of the targets' first tokens, as the model gives them (after a final
soft-cap, if it has one).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hijacklens import plots
from hijacklens.errors import choice
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.result import Provenance, Result
from hijacklens.results.stored import Stored
from hijacklens.scoring.items import SkippedTable
from hijacklens.scoring.result import PairSettings
from hijacklens.statistics import LEAST_WHOLE, clustered_ratio, independent

CELL, NUMBERS = ["layer", "span", "head"], ["clean", "hijacked", "patched"]
PATCH_COLUMNS = ("case_id", "relation_id", "subject", *CELL, *NUMBERS, "unmatched")
MOST_COLUMNS = 12
"""Up to this many columns, the number is written in each cell."""
BOLD = "bold: the corrected 95% interval excludes 0"
NO_FRACTION = f"no fraction: hijacking raises the mean difference by less than {LEAST_WHOLE} logits"
COLUMN_NAMES = {"span": "span", "head": "query head", "kv_head": "key/value head"}

Value = Literal["share", "logits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchingSettings(PairSettings):
    """The settings of a patching sweep."""

    direction: Literal["denoise", "noise"]
    site: str
    axis: str
    """What the column `head` counts: `head` or `kv_head`, or nothing for `span`."""
    layers: tuple[int, ...]
    spans: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PatchingSweep(Result):
    """Patches of every layer at every span, or of every head, over many facts."""

    figures: ClassVar = {"patching": {}}
    derived: ClassVar = {"summary.csv": "summary"}

    patches: Annotated[pd.DataFrame, Stored("patches.parquet", columns=PATCH_COLUMNS)]
    """A row per fact and patch: see `to_dataframe`."""
    skipped: SkippedTable
    """Facts that could not be patched, with the reason."""
    settings: PatchingSettings
    provenance: Provenance

    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact and patch.

        `case_id, relation_id, subject`; `layer, span, head` of the patch (`head` is missing for
        patches of complete layers; `settings.axis` says whether heads are query or key/value
        heads); the logit difference `clean`, `hijacked` and `patched` (logits); `unmatched`, how
        many tokens of the query's first word have no counterpart and were not patched.
        """
        return self.patches.copy()

    @property
    def _denoise(self) -> bool:
        return self.settings.direction == "denoise"

    @cached_property
    def _summary(self) -> pd.DataFrame:
        rows = []
        groups: Any = self.patches.groupby(CELL, sort=False, dropna=False)
        confidence = 1 - 0.05 / len(groups)
        for cell, group in groups:
            clusters, estimand = independent(group["relation_id"])
            clean, hijacked, patched = group[NUMBERS].to_numpy().T
            parts = hijacked - patched if self._denoise else patched - clean
            share = clustered_ratio(parts, hijacked - clean, clusters, confidence=confidence)
            means = {"n": len(group), "estimand": estimand, **group[NUMBERS].mean()}
            rows.append({**dict(zip(CELL, cell, strict=True)), **means, **share.columns("share")})
        return pd.DataFrame(rows).astype({"head": "Int64"})

    def summary(self) -> pd.DataFrame:
        """One row per patch: means over the facts, and the fraction of the shift.

        `layer, span, head, n`; `clean, hijacked, patched` (means, logits); `share, share_low,
        share_high`, the fraction of the shift that the patch undoes (denoise) or causes (noise),
        with its interval: 95% for all patches together (Bonferroni), about the `estimand`,
        relations like these or, if the facts have one relation, these facts. NaN if hijacking
        raises the mean difference by less than 0.05 logits (`hijacklens.statistics.LEAST_WHOLE`).
        """
        return self._summary.copy()

    def plot(self, *, value: Value = "share") -> Figure:
        """Draw a heat map of layer by span or head: the fraction of the shift, or the mean change.

        A single span or head is a line over layers; a band is the interval of the fraction.

        Raises:
            InputError: Another value.
        """
        choice("value", value, ("share", "logits"))
        table = self._summary
        axis = self.settings.axis
        column = "span" if axis == "span" else "head"
        layers = sorted(set(table["layer"]))
        columns = list(self.settings.spans if axis == "span" else sorted(set(table["head"])))
        if value == "share":
            shown, clear = table["share"], (table["share_low"] > 0) | (table["share_high"] < 0)
        else:
            start = "hijacked" if self._denoise else "clean"
            shown, clear = table["patched"] - table[start], table["patched"].isna()
        label = "change in logit o_ - logit o* (logits)"
        if value == "share":
            label = f"fraction of the shift {'undone' if self._denoise else 'caused'} (1: all)"
        if len(columns) == 1:
            return self._line(table.assign(shown=shown), band=value == "share", label=label)
        # Heads given as pairs need not fill a rectangle.
        grid = np.full((len(layers), len(columns)), np.nan)
        bold = np.zeros(grid.shape, dtype=bool)
        at = table["layer"].map(layers.index), table[column].map(columns.index)
        grid[at], bold[at] = shown, clear
        narrow = len(columns) <= MOST_COLUMNS
        width = 1.9 + (0.62 if narrow else 0.24) * len(columns)
        height = 1.5 + 0.24 * len(layers)
        # In a smaller figure the title and the label of the scale do not fit.
        with plots.canvas(width=max(width, 5.4), height=max(height, 3.2)) as (figure, (ax,)):
            plots.heat_map(ax, grid, rows=layers, columns=columns, label=label, origin="lower")
            if narrow:
                _write_numbers(ax, grid, bold)
            ax.set(xlabel=COLUMN_NAMES[axis], ylabel="layer")
            title = self._title() + (f"\n{BOLD}" if bold.any() and narrow else "")
            title += f"\n{NO_FRACTION}" if shown.isna().any() else ""
            figure.suptitle(plots.escape(title), fontsize=9)
        return figure

    def _line(self, table: pd.DataFrame, *, band: bool, label: str) -> Figure:
        with plots.canvas() as (figure, (ax,)):
            ax.plot(table["layer"], table["shown"], **plots.line(0))
            ax.axhline(0, color="#444444", linewidth=0.8)
            if band:
                values = np.append(table["shown"].dropna(), [0.0, 1.0])
                room = 0.5 * float(np.ptp(values))  # a corrected interval can be very wide
                ends = table["share_low"], table["share_high"]
                ax.fill_between(table["layer"], *ends, color=plots.COLOURS[0], alpha=0.15, lw=0)
                ax.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
                ax.set_ylim(values.min() - room, values.max() + room)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set(xlabel="layer", ylabel=label)
            ax.set_xlim(table["layer"].min() - 0.5, table["layer"].max() + 0.5)
            corrected = "\nband: corrected 95% interval" if band else ""
            if table["shown"].isna().any():
                corrected = f"\n{NO_FRACTION}"
            figure.suptitle(plots.escape(self._title() + corrected), fontsize=9)
        return figure

    def _title(self) -> str:
        settings = self.settings
        into = "clean → hijacked" if self._denoise else "hijacked → clean"
        n = self.patches["case_id"].nunique()
        means = self.patches[["clean", "hijacked"]].mean()
        at = f" at {settings.spans[0]}" if len(settings.spans) == 1 else ""
        return (
            f"{settings.title}: {settings.site}{at}, {into}\n"
            f"{settings.scheme.name}, dose {settings.dose}, {n} facts\n"
            f"o_ - o*: {means['clean']:+.2f} clean, {means['hijacked']:+.2f} hijacked"
        )

    def findings(self) -> dict[str, Any]:
        """Return how many facts were patched and skipped, and the mean logit differences."""
        means = self.patches[["clean", "hijacked"]].mean()
        return {
            "n": int(self.patches["case_id"].nunique()),
            "skipped": len(self.skipped),
            "mean_clean": float(means["clean"]),
            "mean_hijacked": float(means["hijacked"]),
        }

    def glance(self) -> Glance:
        """The patches with the largest fraction of the shift."""
        settings, table = self.settings, self._summary
        largest = table.sort_values("share", key=abs, ascending=False, kind="stable")[:5]
        columns = {
            "layer": "{layer}",
            "span": "{span}",
            **({"head": "{head}"} if table["head"].notna().any() else {}),
            "fraction of the shift": "{share:signed}",
            "corrected 95% interval": "[{share_low:signed}, {share_high:signed}]",
        }
        estimand = ", ".join(table["estimand"].unique())
        return Glance(
            f"{settings.title} · {settings.site} by {settings.axis}, "
            f"{settings.direction} · {settings.scheme.name}, dose {settings.dose} · "
            f"{self.patches['case_id'].nunique()} facts, {len(self.skipped)} skipped",
            (Grid.of(largest, columns, title=f"largest of {len(table)} patches"),),
            (
                f"intervals: {estimand}, corrected for {len(table)} patches",
                *([NO_FRACTION] if table["share"].isna().any() else []),
            ),
        )


def _write_numbers(ax: Axes, grid: np.ndarray, bold: np.ndarray) -> None:
    """Write the number of each cell, bold if its interval excludes 0."""
    limit = ax.images[0].get_clim()[1]
    for (row, column), number in np.ndenumerate(grid):
        if np.isfinite(number):
            ax.text(
                column,
                row,
                f"{round(number, 2) + 0.0:.2f}",  # never "-0.00"
                ha="center",
                va="center",
                fontsize=7,
                fontweight="bold" if bold[row, column] else "normal",
                color="white" if abs(number) > 0.65 * limit else "black",
            )
