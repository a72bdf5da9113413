"""A table on the page: its first rows as HTML, and all of it as data for the script.

What stands in the HTML is what the reader sees when the page opens, so that a mail preview without
scripts, a printer and a screen reader have it too. `tables.js` takes over when something is asked
of the table; both write numbers the same way.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pandas as pd

from hijacklens.report.markup import attributes, paragraphs, script, shown
from hijacklens.report.packing import pack
from hijacklens.results.exhibits import Column, Table

FIRST_ROWS = 25
"""Rows of a table that are shown at a time."""
LARGE = 1e15
"""From here on a number is written with an exponent."""


def number(value: object, digits: int | None) -> str:
    """A number as the page writes it; empty where it is missing.

    Halves are rounded away from zero, as JavaScript does; what would be written as zero and is
    not has an exponent.

    >>> number(0.0625, 3), number(-1e-7, 3), number(3, None), number(float("nan"), 2)
    ('0.063', '-1.0e-7', '3', '')
    """
    if _missing(value):
        return ""
    if digits is None:
        return str(value)
    exact = float(value)  # type: ignore[arg-type]
    if exact in (float("inf"), float("-inf")):
        return "∞" if exact > 0 else "-∞"
    if abs(exact) >= LARGE:
        return _power(exact, 3)
    text = str(Decimal(exact).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))
    if float(text) != 0:
        return text
    return _power(exact, 1) if exact else text.lstrip("-")


def _power(value: float, digits: int) -> str:
    exact = Decimal(value)
    power = exact.adjusted()
    last = Decimal(1).scaleb(-digits)
    front = exact.scaleb(-power).quantize(last, ROUND_HALF_UP)
    if abs(front) == 10:
        front, power = (front / 10).quantize(last), power + 1
    return f"{front}e{power:+d}"


def table_html(table: Table, *, key: str) -> str:
    """The element of a table and its data.

    Args:
        table: The table.
        key: Begins the ids of its elements.
    """
    data = table.data
    columns = {str(name): table.column(name) for name in data.columns}
    settings = {
        "columns": {name: asdict(column) for name, column in columns.items()},
        "filters": list(table.filters),
        "chosen": dict(table.chosen),
        "file": table.file,
        "title": table.heading,
        "rows": FIRST_ROWS,
    }
    rows: Any = data
    for name, value in table.chosen.items():
        rows = rows[rows[name].astype(str) == value]
    head = "".join(
        f'<th scope="col"{attributes(class_=_side(data[name]))}>{shown(column.label)}</th>'
        for name, column in columns.items()
    )
    body = "".join(_row(row, list(columns.values())) for row in _values(rows.head(FIRST_ROWS)))
    caption = f"{table.heading}: {min(len(rows), FIRST_ROWS)} of {len(data):,} rows"
    return (
        f'<div class="table" id="{key}" data-settings="{shown(json.dumps(settings))}">'
        f"{paragraphs(table.note)}"
        '<div class="controls"></div>'
        f'<div class="scroll" role="region" tabindex="0"{attributes(aria_label=table.heading)}>'
        f"<table><caption>{shown(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
        f"{data_html(data, key=f'{key}-data')}</div>"
    )


def data_html(data: pd.DataFrame, *, key: str) -> str:
    """A packed table as an element that the script reads."""
    return script(pack(data), type="application/octet-stream", id=key)


def _values(rows: pd.DataFrame) -> list[tuple[object, ...]]:
    return list(rows.astype(object).itertuples(index=False, name=None))


def _row(values: tuple[object, ...], columns: list[Column]) -> str:
    cells = []
    for i, (value, column) in enumerate(zip(values, columns, strict=True)):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            exact = None if column.digits is None or _missing(value) else value
            cell = (
                f'<td class="number"{attributes(title=exact)}>{number(value, column.digits)}</td>'
            )
        else:
            text = "" if _missing(value) else shown(value)
            tag = 'th scope="row"' if i == 0 else "td"
            cell = f"<{tag}><bdi>{text}</bdi></{tag[:2]}>"
        cells.append(cell)
    return f"<tr>{''.join(cells)}</tr>"


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _side(values: pd.Series) -> str | None:
    kinds = pd.api.types
    numeric = kinds.is_numeric_dtype(values) and not kinds.is_bool_dtype(values)
    return "number" if numeric else None
