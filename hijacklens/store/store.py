"""The store: finished readings on disk, so that no run computes again what one has computed.

Finished batches are written during the run (contract 5): each at once if writing is quick compared
with computing, and otherwise several together, so that writing takes a twentieth of the time at
most. A run that was killed therefore resumes where it stopped, a run with more doses or other facts
computes only what is missing, and two processes share their readings. Readings are keyed by a
fingerprint of the model (`hijacklens.store.fingerprint`: tensors, computation, tokenizer,
arithmetic, probes) and a hash of the symbols of their prefix; texts are not stored. A run that
finds readings computes a few of them again, and deletes those of the fingerprint if they differ. A
damaged or unusable file never stops a run (`hijacklens.store.database`).

The file is `readings-v3.sqlite` in the cache folder (`HIJACKLENS_CACHE` moves the folder), or the
file that `HIJACKLENS_STORE` names; `HIJACKLENS_STORE=off` turns the store off. A reading takes
some 95 bytes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from hijacklens.engine.reading import Reading, Readings, Requests
from hijacklens.errors import warn
from hijacklens.prompts.prefixes import Prefix
from hijacklens.prompts.tokens import TokenIds
from hijacklens.store.contents import Store, chosen_store
from hijacklens.store.database import (
    DamagedError,
    Database,
    StoreOffWarning,
    StoreWarning,
    transaction,
)
from hijacklens.store.fingerprint import Fingerprint

CHECKED = 3
"""Number of stored readings that every run computes again."""
TOLERANCE = 2e-4
"""Largest difference of a stored and a computed log-probability in full float32 or float64, nats:
both are within 1e-4 of a plain forward pass (contract 1)."""
ROUNDED_TOLERANCE = 1.0
"""The same for arithmetic of lower precision, where batches of other sizes round differently."""
PATIENCE = 20.0
"""Readings wait for this many times as long as the last writing took, since a transaction rewrites
a page of the file for nearly every reading."""
LOOKED_UP = 500
"""Prefixes in one query; every SQLite accepts that many values."""
StoredReading: TypeAlias = tuple[int, float, dict[int, float]]
"""The likeliest token, its log-probability, and token -> log-probability, in nats."""


class OpenStore:
    """The stored readings of one fingerprint, or a stand-in if there is no store."""

    def __init__(
        self, database: Database | None, fingerprint: Fingerprint | None, *, off: str = "turned off"
    ) -> None:
        """Take an open database, or None and the reason why there is no store."""
        self._database = database
        self._fingerprint = fingerprint
        self._key = fingerprint.key if fingerprint else ""
        self._why_none = off
        self._waiting: list[Readings] = []
        self._due = 0.0

    @property
    def path(self) -> Path | None:
        """The file, or None if there is no store."""
        return None if self._database is None else self._database.path

    @property
    def off(self) -> str:
        """Why the store is not used (any more); empty while it is used."""
        return self._why_none if self._database is None else self._database.off

    def find(self, requests: Mapping[TokenIds, Collection[int]]) -> Readings:
        """Return the stored readings that have every requested token; leave out the others."""
        self.write()
        requests = Requests.of(requests)
        if self._database is None:
            return Readings(requests.take(np.arange(0)))
        names = names_of(requests.prefixes)
        stored: dict[bytes, StoredReading]
        stored = self._database.attempt(lambda file: self._find(file, names), {})
        starts, tokens = requests.starts.tolist(), requests.tokens.tolist()
        found: list[int] = []
        logprobs: list[float] = []
        for i, name in enumerate(names):
            needed = tokens[starts[i] : starts[i + 1]]
            if name in stored and stored[name][2].keys() >= set(needed):
                found.append(i)
                logprobs += map(stored[name][2].__getitem__, needed)
        tops = [stored[names[i]][:2] for i in found]
        part = requests.take(np.array(found, np.int64))
        return Readings(part, np.array(logprobs, float), np.array(tops, float).reshape(-1, 2))

    def find_checked(self, requests: Requests, read: Callable[[Requests], Readings]) -> Readings:
        """Return stored readings as `find` does, if the shortest of them are computed equal.

        Otherwise the stored readings of this fingerprint are deleted, with a `StoreWarning`.

        Args:
            requests: What is needed.
            read: Computes readings in the way of this run.
        """
        stored = self.find(requests)
        shortest = np.sort(np.argsort(stored.requests.lengths, kind="stable")[:CHECKED])
        if self._fingerprint is None or self._database is None or not len(shortest):
            return stored
        sample = stored.take(shortest)
        computed = read(sample.requests)
        differences = (sample.logprobs - computed.logprobs, sample.tops[:, 1] - computed.tops[:, 1])
        difference = np.abs(np.concatenate(differences)).max()
        full = self._fingerprint.arithmetic in ("float32", "float64")
        if difference <= (TOLERANCE if full else ROUNDED_TOLERANCE):
            return stored
        self._database.attempt(self._drop, None)
        warn(
            f"{len(sample)} stored readings of {self._fingerprint.model!r} were computed again "
            f"and differ by up to {difference:.2g} nats, so something changed that the store "
            "cannot see. Its readings of this model are deleted, and all are computed again.",
            StoreWarning,
        )
        return Readings.of({})

    def keep(self, readings: Mapping[TokenIds, Reading]) -> None:
        """Keep readings, leaving out those that are not finite, and write them when it is time.

        If a prefix is stored already, new tokens are added and stored numbers do not change.
        """
        if self._database is None:
            return
        readings = Readings.of(readings)
        finite = np.isfinite(readings.tops[:, 1])
        counts = np.diff(readings.requests.starts)
        of_token = np.repeat(np.arange(len(readings)), counts)
        finite[of_token[~np.isfinite(readings.logprobs)]] = False
        part = readings.take(np.flatnonzero(finite))
        if len(part):
            self._waiting.append(part)
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write the readings that wait, in one transaction."""
        if self._database is None or not self._waiting:
            return
        started = time.monotonic()
        self._database.attempt(self._write, None)
        self._waiting = []
        finished = time.monotonic()
        self._due = finished + PATIENCE * (finished - started)

    def _drop(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM readings WHERE fingerprint = ?", (self._id(connection),))

    def _find(
        self, connection: sqlite3.Connection, names: Iterable[bytes]
    ) -> dict[bytes, StoredReading]:
        fingerprint = self._id(connection)
        readings: dict[bytes, StoredReading] = {}
        remaining = iter(names)
        while batch := tuple(islice(remaining, LOOKED_UP)):
            rows = connection.execute(
                "SELECT prefix, top_token, top_logprob, logprobs, checksum FROM readings "
                f"WHERE fingerprint = ? AND prefix IN ({', '.join('?' * len(batch))})",
                (fingerprint, *batch),
            ).fetchall()
            for name, top_token, top_logprob, logprobs, checksum in rows:
                if name not in batch:  # an index that belongs to other pages
                    raise DamagedError("the file gives a reading that was not looked up")
                if checksum != self._checksum(name, top_token, top_logprob, logprobs):
                    raise DamagedError("the checksum of a reading is wrong")
                values = {int(token): value for token, value in json.loads(logprobs).items()}
                readings[name] = top_token, top_logprob, values
        return readings

    def _write(self, connection: sqlite3.Connection) -> None:
        with transaction(connection):
            fingerprint = self._id(connection, create=True)
            for readings in self._waiting:
                connection.executemany(
                    "INSERT OR REPLACE INTO readings VALUES (?, ?, ?, ?, ?, ?)",
                    [(fingerprint, *row) for row in self._rows(connection, readings)],
                )

    def _rows(
        self, connection: sqlite3.Connection, readings: Readings
    ) -> Iterator[tuple[bytes, int, float, str, int]]:
        """Yield the rows of readings that are not stored, or not with every token."""
        requests = readings.requests
        names = names_of(requests.prefixes)
        starts, tokens = requests.starts.tolist(), requests.tokens.tolist()
        numbers, tops = readings.logprobs.tolist(), readings.tops.tolist()
        stored = self._find(connection, names)
        for name, (token, logprob), first, stop in zip(
            names, tops, starts[:-1], starts[1:], strict=True
        ):
            values = dict(zip(tokens[first:stop], numbers[first:stop], strict=True))
            token, logprob, before = stored.get(name, (int(token), logprob, {}))
            if name in stored and values.keys() <= before.keys():
                continue
            # Adding 0.0 turns -0.0 into 0.0, since SQLite does not keep the sign.
            row = (name, token, logprob + 0.0, json.dumps({**values, **before}))
            yield (*row, self._checksum(*row))

    def _id(self, connection: sqlite3.Connection, *, create: bool = False) -> int | None:
        """Look up the id of the fingerprint each time, since it may have been cleared."""
        if create:
            assert self._fingerprint is not None
            columns = {**asdict(self._fingerprint), "key": self._key}
            del columns["unkeyed"]
            columns |= {name: json.dumps(columns[name]) for name in ("probes", "spans")}
            names, marks = ", ".join(columns), ", ".join("?" * len(columns))
            connection.execute(
                f"INSERT OR IGNORE INTO fingerprints ({names}) VALUES ({marks})",
                tuple(columns.values()),
            )
        query = "SELECT id FROM fingerprints WHERE key = ?"
        row = connection.execute(query, (self._key,)).fetchone()
        return None if row is None else row[0]

    def _checksum(self, *row: Any) -> int:
        """Return a checksum of a reading and of the fingerprint that it belongs to."""
        return zlib.crc32(repr((self._key, *row)).encode())


def names_of(prefixes: Sequence[Prefix]) -> list[bytes]:
    """Return 16 bytes for each prefix that identify its symbols."""
    symbols = np.frombuffer(b"".join(prefixes), ">i8").astype("<i8").tobytes()
    stops = accumulate(map(len, prefixes), initial=0)
    return [hashlib.blake2b(symbols[a:b], digest_size=16).digest() for a, b in pairwise(stops)]


@contextmanager
def open_store(
    store: Store | str | Path | bool, fingerprint: Callable[[], Fingerprint]
) -> Iterator[OpenStore]:
    """Open the stored readings of a fingerprint for the length of a run.

    Args:
        store: As `chosen_store` takes it. A named store must be usable; the run continues without
            the usual one if it is not.
        fingerprint: Returns the fingerprint of the model. It is called only if there is a store.

    Raises:
        InputError: The named store cannot be used.
    """
    file = chosen_store(store)
    if file is None:
        yield OpenStore(None, None)
        return
    key = fingerprint()
    if key.unkeyed:
        first, *others = key.unkeyed
        more = f" and {len(others)} more" if others else ""
        off = f"is not used: no key covers {first}{more}"
        warn(
            f"the store of finished readings {off}. Nothing is taken from the store or kept. "
            "Remove it; or for hooks, pass probes=[HookProbe(name, hooks)].",
            StoreOffWarning,
        )
        yield OpenStore(None, None, off=off)
        return
    with closing(Database(file.path, must=not isinstance(store, bool))) as database:
        store_of_key = OpenStore(database, key)
        try:
            yield store_of_key
        finally:
            store_of_key.write()
