"""A table on the page: its first rows as HTML, and all rows as packed data for the script.

The first rows are readable without scripts, for mail previews, printers and screen readers.
`tables.js` redraws them once a reader sorts or filters, and writes numbers in the same way.

Packed data are bytes that a browser expands: exact numbers, repeated texts once, gzip, base64.

    4 bytes     length of the header, little-endian
    header      JSON: rows, and of each column its name, kind and, for text, its values
    padding     to a multiple of 8 bytes
    columns     one after the other, each padded to 8 bytes:
                  float   float64       (NaN if missing)
                  whole   int32
                  text    int32 codes   (-1 if missing) into the header's values

Compared with JSON, 100,000 items take 40 per cent of the time and 80 per cent of the space.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import struct
from dataclasses import asdict
from decimal import ROUND_HALF_UP, Context, Decimal, localcontext
from typing import Any

import numpy as np
import pandas as pd

from hijacklens.facts.relations import relation_title
from hijacklens.results.exhibits import Table

LARGEST = 2**31 - 1
"""Whole numbers of at most this size are packed as int32."""
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


def pack(table: pd.DataFrame) -> str:
    """Pack a table, in base64.

    Texts and numbers keep their values. Whole numbers with gaps become decimal numbers; whole
    numbers of more than 32 bits and all other objects become their text.
    """
    columns, blocks = [], []
    for name in table.columns:
        kind, array, values = _encode(table[name])
        columns.append({"name": str(name), "kind": kind, **({"values": values} if values else {})})
        blocks.append(_padded(array.tobytes()))
    header = json.dumps({"rows": len(table), "columns": columns}).encode()
    start = _padded(struct.pack("<I", len(header)) + header)
    # Without a time, equal tables give equal pages.
    return base64.b64encode(gzip.compress(start + b"".join(blocks), 6, mtime=0)).decode()


def _encode(column: pd.Series) -> tuple[str, np.ndarray, list[str]]:
    """Return the kind of a column, its array and, for text, its values."""
    kinds = pd.api.types
    whole = kinds.is_integer_dtype(column) and not kinds.is_bool_dtype(column)
    if kinds.is_float_dtype(column) or (whole and column.isna().any()):
        return "float", column.to_numpy("<f8", na_value=np.nan), []
    if whole and column.between(-LARGEST, LARGEST).all():
        return "whole", column.to_numpy("<i4"), []
    codes, values = pd.factorize(column.astype(object).map(str, na_action="ignore"))
    return "text", codes.astype("<i4"), list(values)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def links(items: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """Find for every item the rows of its bare query (`bare`) and of its texts (`prompt`).

    A row that is missing is -1. The column `relation` has the id and the name.
    """
    keys = ["model", "scheme", "case_id"]
    bare = items.assign(bare=np.arange(len(items))).loc[items["dose"] == 0, [*keys, "bare"]]
    texts = prompts[["case_id", "scheme"]].assign(prompt=np.arange(len(prompts)))
    texts = texts.astype({"case_id": items["case_id"].dtype, "scheme": items["scheme"].dtype})
    rows = items[keys].merge(bare.drop_duplicates(keys), on=keys, how="left")
    rows = rows.merge(texts.drop_duplicates(keys[1:]), on=keys[1:], how="left")
    names = items["relation_id"].map(relation_title).to_numpy()
    return rows[["bare", "prompt"]].fillna(-1).astype(int).assign(relation=names)
