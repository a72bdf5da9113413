"""What a report can show of a result. `Result.exhibits` returns these, from top to bottom.

>>> import pandas as pd
>>> Table("Shares", pd.DataFrame({"model": ["a"], "efficacy": [0.25]})).column("efficacy").digits
3
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hijacklens.views import View

SHARES = ("efficacy", "efficacy_low", "efficacy_high", "retention")
MOST_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Text:
    """Sentences under a heading."""

    heading: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    """Stand below the paragraphs, one line each."""
    terms: Mapping[str, str] = field(default_factory=dict)
    """Words and what they mean, below the points."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A matplotlib figure, inlined as SVG."""

    heading: str
    figure: Figure
    alt: str = ""
    """What a reader who does not see it is told; by default its titles, axes and lines."""
    note: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """How a column of a table is shown."""

    label: str
    digits: int | None = None
    """Decimals of a number; None for whole numbers and text."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table that can be sorted, filtered, searched and downloaded."""

    heading: str
    data: pd.DataFrame
    note: str = ""
    file: str = "table.csv"
    """Name of the download."""
    filters: Sequence[str] = ()
    """Columns that a reader can choose a value of."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Values that are chosen when the page opens."""
    shares: Sequence[str] = SHARES
    """Columns between 0 and 1, which are shown with three decimals."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Headings of columns, where the name of the column is not one."""
    folded: bool = False

    def column(self, name: str) -> Column:
        """Heading and decimals of a column: four digits of its largest number are shown."""
        label = self.labels.get(name, name.replace("_", " "))
        values = self.data[name]
        if not pd.api.types.is_float_dtype(values):
            return Column(label)
        if name in self.shares:
            return Column(label, 3)
        sizes = np.abs(values.to_numpy(float, na_value=np.nan))
        sizes = np.unique(sizes[np.isfinite(sizes)])
        largest = float(sizes[-1]) if len(sizes) else 0.0
        before = math.floor(math.log10(largest)) if largest else 0
        digits = min(max(3 - before, 1), MOST_DIGITS)
        # Numbers such as 0.01 and 8 need no more decimals than they have.
        while digits and (np.round(sizes, digits - 1) == sizes).all():
            digits -= 1
        return Column(label, digits)


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """Interactive views of circuitsvis."""

    heading: str
    views: Sequence[View]
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """Facts whose verdict flips between the bare and the hijacked prompt, to be searched."""

    heading: str
    items: pd.DataFrame
    """`items.parquet` of a hijack run."""
    prompts: pd.DataFrame
    """`prompts.parquet` of the same; may be empty."""


Exhibit: TypeAlias = Text | Drawing | Table | Views | Facts
