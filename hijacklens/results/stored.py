"""How each field of a result is stored, by its type.

A `DataFrame` becomes a table in a separate file, an array an entry of a `.npz` file, and everything
else (settings, numbers, texts, frozen dataclasses) an entry of `result.json` under the field's
name. Pydantic checks and converts these entries when they are read. `Annotated` names the file of
an array, or of a table where the default does not fit:

    verdicts: pd.DataFrame                                      # verdicts.parquet
    skipped: Annotated[pd.DataFrame, Stored("skipped.csv")]
    shift: Annotated[Float[np.ndarray, " fact"], Stored("search.npz")]
    model: Annotated[HookedLanguageModel | None, NOT_STORED] = None
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile
from pydantic import TypeAdapter
from pydantic_core import to_json

from hijacklens.errors import InputError
from hijacklens.files import check_size


@dataclass(frozen=True, slots=True)
class Stored:
    """The file of a field, and its required contents."""

    file: str
    """Ends in `.parquet`, `.csv` or `.npz`; fields may share an `.npz` file."""
    columns: tuple[str, ...] = ()
    """Columns that the table must have."""
    dtypes: Mapping[str, Any] = field(default_factory=dict)
    """Types of columns of a CSV file. With a text column among them, only the empty cells of the
    other columns count as missing: a subject may be called "NA"."""
    encode: Callable[[Any], Any] = lambda value: value
    """From the value to a table or array; None if there is nothing to store."""
    decode: Callable[[Any, Mapping[str, Any]], Any] = lambda stored, record: stored
    """From the table or array and the record to the value."""


EXACT: dict[str, Any] = {} if pd.__version__ >= "3" else {"float_precision": "round_trip"}
"""The parser of earlier versions of pandas may be off by the last bit."""
FORMULA = re.compile(r"^'*[=+\-@\t\r]")
"""The beginning of a text that a spreadsheet may run, or of one that looks like it in our files."""
NOT_STORED = Stored("")
"""For a field that is not saved; it needs a default."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a result type: in a file (`stored`), or in the record by a Pydantic `adapter`."""

    name: str
    stored: Stored | None
    adapter: Any
    has_default: bool


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet or CSV, whichever the file name says, without its index.

    In a CSV file, a text that a spreadsheet would take for a formula follows an apostrophe.
    """
    if path.suffix != ".csv":
        table.to_parquet(path, index=False)
        return
    # Unquoted, a carriage return inside a text would end the row.
    returns = next(_matching(table, re.compile("\r")), None) is not None
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    _in_texts(table, FORMULA, r"'\g<0>").to_csv(path, index=False, quoting=quoting)


def _in_texts(table: pd.DataFrame, pattern: re.Pattern[str], new: str) -> pd.DataFrame:
    """Return a table with a pattern replaced in the cells that are text."""
    changed = {
        name: column.map(lambda cell: pattern.sub(new, cell) if isinstance(cell, str) else cell)
        for name, column in _matching(table, pattern)
    }
    return table.assign(**changed)


def _matching(table: pd.DataFrame, pattern: re.Pattern[str]) -> Iterator[tuple[str, pd.Series]]:
    """Yield the columns in which the pattern is found in a text."""
    for name, column in table.select_dtypes(include=["object", "string"]).items():
        if any(isinstance(cell, str) and pattern.search(cell) for cell in column):
            yield str(name), column


def writers(result: Any) -> dict[str, Callable[[Path], None]]:
    """Return file name -> function that writes it, for the tables and arrays of a result."""
    files: dict[str, Callable[[Path], None]] = {}
    arrays: dict[str, dict[str, Any]] = {}
    for item in _fields(type(result)):
        if item.stored is None:
            continue
        name, value = item.stored.file, item.stored.encode(getattr(result, item.name))
        if value is None:
            continue
        if name.endswith(".npz"):
            arrays.setdefault(name, {})[item.name] = value
            files[name] = partial(_write_arrays, arrays[name])
        else:
            files[name] = partial(write_table, value)
    return files


def to_record(result: Any) -> dict[str, Any]:
    """Return the fields of a result that belong in `result.json`, as plain JSON values.

    JSON has no NaN and no infinity: they become the texts "NaN", "Infinity" and "-Infinity".
    """
    return {
        item.name: json.loads(
            to_json(
                item.adapter.dump_python(
                    getattr(result, item.name), fallback=_plain, warnings=False
                ),
                inf_nan_mode="strings",
                fallback=_plain,
            )
        )
        for item in _fields(type(result))
        if item.adapter is not None
    }


def read_fields(kind: type, folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of all fields of a result type; a missing one takes its default.

    Raises:
        InputError: A table lacks columns.
        OSError, ValueError, KeyError: Something is missing or does not have the right type.
    """
    values: dict[str, Any] = {}
    for item in _fields(kind):
        if item.adapter is not None:
            if item.name in record or not item.has_default:
                values[item.name] = item.adapter.validate_python(record[item.name])
        elif item.stored is not None:
            try:
                content = _read_file(folder / item.stored.file, item.name, item.stored)
            except (FileNotFoundError, KeyError):
                if not item.has_default:
                    raise
                continue
            values[item.name] = item.stored.decode(content, record)
    return values


@cache
def _fields(kind: type) -> tuple[_Field, ...]:
    """Return the fields of a result type that are saved."""
    hints, saved = get_type_hints(kind, include_extras=True), []
    for item in fields(kind):
        hint = hints[item.name]
        notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        default = Stored(f"{item.name}.parquet") if hint is pd.DataFrame else None
        stored = next((note for note in notes if isinstance(note, Stored)), default)
        has_default = (item.default, item.default_factory) != (MISSING, MISSING)
        if stored is not NOT_STORED:
            adapter = None if stored else TypeAdapter(hint)
            saved.append(_Field(item.name, stored, adapter, has_default))
    return tuple(saved)


def _read_file(path: Path, name: str, stored: Stored) -> Any:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    if path.suffix == ".parquet":
        check_size(path, ParquetFile(path).metadata.num_rows, "rows")
        table = pd.read_parquet(path)
    else:
        others = [column for column, dtype in stored.dtypes.items() if dtype is not str]
        has_text = len(others) < len(stored.dtypes)
        table = pd.read_csv(
            path,
            dtype=dict(stored.dtypes),
            keep_default_na=not has_text,
            na_values={column: [""] for column in others} if has_text else None,
            **EXACT,
        )
        table = _in_texts(table, re.compile(f"^'(?={FORMULA.pattern[1:]})"), "")
    if missing := set(stored.columns) - set(table.columns):
        raise InputError(f"{path} lacks columns: {sorted(missing)}.")
    return table


def _write_arrays(arrays: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # NumPy would add an ending to a name
        np.savez_compressed(file, **arrays)


def _plain(value: Any) -> Any:
    """Convert types that Pydantic does not know: NumPy numbers, and mappings other than dict."""
    return value.item() if isinstance(value, np.generic) else dict(value)
