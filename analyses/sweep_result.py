"""The table of a sweep: a row per cell and dose, or per cell and learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.results.glance import Glance, share
from hijacklens.results.result import Provenance, Result, provenance_from

FAILED_COLUMNS = ("cell", "reason")
_WHOLE = ("seed", "dose", "n", "ties", "bits", "length", "dim", "d_attn", "steps", "batch", "seeds")
_LINES = {"scoring": ["model", "scheme"], "training": ["bits", "dim", "freeze"]}


@dataclass(frozen=True, eq=False)
class SweepResult(Result):
    """What came of all cells of a sweep; the result of each is in a folder of its own."""

    table: pd.DataFrame
    """A row per scoring cell and dose (efficacy and retention as in `HijackResult.summary`) and
    per training cell and learning rate (means over its seeds, with 95% Student intervals)."""
    failed: pd.DataFrame
    """Cells that could not be done, with the reason."""
    settings: Mapping[str, Any]
    provenance: Provenance
    figure_names = ("sweep.svg", "sweep.png")

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table.copy()

    def plot(self) -> Figure:
        """Efficacy by dose, and accuracy by learning rate: means over facts and seeds."""
        kinds = list(self.table["kind"].unique())
        with plots.canvas(1, max(1, len(kinds)), width=5.4, height=3.8) as (figure, axes):
            for ax, kind in zip(axes, kinds, strict=False):
                scoring = kind == "scoring"
                x, y = ("dose", "efficacy") if scoring else ("lr", "accuracy")
                rows = self.table[self.table["kind"] == kind]
                for i, (key, group) in enumerate(rows.groupby(_LINES[kind], dropna=False)):
                    colour, _ = plots.series(i)
                    values = group.groupby(x)[y].agg(["mean", "min", "max"])
                    ax.plot(values.index, values["mean"], **plots.line(i))
                    ax.lines[-1].set_label(_label(kind, key))
                    ax.fill_between(
                        values.index, values["min"], values["max"], color=colour, alpha=0.15, lw=0
                    )
                ax.set(xlabel="dose (hijacking sentences)" if scoring else "learning rate")
                ax.set(ylabel=f"{y} (mean and range of cells)", ylim=(-0.02, 1.02))
                if scoring:
                    ax.set_xticks(sorted(set(rows[x])))
                else:
                    ax.set_xscale("log")
                ax.legend(fontsize=8)
        return figure

    def glance(self) -> Glance:
        """How many cells there are, and the span of what each kind gives."""
        rows = []
        for kind, name in (("scoring", "efficacy"), ("training", "accuracy")):
            of = self.table.loc[self.table["kind"] == kind] if len(self.table) else self.table
            if len(of):
                ends = f"{share(of[name].min())} to {share(of[name].max())}"
                rows.append((kind, str(of["cell"].nunique()), name, ends))
        return Glance(
            f"{len(self.settings['cells'])} cells, {len(self.failed)} of them failed",
            ("kind", "cells", "measure", "from ... to"),
            tuple(rows),
            ("to_dataframe()", "failed", "plot()"),
        )

    def configuration(self) -> dict[str, Any]:
        """The sweep as it was asked for, and how many cells there are."""
        return {**self.settings, "failed": len(self.failed)}

    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """sweep.csv and failed.csv."""
        return {
            "sweep.csv": lambda path: self.table.to_csv(path, index=False),
            "failed.csv": lambda path: self.failed.to_csv(path, index=False),
        }

    @classmethod
    def read(cls, folder: Path, record: Mapping[str, Any]) -> SweepResult:
        """Read the table back; the results of the cells are read one by one."""
        try:
            table = whole_numbers(pd.read_csv(folder / "sweep.csv"))
            failed = pd.read_csv(folder / "failed.csv", keep_default_na=False)
        except (OSError, ValueError) as error:
            raise InputError(f"the sweep in {str(folder)!r} is not whole: {error}") from error
        derived = {"type", "provenance", "failed"}
        settings = {key: value for key, value in record.items() if key not in derived}
        return cls(table, failed, settings, provenance_from(record))


def whole_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The table with counts as whole numbers, in columns that not every row has, too."""
    return table.astype({name: "Int64" for name in _WHOLE if name in table})


def _label(kind: str, key: Any) -> str:
    values: Sequence[Any] = key
    if kind == "scoring":
        return " · ".join(map(str, values))
    bits, dim, freeze = values
    frozen = f", {freeze} frozen" if isinstance(freeze, str) and freeze else ""
    return f"m = {bits:g}, d = {dim:g}{frozen}"
