"""A table on the page: its first rows as HTML, and all rows as data for the script.

The first rows are readable without scripts, for mail previews, printers and screen readers.
`tables.js` redraws them once a reader sorts or filters, and writes numbers in the same way.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from decimal import ROUND_HALF_UP, Context, Decimal, localcontext
from typing import Any

import pandas as pd

from hijacklens.report.packing import pack
from hijacklens.results.exhibits import Table

FIRST_ROWS = 25
"""Rows of a table that are shown at a time."""
LARGE = 10**15
"""Numbers from here on are written with an exponent."""
HALVES_UP = Context(rounding=ROUND_HALF_UP)


def number(value: object, digits: int | None) -> str:
    """Write a number as the page does; a missing one is empty.

    Halves are rounded away from zero, as in JavaScript. A number that would round to zero is
    written with an exponent.

    >>> number(0.0625, 3), number(-1e-7, 3), number(3, None), number(float("nan"), 2)
    ('0.063', '-1.0e-7', '3', '')
    """
    if _missing(value):
        return ""
    if digits is None:
        return str(value)
    exact = Decimal(float(value))  # type: ignore[arg-type]
    if exact.is_infinite():
        return "∞" if exact > 0 else "-∞"
    with localcontext(HALVES_UP):
        if abs(exact) >= LARGE:
            return f"{exact:.3e}"
        text = f"{exact:.{digits}f}"
        if float(text) != 0:
            return text
        return f"{exact:.1e}" if exact else text.lstrip("-")


def table_part(table: Table) -> dict[str, Any]:
    """Return what the template shows of a table: heads, first rows, data and settings."""
    data, kinds = table.data, pd.api.types
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
    rows = rows.head(FIRST_ROWS)
    cells = [
        [_cell(value, column.digits) for value, column in zip(row, columns.values(), strict=True)]
        for row in rows.astype(object).itertuples(index=False, name=None)
    ]
    heads = [
        (column.label, kinds.is_numeric_dtype(data[name]) and not kinds.is_bool_dtype(data[name]))
        for name, column in columns.items()
    ]
    return {
        "settings": json.dumps(settings),
        "heads": heads,
        "rows": cells,
        "caption": f"{table.heading}: {len(rows)} of {len(data):,} rows",
        "data": pack(data),
    }


def _cell(value: object, digits: int | None) -> dict[str, Any]:
    """Return the text of a cell, whether it is a number, and its exact value for hovering."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        exact = None if digits is None or _missing(value) else value
        return {"text": number(value, digits), "number": True, "exact": exact}
    return {"text": "" if _missing(value) else str(value), "number": False}


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
