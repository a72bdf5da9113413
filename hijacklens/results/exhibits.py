"""What a report shows of a result, as plain data: `Result.exhibits` lists these, top to bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

FRACTIONS = (
    *("efficacy", "efficacy_low", "efficacy_high", "clustered_low", "clustered_high", "retention"),
)
MOST_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Text:
    """Sentences under a heading."""

    heading: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    """A list below the paragraphs, one line each."""
    terms: Mapping[str, str] = field(default_factory=dict)
    """Words with their meanings, below the points."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A matplotlib figure, inlined as SVG."""

    heading: str
    figure: Figure
    alt: str = ""
    """Text in place of the image; by default the figure's titles, axes and lines."""
    note: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """The format of a table column."""

    label: str
    digits: int | None = None
    """Decimals of a number; None for whole numbers and text."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table that readers can sort, filter, search and download."""

    heading: str
    data: pd.DataFrame
    note: str = ""
    file: str = "table.csv"
    """Name of the download."""
    filters: Sequence[str] = ()
    """Columns that readers can filter by value."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Column -> value of its filter when the page opens."""
    fractions: Sequence[str] = FRACTIONS
    """Columns of numbers between 0 and 1, shown with three decimals."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Column -> heading, if it differs from the name."""
    folded: bool = False

    def column(self, name: str) -> Column:
        """Return a column's heading and decimals, which show four digits of its largest number."""
        label = self.labels.get(name, name.replace("_", " "))
        values = self.data[name]
        if not pd.api.types.is_float_dtype(values):
            return Column(label)
        if name in self.fractions:
            return Column(label, 3)
        sizes = np.abs(values.to_numpy(float, na_value=np.nan))
        sizes = np.unique(sizes[np.isfinite(sizes)])
        largest = float(sizes[-1]) if len(sizes) else 0.0
        before = math.floor(math.log10(largest)) if largest else 0
        digits = min(max(3 - before, 1), MOST_DIGITS)
        # 0.01 and 8 need no trailing zeros.
        while digits and (np.round(sizes, digits - 1) == sizes).all():
            digits -= 1
        return Column(label, digits)


@dataclass(frozen=True, slots=True)
class View:
    """One circuitsvis component under a heading; `hijacklens.views` makes and shows them."""

    heading: str
    component: str
    """Name of the component, such as `AttentionHeads`."""
    props: dict[str, Any]
    """Its properties, ready for JSON."""
    folded: bool = False
    """Whether a page shows only the heading until a reader opens the view."""

    def __repr__(self) -> str:
        tokens = len(self.props.get("tokens", ()))
        return f"View({self.heading!r}, {self.component}, {tokens} tokens)"


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """Interactive circuitsvis views."""

    heading: str
    views: Sequence[View]
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """A searchable list of facts whose verdict flips between the bare and the hijacked prompt."""

    heading: str
    items: pd.DataFrame
    """`items.parquet` of a hijack run."""
    prompts: pd.DataFrame
    """`prompts.parquet` of the same run; may be empty."""
    note: str = ""


Exhibit: TypeAlias = Text | Drawing | Table | Views | Facts
