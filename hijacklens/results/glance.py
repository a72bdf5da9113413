"""What a result shows: a line, tables and notes, the same in Python, a notebook and the shell.

The method `glance()` of a result is the one place that says what the result shows. `print(result)`
and a notebook cell call it, and so does the command that made the result. rich draws the tables.

>>> class Coin(Shown):
...     def glance(self):
...         rows = [{"side": "heads", "value": 0.6}]
...         table = Grid.of(rows, {"side": "{side}", "fraction": "{value:fraction}"})
...         return Glance("ten throws", (table,), steps=("plot()",))
>>> Coin()
Coin · ten throws
side   fraction
heads      .600
next: .plot()
"""

from __future__ import annotations

import html
import io
import re
import shutil
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MOST_ROWS = 24
"""Rows of each table that `print(result)` and a notebook show; a command prints all rows."""
PIPE_WIDTH = 10_000
"""Characters in a line where the output is not a terminal, so that nothing is wrapped."""
STATE = "state"
"""Title of a column whose cells are coloured by `COLOURS`."""
COLOURS = {"pass": "green", "fail": "red", "open": "yellow"}
NUMBER = re.compile(r"\{\w+:(?:[^{}]*[dfgeG%,]|fraction|signed)\}")
"""The form of a column of numbers, which is aligned on the right."""

UNBOUNDED = re.compile(r"\[[^],]*-inf, \+?inf\]")
"""An interval that excludes nothing."""
ONE = re.compile(
    r"(?<![\d.,])1 (fact|pair|set|head|relation|layer|prompt|token|reading|row|model|answer|cell"
    r"|cluster|distance|step|test|hijacking sentence)s\b"
)


class Title(str):
    """A line that a terminal shows in bold."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells under column titles; everything is text."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sides: str = ""
    """`l` or `r` for each column: where its cells are aligned. By default all on the left."""
    title: str = ""

    @classmethod
    def of(cls, rows: Any, columns: Mapping[str, str], *, title: str = "") -> Grid:
        """Write the values of some rows as text.

        Args:
            rows: A pandas table, or mappings of names to values.
            columns: Column title -> form of a cell, a format string with names of values, such as
                `"{carried:+.3f} [{low:+.3f}, {high:+.3f}]"`. The formats `fraction` and `signed`
                call the functions of these names. A missing value is a dash.
                Columns that hold one number are aligned on the right.
            title: A line above the table.
        """
        forms = columns.values()
        records = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
        cells = (
            tuple(
                UNBOUNDED.sub("[too few for an interval]", _FORMS.vformat(form, (), each))
                for form in forms
            )
            for each in records
        )
        sides = "".join("r" if NUMBER.fullmatch(form) else "l" for form in forms)
        return cls(tuple(columns), tuple(cells), sides, title)


@dataclass(frozen=True, slots=True)
class Glance:
    """What a result shows."""

    what: str
    """Model, facts, scheme and the like, in one line."""
    tables: tuple[Grid, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines below the tables."""
    steps: tuple[str, ...] = ("summary()", "plot()", "save(folder)")
    """Methods to call next; only shown in Python."""
    details: tuple[str, ...] = ()
    """How the run went; only a command prints it, as `settings` has it in Python."""

    def parts(self, name: str = "") -> Iterator[str | Grid]:
        """All lines and tables for a command, or for Python if the result's type is named."""
        yield f"{name} · {singular(self.what)}" if name else Title(singular(self.what))
        for i, table in enumerate(self.tables):
            if i and not table.title:
                yield ""
            yield replace(table, rows=table.rows[:MOST_ROWS]) if name else table
            if name and len(table.rows) > MOST_ROWS:
                yield f"and {len(table.rows) - MOST_ROWS} more"
        yield from map(singular, self.notes if name else (*self.notes, *self.details))
        if name:
            yield f"next: {', '.join(f'.{step}' for step in self.steps)}"

    def html(self, name: str) -> str:
        """The glance for a notebook. All texts are escaped."""

        def row(cells: Sequence[str], tag: str, sides: str) -> str:
            return "".join(
                f'<{tag} style="text-align:{"right" if side == "r" else "left"};padding:0 .6em">'
                f"{html.escape(printable(text))}</{tag}>"
                for text, side in zip(cells, sides, strict=True)
            )

        blocks = []
        for part in self.parts(name):
            if isinstance(part, str):
                blocks.append(f"<div>{html.escape(printable(part))}</div>")
                continue
            sides = part.sides or "l" * len(part.header)
            caption = f"<caption>{html.escape(printable(part.title))}</caption>"
            head = f"<thead><tr>{row(part.header, 'th', sides)}</tr></thead>"
            body = "".join(f"<tr>{row(cells, 'td', sides)}</tr>" for cells in part.rows)
            blocks.append(
                f"<table>{caption if part.title else ''}{head}<tbody>{body}</tbody></table>"
            )
        return f"<div>{''.join(blocks)}</div>"


class Shown:
    """Base of everything that shows itself by its `glance`."""

    __slots__ = ()

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep `dataclass` from writing a repr that has all tables and tensors in it."""
        super().__init_subclass__(**options)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Shown.__repr__

    def glance(self) -> Glance:
        """What the value shows."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return drawn(*self.glance().parts(type(self).__name__))

    def _repr_html_(self) -> str:
        return self.glance().html(type(self).__name__)


def drawn(*parts: str | Grid | Glance, colour: bool = False) -> str:
    """Draw lines and tables with rich.

    Lines are wrapped at the width of the terminal. Where standard output is not a terminal, each
    line and each row of a table stays on one line.

    Args:
        parts: What is drawn. Control characters are replaced by spaces.
        colour: Whether to use colours and bold text.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = io.StringIO()
    console = Console(
        file=screen,
        width=shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH,
        force_terminal=colour,
        color_system="standard" if colour else None,
        force_jupyter=False,
        legacy_windows=False,
    )
    for part in (one for p in parts for one in (p.parts() if isinstance(p, Glance) else (p,))):
        if isinstance(part, str):
            style = "bold" if isinstance(part, Title) else ""
            console.print(Text(printable(part), style), overflow="fold")
            continue
        if part.title:
            console.print()
            console.print(Text(printable(part.title), "bold"), overflow="fold")
        grid = Table(box=None, pad_edge=False, padding=(0, 1), show_header=any(part.header))
        for title, side in zip(part.header, part.sides or "l" * len(part.header), strict=True):
            grid.add_column(
                Text(printable(title)), justify="right" if side == "r" else "left", overflow="fold"
            )
        for cells in part.rows:
            styles = (
                COLOURS.get(cell, "") if title == STATE else ""
                for title, cell in zip(part.header, cells, strict=True)
            )
            grid.add_row(*map(Text, map(printable, cells), styles))
        console.print(grid)
    return "\n".join(line.rstrip() for line in screen.getvalue().splitlines())


def fraction(value: float) -> str:
    """A number between 0 and 1 to three digits, without the zero in front.

    >>> fraction(0.25), fraction(1.0)
    ('.250', '1.000')
    """
    return f"{value:.3f}".removeprefix("0") if value < 0.9995 else f"{value:.3f}"


def singular(text: str) -> str:
    """A text with "1 facts" and the like as "1 fact".

    >>> singular("1 facts of 11 facts, 0.1 facts")
    '1 fact of 11 facts, 0.1 facts'
    """
    return ONE.sub(r"1 \1", text)


def signed(value: float) -> str:
    """A number with its sign, to two digits; zero has no sign.

    >>> signed(0.254), signed(-0.001)
    ('+0.25', '0.00')
    """
    return re.sub(r"^[+-](0\.00)$", r"\1", f"{value:+.2f}")


def named(names: Sequence[str], *, most: int = 3) -> str:
    """The first names, and how many more there are.

    >>> named(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def printable(text: str) -> str:
    """A text with every control character replaced by a space, so that none steers a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


class _Forms(string.Formatter):
    """Format strings with the formats `fraction` and `signed`, and a dash for what is missing."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or (not isinstance(value, str) and str(value) in ("nan", "<NA>", "NaT")):
            return "-"
        named_formats: dict[str, Any] = {"fraction": fraction, "signed": signed}
        return named_formats.get(format_spec, lambda one: format(one, format_spec))(value)


_FORMS = _Forms()
