"""The result of a patching sweep: the logit difference after each patch, fact by fact.

    share, denoise    (hijacked - patched) / (hijacked - clean)    1: as if never hijacked
    share, noise      (patched - clean) / (hijacked - clean)       1: hijacked by the patch alone

Both are ratios of means over the facts, so that facts with a small shift do not dominate; they
can lie outside 0..1. Logit differences are (logit o_ - logit o*) of the targets' first tokens, as
the model gives them (after a final soft-cap, if it has one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError, choice
from hijacklens.results.glance import Glance, Grid
from hijacklens.results.provenance import Provenance, provenance_from
from hijacklens.results.result import Result
from hijacklens.scoring.items import read_skipped
from hijacklens.statistics import paired_ratio

PATCH_COLUMNS = (
    "case_id",
    "relation_id",
    "subject",
    "layer",
    "span",
    "head",
    "clean",
    "hijacked",
    "patched",
    "unmatched",
)
CELL = ["layer", "span", "head"]
MOST_COLUMNS = 12
"""Up to this many columns, the number is written in each cell."""
COLOURS = "RdBu_r"
"""Diverging and distinguishable with any colour vision: blue below 0, red above."""
BOLD = "bold: the 95% interval excludes 0"
COLUMN_NAMES = {"span": "span", "head": "query head", "kv_head": "key/value head"}

Value = Literal["share", "logits"]


@dataclass(frozen=True, eq=False)
class PatchingSweep(Result):
    """Patches of every layer at every span, or of every head, over many facts."""

    figure_names: ClassVar[tuple[str, ...]] = ("patching.svg", "patching.png")

    patches: pd.DataFrame
    """A row per fact and patch: see `to_dataframe`."""
    skipped: pd.DataFrame
    """Facts that could not be patched, with the reason."""
    settings: Mapping[str, Any]
    """What was run: models, facts, scheme, dose, direction, site, axis, layers, spans, seed."""
    provenance: Provenance

    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact and patch.

        `case_id, relation_id, subject`; `layer, span, head` of the patch (`head` is missing for
        patches of complete layers; `settings["axis"]` says whether heads are query or key/value
        heads); the logit difference `clean`, `hijacked` and `patched` (logits); `unmatched`, how
        many tokens of the query's first word have no counterpart and were not patched.
        """
        return self.patches.copy()

    @cached_property
    def _summary(self) -> pd.DataFrame:
        rows = []
        for cell, group in self.patches.groupby(CELL, sort=False, dropna=False):
            means = group[["clean", "hijacked", "patched"]].mean()
            parts = (
                group["hijacked"] - group["patched"]
                if self.settings["direction"] == "denoise"
                else group["patched"] - group["clean"]
            )
            share = paired_ratio(
                parts.to_numpy(),
                (group["hijacked"] - group["clean"]).to_numpy(),
                seed=self.settings["seed"],
            )
            named = dict(zip(CELL, cell if isinstance(cell, tuple) else (cell,), strict=True))
            ends = {"share": share.value, "share_low": share.low, "share_high": share.high}
            rows.append({**named, "n": len(group), **means.to_dict(), **ends})
        return pd.DataFrame(rows).astype({"head": "Int64"})

    def summary(self) -> pd.DataFrame:
        """One row per patch: means over the facts, and the fraction of the shift.

        `layer, span, head, n`; `clean, hijacked, patched` (means, logits); `share, share_low,
        share_high`, the fraction of the shift that the patch undoes (denoise) or causes (noise),
        with its 95% bootstrap interval over facts. NaN if hijacking does not raise the difference.
        """
        return self._summary.copy()

    def plot(self, *, value: Value = "share") -> Figure:
        """Draw a heat map of layer by span, or of layer by head.

        Args:
            value: `share`, the fraction of the shift, or `logits`, the mean change.

        Raises:
            InputError: Another value.
        """
        choice("value", value, ("share", "logits"))
        table = self._summary
        axis = self.settings["axis"]
        column = "span" if axis == "span" else "head"
        layers = sorted(set(table["layer"]))
        columns = list(self.settings["spans"] if axis == "span" else sorted(set(table["head"])))
        if value == "share":
            shown, clear = table["share"], (table["share_low"] > 0) | (table["share_high"] < 0)
        else:
            start = "hijacked" if self.settings["direction"] == "denoise" else "clean"
            shown, clear = table["patched"] - table[start], table["patched"].isna()
        # Heads given as pairs need not fill a rectangle.
        grid = np.full((len(layers), len(columns)), np.nan)
        bold = np.zeros(grid.shape, dtype=bool)
        at = [table["layer"].map(layers.index), table[column].map(columns.index)]
        grid[tuple(at)], bold[tuple(at)] = shown, clear
        narrow = len(columns) <= MOST_COLUMNS
        width = 1.9 + (0.62 if narrow else 0.24) * len(columns)
        height = 1.5 + 0.24 * len(layers)
        # In a smaller figure the title and the label of the scale do not fit.
        with plots.canvas(width=max(width, 5.4), height=max(height, 3.2)) as (figure, (ax,)):
            finite = np.abs(grid[np.isfinite(grid)])
            limit = max(float(finite.max()), 1e-6) if finite.size else 1.0
            image = ax.imshow(
                grid, cmap=COLOURS, vmin=-limit, vmax=limit, origin="lower", aspect="auto"
            )
            if narrow:
                _write_numbers(ax, grid, bold, limit)
            bar = figure.colorbar(image, ax=ax, label=self._meaning(value))
            bar.outline.set_visible(False)
            ax.grid(False)
            ax.set(xlabel=COLUMN_NAMES[axis], ylabel="layer")
            title = self._title() + (f"\n{BOLD}" if bold.any() and narrow else "")
            figure.suptitle(title, fontsize=9)
            ax.set_xticks(range(len(columns)), list(map(str, columns)))
            step = max(1, len(layers) // 16)
            ax.set_yticks(range(0, len(layers), step), [str(x) for x in layers[::step]])
        return figure

    def _meaning(self, value: Value) -> str:
        denoise = self.settings["direction"] == "denoise"
        if value == "logits":
            return "change in logit o_ - logit o* (logits)"
        return "fraction of the shift " + ("undone" if denoise else "caused") + " (1: all)"

    def _title(self) -> str:
        settings = self.settings
        into = "clean → hijacked" if settings["direction"] == "denoise" else "hijacked → clean"
        n = self.patches["case_id"].nunique()
        means = self.patches[["clean", "hijacked"]].mean()
        at = "" if settings["axis"] == "span" else f" at {settings['spans'][0]}"
        return (
            f"{settings['models'][0]['name']}: {settings['site']}{at}, {into}\n"
            f"{settings['scheme']['name']}, dose {settings['dose']}, {n} facts\n"
            f"o_ - o*: {means['clean']:+.2f} clean, {means['hijacked']:+.2f} hijacked"
        )

    def configuration(self) -> dict[str, Any]:
        """The settings, and how many facts were patched and skipped."""
        means = self.patches[["clean", "hijacked"]].mean()
        return {
            **self.settings,
            "n": int(self.patches["case_id"].nunique()),
            "skipped": len(self.skipped),
            "mean_clean": float(means["clean"]),
            "mean_hijacked": float(means["hijacked"]),
        }

    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """patches.parquet, summary.csv and skipped.csv."""
        return {
            "patches.parquet": lambda path: self.patches.to_parquet(path, index=False),
            "summary.csv": lambda path: self._summary.to_csv(path, index=False),
            "skipped.csv": lambda path: self.skipped.to_csv(path, index=False),
        }

    @classmethod
    def read(cls, folder: Path, record: Mapping[str, Any]) -> PatchingSweep:
        """Read the patches and skipped facts back; everything else is computed from them."""
        try:
            patches = pd.read_parquet(folder / "patches.parquet")
            skipped = read_skipped(folder / "skipped.csv")
        except (OSError, ValueError) as error:
            raise InputError(f"the result in {str(folder)!r} is not whole: {error}") from error
        missing = set(PATCH_COLUMNS) - set(patches.columns)
        if missing:
            raise InputError(f"{folder / 'patches.parquet'} lacks columns: {sorted(missing)}.")
        derived = {"type", "provenance", "n", "skipped", "mean_clean", "mean_hijacked"}
        settings = {key: value for key, value in record.items() if key not in derived}
        return cls(patches, skipped, settings, provenance_from(record))

    def glance(self) -> Glance:
        """The patches with the largest fraction of the shift."""
        settings, table = self.settings, self._summary
        largest = table["share"].abs().sort_values(ascending=False, kind="stable").index[:5]
        columns = {
            "layer": "{layer}",
            "span": "{span}",
            **({"head": "{head}"} if table["head"].notna().any() else {}),
            "fraction of the shift": "{share:signed}",
            "95% interval": "[{share_low:signed}, {share_high:signed}]",
        }
        return Glance(
            f"{settings['models'][0]['name']} · {settings['site']} by {settings['axis']}, "
            f"{settings['direction']} · {settings['scheme']['name']}, dose {settings['dose']} · "
            f"{self.patches['case_id'].nunique()} facts, {len(self.skipped)} skipped",
            (Grid.of(table.loc[largest], columns, title=f"largest of {len(table)} patches"),),
        )


def _write_numbers(ax: Axes, grid: np.ndarray, bold: np.ndarray, limit: float) -> None:
    """Write the number of each cell, bold if its interval excludes 0."""
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
