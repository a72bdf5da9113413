"""The SQLite file that finished readings are kept in: opened, checked, set aside when broken.

Write-ahead logging lets several processes read and write one file, and a process that is killed
leaves every finished transaction behind. A file that is damaged, or that is not such a store, is
renamed, never deleted, and a new one takes its place. A file that cannot be used (disk full, no
permission, locked for a minute) is left alone from then on. Both are told in a `StoreWarning`.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from hijacklens.engine.reading import Reading
from hijacklens.errors import InputError
from hijacklens.prompts.tokens import TokenIds

T = TypeVar("T")

APPLICATION_ID = 0x686A6C73
"""Stands in the header of a file of ours: "hjls"."""

SCHEMA = 1
"""Version of the tables and of what is in them; raise it when older readings may not be used."""

BUSY_SECONDS = 60.0
"""How long to wait for another process that is writing."""

TABLES = (
    """CREATE TABLE sources (
        id INTEGER PRIMARY KEY AUTOINCREMENT, -- one that was cleared is never used again
        key TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL,
        revision TEXT,
        architecture TEXT NOT NULL,
        parameters INTEGER NOT NULL,
        arithmetic TEXT NOT NULL,
        weights TEXT NOT NULL,
        configuration TEXT NOT NULL,
        tokenizer TEXT NOT NULL,
        probes TEXT NOT NULL,
        spans TEXT NOT NULL,
        versions TEXT NOT NULL,
        created TEXT NOT NULL DEFAULT (datetime('now'))
    )""",
    """CREATE TABLE readings (
        source INTEGER NOT NULL,
        prefix BLOB NOT NULL,
        reading BLOB NOT NULL,
        PRIMARY KEY (source, prefix)
    ) WITHOUT ROWID""",
    f"PRAGMA user_version = {SCHEMA}",
    f"PRAGMA application_id = {APPLICATION_ID}",
)


class StoreWarning(UserWarning):
    """The store was broken and set aside, or is not used any more in this run."""


class DamagedError(sqlite3.DatabaseError):
    """The file is not a store of this version, or something in it is not what was written."""


class Database:
    """A connection that mends itself: work is done on it, or it says why it cannot be."""

    off: str
    """Why the file is not used any more; empty while it is."""

    def __init__(self, path: Path, *, must: bool = False) -> None:
        """Open nothing yet.

        Args:
            path: The file; it and its folder are made when needed.
            must: Raise if the file cannot be used from the first, rather than do without.
        """
        self.path = path
        self.off = ""
        self._must = must
        self._connection: sqlite3.Connection | None = None
        self._opened: os.stat_result | None = None

    def attempt(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What some work on the file gives, or `otherwise` where the file cannot be used.

        If the file turns out to be broken it is set aside, and the work done on a new one.

        Raises:
            InputError: The file cannot even be opened, and it `must`.
        """
        for attempts_left in (1, 0):
            if self.off:
                break
            try:
                done = work(self._connected())
            except (sqlite3.Error, OSError, ValueError, TypeError) as error:
                self.close()
                # What is full, locked or not to be opened raises OperationalError, derived from it;
                # texts and JSON that are damaged raise errors that are none of SQLite's.
                broken = type(error) in (sqlite3.DatabaseError, DamagedError)
                broken |= isinstance(error, (ValueError, TypeError))
                if broken and attempts_left:
                    self._set_aside(error)
                else:
                    self._give_up(error)
            else:
                self._must = False
                return done
        return otherwise

    def close(self) -> None:
        """Close the connection; the next work opens it again."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with suppress(sqlite3.Error):
                connection.close()

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._opened = None
            with suppress(FileNotFoundError):
                self._opened = self.path.stat()
            self._connection = connect(self.path)
            self._opened = self.path.stat()
        return self._connection

    def _set_aside(self, error: Exception) -> None:
        try:
            aside = set_aside(self.path, self._opened)
        except OSError as refused:
            self._give_up(refused)
            return
        if aside is not None:
            warnings.warn(
                f"the store of finished readings {str(self.path)!r} is broken ({error}). It was "
                f"set aside as {aside.name!r} and a new one is begun.",
                StoreWarning,
                stacklevel=4,
            )

    def _give_up(self, error: Exception) -> None:
        self.off = f"cannot be used ({error})"
        if self._must:
            raise InputError(
                f"the store {str(self.path)!r} {self.off}. Name another file, or use no store."
            ) from error
        warnings.warn(
            f"the store of finished readings {str(self.path)!r} {self.off}. This run goes on "
            "without it: what it computes from here on is not kept for the next one.",
            StoreWarning,
            stacklevel=4,
        )


def connect(path: Path) -> sqlite3.Connection:
    """Open a store, and make its tables in a new or empty file.

    Raises:
        DamagedError: It is a database of something else, or of another version.
        sqlite3.DatabaseError: It is no database, or is damaged.
        sqlite3.OperationalError: It cannot be opened or written.
    """
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        if not _has_tables(connection):
            with transaction(connection):
                if not _has_tables(connection):  # another process may have been faster
                    for statement in TABLES:
                        connection.execute(statement)
        connection.execute("PRAGMA journal_mode = WAL")
        # Keeps all when the process is killed; a power cut may take the last transactions.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA cache_size = -65536")  # KiB
    except BaseException:
        connection.close()
        raise
    return connection


def _has_tables(connection: sqlite3.Connection) -> bool:
    """Whether the tables are there; False for an empty file.

    Raises:
        DamagedError: Something else is there.
    """
    ((application,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if not names and application == version == 0:
        return False
    if application != APPLICATION_ID:
        raise DamagedError("it is a database of another program")
    if version != SCHEMA:
        raise DamagedError(f"it is of version {version}, and this program writes version {SCHEMA}")
    if not {"sources", "readings"} <= names:
        raise DamagedError("it lacks tables")
    return True


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the body as one transaction that writes: all of it is kept, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # the first error is the one to tell
            connection.execute("ROLLBACK")
        raise


def set_aside(path: Path, opened: os.stat_result | None) -> Path | None:
    """Rename a broken store, with its log, to a free name beside it.

    Args:
        path: The file.
        opened: The file that was found broken. If another process has put a new one in its
            place, that one stays.

    Returns:
        The new name, or None where the broken file is not there any more.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    try:
        if opened is None or not os.path.samestat(path.stat(), opened):
            return None
        path.rename(aside)
    except FileNotFoundError:
        return None
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return aside


def aside_from(path: Path) -> list[Path]:
    """The files that were set aside from a path."""
    if not path.parent.is_dir():
        return []
    return sorted(
        file
        for file in path.parent.iterdir()
        if file.name.startswith(f"{path.name}.aside-") and not file.name.endswith(("-wal", "-shm"))
    )


_PAIR, _CHECKSUM = struct.Struct("<id"), struct.Struct("<I")


def name_of(prefix: TokenIds) -> bytes:
    """16 bytes that name the symbols of a prefix."""
    symbols = struct.pack(f"<{len(prefix)}q", *prefix)
    return hashlib.blake2b(symbols, digest_size=16).digest()


def is_finite(reading: Reading) -> bool:
    """Whether every number of a reading is finite; others are not stored."""
    return math.isfinite(reading.top_logprob) and all(map(math.isfinite, reading.logprobs.values()))


def merge(old: Reading, new: Reading) -> Reading:
    """The tokens of two readings of one prefix; what the old one has does not change."""
    return Reading({**new.logprobs, **old.logprobs}, old.top_token, old.top_logprob)


def encode(name: bytes, reading: Reading) -> bytes:
    """The top token, then every token with its log-probability, then a checksum over all."""
    pairs = sorted(reading.logprobs.items())
    body = _PAIR.pack(reading.top_token, reading.top_logprob) + b"".join(
        _PAIR.pack(token, logprob) for token, logprob in pairs
    )
    return body + _CHECKSUM.pack(zlib.crc32(name + body))


def decode(name: bytes, stored: Any) -> Reading:
    """The reading that `encode` wrote.

    Raises:
        DamagedError: It is not what was written.
    """
    stored = stored if isinstance(stored, bytes) else b""
    body, end = stored[: -_CHECKSUM.size], stored[-_CHECKSUM.size :]
    if not body or len(body) % _PAIR.size or end != _CHECKSUM.pack(zlib.crc32(name + body)):
        raise DamagedError("a reading in it is not what was written")
    (top_token, top_logprob), *pairs = _PAIR.iter_unpack(body)
    return Reading(dict(pairs), top_token, top_logprob)
