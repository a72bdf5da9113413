"""A result at a glance: what it is of, its main numbers, the next step, as text and in a notebook.

Every result answers `glance()`, and that is all it has to do: `print(result)`, the end of a
notebook cell and an interactive prompt show it in a few lines.

>>> class Coin(Shown):
...     def glance(self):
...         return Glance("ten throws", ("side", "share"), (("heads", ".6"),), ("plot()",))
>>> Coin()
Coin · ten throws
  side   share
  heads     .6
  next: .plot()
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_ROWS = 8
"""Rows that a glance shows; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Glance:
    """What a result shows of itself. All of it is text; the first column is a label."""

    what: str
    """Model, facts, scheme and the like, in one line."""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    steps: tuple[str, ...] = ("summary()", "plot()", "save(folder)")
    """The methods that one would call next."""

    @property
    def left_out(self) -> int:
        """How many rows are counted and not shown."""
        return max(0, len(self.rows) - MOST_ROWS)

    def text(self, name: str) -> str:
        """The glance in a few lines of plain text, under the name of the result's type."""
        lines = [f"{name} · {printable(self.what)}"]
        if self.rows:
            rows = [[printable(cell) for cell in row] for row in self.rows[:MOST_ROWS]]
            sides = "l" + "r" * (len(self.header) - 1)
            lines += [f"  {line}" for line in table(self.header, rows, left=sides).splitlines()]
        if self.left_out:
            lines.append(f"  and {self.left_out} more")
        lines.append(f"  next: {', '.join(f'.{step}' for step in self.steps)}")
        return "\n".join(lines)

    def html(self, name: str) -> str:
        """The same as a small table; whatever the texts hold is shown as text."""

        def row(cells: Sequence[str], tag: str) -> str:
            sides = ("left", *["right"] * (len(cells) - 1))
            cell = '<{0} style="text-align:{1};padding:0 .6em">{2}</{0}>'
            return "".join(
                cell.format(tag, side, html.escape(printable(text)))
                for text, side in zip(cells, sides, strict=True)
            )

        parts = [f"<b>{html.escape(name)}</b> · {html.escape(printable(self.what))}"]
        if self.rows:
            head = f"<thead><tr>{row(self.header, 'th')}</tr></thead>"
            body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self.rows[:MOST_ROWS])
            parts.append(f"<table>{head}<tbody>{body}</tbody></table>")
        if self.left_out:
            parts.append(f"<div>and {self.left_out} more</div>")
        steps = ", ".join(f"<code>.{html.escape(step)}</code>" for step in self.steps)
        parts.append(f"<div>next: {steps}</div>")
        return f"<div>{''.join(parts)}</div>"


class Shown:
    """What shows itself by its `glance`, dataclasses among them."""

    __slots__ = ()

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep `dataclass` from writing a repr of its own, with all tables and tensors in it."""
        super().__init_subclass__(**options)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Shown.__repr__

    def glance(self) -> Glance:
        """What the value shows of itself."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.glance().text(type(self).__name__)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.glance().html(type(self).__name__)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: str = "") -> str:
    """Rows under a header, columns two spaces apart.

    Args:
        header: Column titles.
        rows: Cells as text.
        left: For each column `l` or `r`; all columns are left-aligned by default.
    """
    sides = left or "l" * len(header)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        parts = (
            cell.ljust(width) if side == "l" else cell.rjust(width)
            for cell, width, side in zip(cells, widths, sides, strict=True)
        )
        return "  ".join(parts).rstrip()

    return "\n".join(line(row) for row in [header, *rows])


def share(value: float) -> str:
    """A share between 0 and 1 to three digits, without the zero in front.

    >>> share(0.25), share(1.0)
    ('.250', '1.000')
    """
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else f"{value:.3f}"


def interval(value: float, low: float, high: float) -> str:
    """A share with its interval: `.668 [.621, .712]`."""
    return f"{share(value)} [{share(low)}, {share(high)}]"


def signed(value: float) -> str:
    """A number with its sign, to two digits; a dash where there is none.

    >>> signed(0.254), signed(float("nan"))
    ('+0.25', '-')
    """
    return "-" if math.isnan(value) else f"{value:+.2f}"


def named(names: Sequence[str], *, most: int = 3) -> str:
    """Some names, and how many more there are.

    >>> named(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def printable(text: str) -> str:
    """A text in which nothing can steer a terminal: every control character is a space."""
    return "".join(character if character.isprintable() else " " for character in text)
