"""Tables of results of geometry and memory fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from hijacklens.errors import InputError


def write_table(table: pd.DataFrame) -> Callable[[Path], None]:
    """What writes a table of a result to a file."""
    return lambda path: table.to_parquet(path, index=False)


def read_table(folder: Path, name: str, *, columns: Sequence[str]) -> pd.DataFrame:
    """A table of a saved result.

    Raises:
        InputError: The file is missing, cannot be read or lacks columns.
    """
    try:
        table = pd.read_parquet(folder / name)
    except (OSError, ValueError) as error:
        raise InputError(f"the result in {str(folder)!r} is not whole: {error}") from error
    missing = sorted(set(columns) - set(table.columns))
    if missing:
        raise InputError(f"{folder / name} lacks columns: {missing}.")
    return table
