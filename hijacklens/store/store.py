"""The store: finished readings on disk, so that no run computes again what one has computed.

Every batch is written as it is finished (contract 5). A run that was killed therefore goes on
where it was, one with more doses or other facts computes only what is missing, and two processes
share what they find. Readings go by their source (`hijacklens.store.fingerprint`: weights,
settings, tokenizer, arithmetic, probes) and by the symbols of their prefix; texts are not stored.
Readings that are not finite are never kept. What happens to a broken or unusable file is in
`hijacklens.store.database`; it never stops a run.

The file is `readings-v1.sqlite` in the cache folder (`HIJACKLENS_CACHE` moves it), or the one that
`HIJACKLENS_STORE` names; `HIJACKLENS_STORE=off` turns it off. A reading takes some 70 bytes.

>>> import tempfile
>>> Store(Path(tempfile.mkdtemp()) / "new.sqlite").contents().rows
()
"""

from __future__ import annotations

import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pandas as pd

from hijacklens.engine.reading import Reading, Requests
from hijacklens.errors import unknown
from hijacklens.files import cache_folder, expand_home, named_path
from hijacklens.models.hooked import HookedModel, unnamed_hooks
from hijacklens.models.identity import ModelIdentity
from hijacklens.probe import Probe
from hijacklens.prompts.tokens import TokenIds
from hijacklens.store.database import (
    SCHEMA,
    Database,
    StoreWarning,
    aside_from,
    decode,
    encode,
    is_finite,
    merge,
    name_of,
    transaction,
)
from hijacklens.store.fingerprint import Source, source_of

VARIABLE = "HIJACKLENS_STORE"
"""Environment variable: the file of the store, or `off`."""
LOOKED_UP = 500
"""Prefixes in one query; every SQLite takes that many values."""
T = TypeVar("T")


class OpenStore:
    """The readings of one source in a store that is open, or in none."""

    def __init__(
        self, database: Database | None, source: Source | None, *, off: str = "turned off"
    ) -> None:
        """Take a database, or None and the reason why there is none."""
        self._database = database
        self._source = source
        self._why_none = off

    @property
    def path(self) -> Path | None:
        """The file, or None where there is none."""
        return None if self._database is None else self._database.path

    @property
    def off(self) -> str:
        """Why the store is not used (any more); empty while it is."""
        return self._why_none if self._database is None else self._database.off

    def find(self, requests: Requests) -> dict[TokenIds, Reading]:
        """The readings that are there, with every token that is requests; others are left out."""
        if self._database is None:
            return {}
        names = {name_of(prefix): prefix for prefix in requests}
        found = self._database.attempt(lambda connection: self._find(connection, names), {})
        return {
            prefix: reading
            for prefix, reading in found.items()
            if all(token in reading.logprobs for token in requests[prefix])
        }

    def keep(self, readings: Mapping[TokenIds, Reading]) -> None:
        """Write readings, all at once; those that are not finite are left out.

        Where a prefix was read before, the tokens of both readings are kept, and numbers that
        are there do not change.
        """
        names = {name_of(prefix): prefix for prefix in readings if is_finite(readings[prefix])}
        if self._database is not None and names:
            self._database.attempt(lambda connection: self._keep(connection, names, readings), None)

    def _find(
        self, connection: sqlite3.Connection, names: Mapping[bytes, TokenIds]
    ) -> dict[TokenIds, Reading]:
        number = self._number(connection)
        if number is None:
            return {}
        found: dict[TokenIds, Reading] = {}
        rest = iter(names)
        while some := tuple(islice(rest, LOOKED_UP)):
            rows = connection.execute(
                "SELECT prefix, reading FROM readings WHERE source = ? AND prefix IN "
                f"({', '.join('?' * len(some))})",
                (number, *some),
            )
            for name, stored in rows:
                found[names[name]] = decode(name, stored)
        return found

    def _keep(
        self,
        connection: sqlite3.Connection,
        names: Mapping[bytes, TokenIds],
        readings: Mapping[TokenIds, Reading],
    ) -> None:
        with transaction(connection):
            number = self._number(connection, make=True)
            old = self._find(connection, names)
            rows: list[tuple[int | None, bytes, bytes]] = []
            for name, prefix in names.items():
                reading = readings[prefix]
                whole = merge(old[prefix], reading) if prefix in old else reading
                if whole != old.get(prefix):
                    rows.append((number, name, encode(name, whole)))
            connection.executemany("INSERT OR REPLACE INTO readings VALUES (?, ?, ?)", rows)

    def _number(self, connection: sqlite3.Connection, *, make: bool = False) -> int | None:
        """The number of the source in the file; looked up anew, as it may have been cleared."""
        assert self._source is not None
        if make:
            fields = {
                **asdict(self._source),
                "key": self._source.key,
                "probes": json.dumps(self._source.probes),
                "spans": json.dumps(self._source.spans),
            }
            columns, marks = ", ".join(fields), ", ".join("?" * len(fields))
            connection.execute(
                f"INSERT OR IGNORE INTO sources ({columns}) VALUES ({marks})",
                tuple(fields.values()),
            )
        named = "SELECT id FROM sources WHERE key = ?"
        row = connection.execute(named, (self._source.key,)).fetchone()
        return None if row is None else row[0]


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds of one source."""

    model: str
    revision: str | None
    arithmetic: str
    probes: tuple[str, ...]
    readings: int
    versions: str
    """Of torch and TransformerLens when the first reading was kept."""
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
    """Broken files that were set aside; they are never used again."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per source."""
        columns = list(Stored.__dataclass_fields__)
        return pd.DataFrame([asdict(row) for row in self.rows], columns=columns)


@dataclass(frozen=True, slots=True)
class Store:
    """A file of finished readings; it is made when it is first used."""

    path: Path

    def contents(self) -> Contents:
        """Which models have how many readings in it.

        Raises:
            InputError: The file cannot be opened.
        """
        rows: list[Stored] = []
        files = [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]
        if self.path.exists():
            rows = self._do(_contents, rows)
        return Contents(
            path=self.path,
            size=sum(file.stat().st_size for file in files if file.exists()),
            rows=tuple(rows),
            aside=tuple(aside_from(self.path)),
        )

    def count(self, *, model: str | None = None) -> int:
        """How many readings there are, of one model or of all.

        Raises:
            InputError: The store has no model of that name, or the file cannot be opened.
        """
        rows = self.contents().rows
        names = {row.model for row in rows}
        if model is not None and model not in names:
            raise unknown("model in the store", model, names)
        return sum(row.readings for row in rows if model in (None, row.model))

    def clear(self, *, model: str | None = None) -> int:
        """Delete the readings of one model, or all, and give their space back.

        Returns:
            How many readings were deleted.

        Raises:
            InputError: The store has no model of that name, or the file cannot be written.
        """
        counted = self.count(model=model)
        if counted:
            self._do(lambda connection: _clear(connection, model), None)
        return counted

    def _do(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        with closing(Database(self.path, must=True)) as database:
            return database.attempt(work, otherwise)


def usual_store() -> Store:
    """The store in the cache folder, or the one that `HIJACKLENS_STORE` names."""
    given = os.environ.get(VARIABLE, "off")
    default = cache_folder() / f"readings-v{SCHEMA}.sqlite"
    return Store(default if given in ("", "off") else expand_home(given))


def chosen_store(store: Store | str | Path | bool) -> Store | None:
    """The store that is meant by a store, its file, True for the usual one, or False for none."""
    if store is True:
        return None if os.environ.get(VARIABLE) == "off" else usual_store()
    if store is False or isinstance(store, Store):
        return store or None
    return Store(named_path(store, "store of readings"))


@contextmanager
def open_store(
    store: Store | str | Path | bool,
    model: HookedModel,
    identity: ModelIdentity,
    *,
    probes: Sequence[Probe] = (),
    spans: Sequence[str] = (),
) -> Iterator[OpenStore]:
    """The readings of a model as it is now, for the length of a run.

    Args:
        store: As `chosen_store` takes it. One that is named has to be usable; the usual one is
            done without where it is not.
        model: A hooked model. If hooks are on it that did not come as probes, nothing is stored.
        identity: As `hijacklens.models.identity.identify` gives it.
        probes: Those the model will be run with, in their order.
        spans: The spans that symbols mark.

    Raises:
        InputError: The store that is named cannot be used.
    """
    chosen = chosen_store(store)
    if chosen is None:
        yield OpenStore(None, None)
        return
    if unnamed_hooks(model):
        off = "is not used: hooks are on the model that did not come as probes"
        warnings.warn(
            f"the store of finished readings {off}, so what they do has no name. Nothing is "
            "taken from it or kept; pass probes=[HookProbe(name, hooks)] to use it.",
            StoreWarning,
            stacklevel=4,
        )
        yield OpenStore(None, None, off=off)
        return
    source = source_of(model, identity, probes=probes, spans=spans)
    with closing(Database(chosen.path, must=not isinstance(store, bool))) as database:
        yield OpenStore(database, source)


def _contents(connection: sqlite3.Connection) -> list[Stored]:
    rows = connection.execute(
        "SELECT model, revision, arithmetic, probes, count, versions, created FROM sources JOIN "
        "(SELECT source, count(*) AS count FROM readings GROUP BY source) ON source = id "
        "ORDER BY id"
    )
    return [
        Stored(model, revision, arithmetic, tuple(json.loads(probes)), *rest)
        for model, revision, arithmetic, probes, *rest in rows
    ]


def _clear(connection: sqlite3.Connection, model: str | None) -> None:
    with transaction(connection):
        which = "(SELECT id FROM sources WHERE ?1 IS NULL OR model = ?1)"
        connection.execute(f"DELETE FROM readings WHERE source IN {which}", (model,))
        connection.execute("DELETE FROM sources WHERE ?1 IS NULL OR model = ?1", (model,))
    connection.execute("VACUUM")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
