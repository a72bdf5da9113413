"""The SQLite file of finished readings. It is checked when opened, and set aside if damaged.

Write-ahead logging lets several processes read and write one file, and a process that is killed
loses no finished transaction. A file that is damaged, or is not a store of this
version, is renamed, never deleted, and a new one takes its place. A file that cannot be used (disk
full, no permission, locked for a minute) is not touched again in this run. Both raise a
`StoreWarning`.
"""

from __future__ import annotations

import glob
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

from hijacklens.errors import InputError, warn

T = TypeVar("T")

APPLICATION_ID = 0x686A6C73
"""Identifies our files in the SQLite header: "hjls"."""

SCHEMA = 3
"""Version of the tables and their content; raise it when older readings must not be used."""

BUSY_SECONDS = 60.0
"""How long to wait for another process that is writing."""

TABLES = (
    """CREATE TABLE fingerprints (
        id INTEGER PRIMARY KEY AUTOINCREMENT, -- the id of a cleared fingerprint is never reused
        key TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL,
        revision TEXT,
        architecture TEXT NOT NULL,
        parameters INTEGER NOT NULL,
        arithmetic TEXT NOT NULL,
        weights TEXT NOT NULL,
        computation TEXT NOT NULL,
        tokenizer TEXT NOT NULL,
        probes TEXT NOT NULL,
        spans TEXT NOT NULL,
        versions TEXT NOT NULL,
        created TEXT NOT NULL DEFAULT (datetime('now'))
    )""",
    """CREATE TABLE readings (
        fingerprint INTEGER NOT NULL,
        prefix BLOB NOT NULL,
        top_token INTEGER NOT NULL,
        top_logprob REAL NOT NULL,
        logprobs TEXT NOT NULL, -- JSON: token id -> log-probability
        checksum INTEGER NOT NULL,
        PRIMARY KEY (fingerprint, prefix)
    ) WITHOUT ROWID""",
    f"PRAGMA user_version = {SCHEMA}",
    f"PRAGMA application_id = {APPLICATION_ID}",
)


class StoreWarning(UserWarning):
    """The store was damaged and set aside, or is no longer used in this run."""


class StoreOffWarning(StoreWarning):
    """The store is no longer used in this run."""


class DamagedError(sqlite3.DatabaseError):
    """The file is not a store of this version, or a value in it is not the one written."""


class Database:
    """A connection that replaces a damaged file, and gives up on one that cannot be used."""

    off: str
    """Why the file is no longer used; empty while it is."""

    def __init__(self, path: Path, *, must: bool = False) -> None:
        """Open nothing yet; a file that `must` be opened and cannot be raises an error."""
        self.path = path
        self.off = ""
        self._must = must
        self._connection: sqlite3.Connection | None = None
        self._opened: os.stat_result | None = None

    def attempt(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Return the result of `work`, or `otherwise` if the file cannot be used.

        If the file turns out to be damaged, it is set aside and `work` runs on a new one.

        Raises:
            InputError: The file cannot be opened, and it `must`.
        """
        for attempts_left in (1, 0):
            if self.off:
                break
            try:
                result = work(self._connect())
            except (sqlite3.Error, OSError, ValueError, TypeError) as error:
                self.close()
                # A full, locked or inaccessible file raises a subclass, OperationalError. Damaged
                # text and JSON raise errors that are not SQLite's.
                damaged = type(error) in (sqlite3.DatabaseError, DamagedError)
                damaged |= isinstance(error, (ValueError, TypeError))
                if damaged and attempts_left:
                    self._set_aside(error)
                else:
                    self._give_up(error)
            else:
                self._must = False
                return result
        return otherwise

    def close(self) -> None:
        """Close the connection; the next attempt opens it again."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with suppress(sqlite3.Error):
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._opened = self.path.stat() if self.path.exists() else None
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
            warn(
                f"the store of finished readings {str(self.path)!r} is broken ({error}). It was "
                f"set aside as {aside.name!r}, and a new store is used from here on.",
                StoreWarning,
            )

    def _give_up(self, error: Exception) -> None:
        self.off = f"cannot be used ({error})"
        if self._must:
            raise InputError(
                f"the store {str(self.path)!r} {self.off}. Name another file, or use no store."
            ) from error
        warn(
            f"the store of finished readings {str(self.path)!r} {self.off}. This run continues "
            "without it, so its further readings are not stored for the next run.",
            StoreOffWarning,
        )


def connect(path: Path) -> sqlite3.Connection:
    """Open a store, and create the tables in a new or empty file.

    Raises:
        DamagedError: The database belongs to another program or another version.
        sqlite3.DatabaseError: The file is not a database, or is damaged.
        sqlite3.OperationalError: The file cannot be opened or written.
    """
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    # Damaged text must fail its checksum, not the decoding.
    connection.text_factory = lambda text: text.decode(errors="replace")
    try:
        with transaction(connection, "DEFERRED"):  # another process may be creating the tables
            created = _has_tables(connection)
        if not created:
            with transaction(connection):
                if not _has_tables(connection):  # another process may have created them first
                    for statement in TABLES:
                        connection.execute(statement)
        _use_write_ahead_log(connection)
        # Safe when the process is killed; a power cut may lose the last transactions.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA cache_size = -65536")  # KiB
    except BaseException:
        connection.close()
        raise
    return connection


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Give the file a write-ahead log, so that readers and a writer do not wait for each other.

    The file keeps it. While another process uses a new file, SQLite may refuse the change without
    waiting; then that process makes the change, or the next one that opens the file.
    """
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise


def _has_tables(connection: sqlite3.Connection) -> bool:
    """Return whether the tables exist; raise `DamagedError` unless they do or the file is empty."""
    ((application,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if not names and application == version == 0:
        return False
    if application != APPLICATION_ID:
        raise DamagedError("it is a database of another program")
    if version != SCHEMA:
        raise DamagedError(f"it is of version {version}, and this program writes version {SCHEMA}")
    if not {"fingerprints", "readings"} <= names:
        raise DamagedError("it lacks tables")
    return True


@contextmanager
def transaction(
    connection: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE"
) -> Iterator[None]:
    """Run the body as one transaction: either all of it is kept, or nothing.

    All that it reads is the file at one moment. `IMMEDIATE` waits for other writers at the start;
    `DEFERRED` is for bodies that only read.
    """
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # report the first error, not this one
            connection.execute("ROLLBACK")
        raise


def set_aside(path: Path, opened: os.stat_result | None) -> Path | None:
    """Rename a damaged store, with its log, to a free name in the same folder, and return that.

    Return None if the file that was `opened` is no longer there: if another process has put a new
    one in its place, the new one stays.
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
    """Return the files that were set aside from a path."""
    aside = path.parent.glob(f"{glob.escape(path.name)}.aside-*")
    return sorted(file for file in aside if not file.name.endswith(("-wal", "-shm")))
