"""The file of the store: where it is, what it holds, how it is cleared. Imports nothing large."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hijacklens.errors import unknown
from hijacklens.files import cache_folder, expand_home, named_path, switch, variable
from hijacklens.store.database import SCHEMA, Database, aside_from, transaction

if TYPE_CHECKING:
    import pandas as pd

VARIABLE = "HIJACKLENS_STORE"
"""Environment variable: the file of the store, or `off`."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds of one fingerprint."""

    model: str
    revision: str | None
    arithmetic: str
    probes: tuple[str, ...]
    readings: int
    versions: str
    """Versions of torch and TransformerLens when the first reading was kept."""
    created: str
    """UTC."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a store."""

    path: Path
    size: int
    """Bytes on disk."""
    rows: tuple[Stored, ...]
    aside: tuple[Path, ...]
    """Damaged files that were set aside; they are never used again."""

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table with a row per fingerprint."""
        import pandas as pd  # clearing the store works without it

        columns = list(Stored.__dataclass_fields__)
        return pd.DataFrame([asdict(row) for row in self.rows], columns=columns)


@dataclass(frozen=True, slots=True)
class Store:
    """A file of finished readings; it is created when it is first used."""

    path: Path

    def contents(self) -> Contents:
        """Return how many readings of which models are stored.

        Raises:
            InputError: The file cannot be opened.
        """
        rows = self._attempt(_contents, []) if self.path.exists() else []
        files = [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]
        size = sum(file.stat().st_size for file in files if file.exists())
        return Contents(self.path, size, tuple(rows), tuple(aside_from(self.path)))

    def count(self, *, model: str | None = None) -> int:
        """Count the readings of one model, or of all.

        Raises:
            InputError: The store has no model of that name, or the file cannot be opened.
        """
        rows = self.contents().rows
        names = {row.model for row in rows}
        if model is not None and model not in names:
            raise unknown("model in the store", model, names)
        return sum(row.readings for row in rows if model in (None, row.model))

    def clear(self, *, model: str | None = None) -> int:
        """Delete the readings of one model, or of all, free their disk space, and count them.

        Raises:
            InputError: The store has no model of that name, or the file cannot be written.
        """
        counted = self.count(model=model)
        if counted:
            self._attempt(lambda connection: _clear(connection, model), None)
        return counted

    def _attempt(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        with closing(Database(self.path, must=True)) as database:
            return database.attempt(work, otherwise)


def usual_store() -> Store:
    """Return the store in the cache folder, or the one that `HIJACKLENS_STORE` names."""
    named = variable(VARIABLE)
    default = cache_folder() / f"readings-v{SCHEMA}.sqlite"
    return Store(default if switch(named) is not None else expand_home(named))


def chosen_store(store: Store | str | Path | bool) -> Store | None:
    """Return a store, the store in a file, the usual store for True, or None for False."""
    if store is True:
        return None if switch(variable(VARIABLE)) is False else usual_store()
    if store is False or isinstance(store, Store):
        return store or None
    return Store(named_path(store, "store of readings"))


def _contents(connection: sqlite3.Connection) -> list[Stored]:
    rows = connection.execute(
        "SELECT model, revision, arithmetic, probes, count, versions, created FROM fingerprints "
        "JOIN (SELECT fingerprint, count(*) AS count FROM readings GROUP BY fingerprint) "
        "ON fingerprint = id ORDER BY id"
    )
    return [
        Stored(model, revision, arithmetic, tuple(json.loads(probes)), *rest)
        for model, revision, arithmetic, probes, *rest in rows
    ]


def _clear(connection: sqlite3.Connection, model: str | None) -> None:
    with transaction(connection):
        ids = "(SELECT id FROM fingerprints WHERE ?1 IS NULL OR model = ?1)"
        connection.execute(f"DELETE FROM readings WHERE fingerprint IN {ids}", (model,))
        connection.execute("DELETE FROM fingerprints WHERE ?1 IS NULL OR model = ?1", (model,))
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
