"""A fuzz campaign: many inputs at one door, and what has to hold for each of them.

A door either works or raises `InputError` with a message of one readable line. It raises nothing
else, ends within seconds, and writes nothing outside the folder that it was given.

`HYPOTHESIS_PROFILE=long` runs each campaign at its full length (`make fuzz`); without it a short
one is run. `HIJACKLENS_FUZZ_TALLY` names a file that a line is added to for each campaign.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from type_checks import unchecked

from hijacklens.errors import MOST_CHARACTERS, InputError

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
SECONDS = 30
"""No door may take longer for one input of a campaign."""
_TALLY = os.environ.get("HIJACKLENS_FUZZ_TALLY")
_counts: dict[str, Counter[str]] = {}
_since: dict[str, float] = {}
_last: dict[str, float] = {}


def campaign(short: int, long: int) -> Callable[[Any], Any]:
    """Settings of a campaign: how many inputs in the default tests, and in `make fuzz`."""
    return settings(
        max_examples=long if LONG else short,
        deadline=None,
        database=None,
        derandomize=not LONG,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def holds(name: str, door: Callable[[], object], *, says: str = "") -> str:
    """Open a door: `works`, or `refused` with a message as it should be.

    Args:
        name: The campaign, for the tally.
        door: What is called.
        says: What a refusal has to name.
    """
    outcome = "works"
    with unchecked(), _in_time():
        try:
            door()
        except InputError as error:
            outcome = "refused"
            message = str(error)
            assert 10 <= len(message) <= MOST_CHARACTERS, message
            assert message.isprintable(), repr(message)
            assert says in message, (says, message)
    tally(name, outcome)
    return outcome


def tally(name: str, outcome: str) -> None:
    """Count an input of a campaign; the file of the tally holds the last line of each."""
    counts = _counts.setdefault(name, Counter())
    _since.setdefault(name, time.monotonic())
    counts[outcome] += 1
    _last[name] = time.monotonic()


def _write_tally() -> None:
    """A line for each campaign of this process, at its end."""
    if _TALLY and _counts:
        with Path(_TALLY).open("a", encoding="utf-8") as file:
            for name, counts in _counts.items():
                seconds = _last[name] - _since[name]
                file.write(f"{name}\t{counts.total()}\t{dict(counts)}\t{seconds:.0f} s\n")


atexit.register(_write_tally)


@contextmanager
def _in_time() -> Iterator[None]:
    """Fail when the body takes longer than a door may."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- what is written where

_WRITES = {
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.rmdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "sqlite3.connect": (0,),
}
_RUNS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class")
_watching: list[list[tuple[str, str]]] = []


@cache
def _watch() -> None:
    """Let Python tell what it opens, from now to its end; that slows down all other tests."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        path, mode, flags = arguments
        written = (
            any(c in mode for c in "wxa+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))
        )
        if written and isinstance(path, (str, bytes, os.PathLike)):
            _watching[-1].append((event, str(Path.cwd() / os.fsdecode(path))))
    elif event in _WRITES:
        *_, last = arguments  # the descriptor of the folder that a path starts in, or -1
        relative = event in ("os.remove", "os.rmdir") and last >= 0
        start = Path(f"/proc/self/fd/{last}").readlink() if relative else Path.cwd()
        for i in _WRITES[event]:
            if isinstance(arguments[i], (str, bytes, os.PathLike)):
                _watching[-1].append((event, str(start / os.fsdecode(arguments[i]))))
    elif event in _RUNS:
        _watching[-1].append((event, repr(arguments)[:200]))


@contextmanager
def writing_only_below(*folders: Path) -> Iterator[None]:
    """Fail when Python writes outside some folders in the body, starts a program, or unpickles."""
    _watch()
    seen: list[tuple[str, str]] = []
    _watching.append(seen)
    try:
        yield
    finally:
        _watching.remove(seen)
    roots = [folder.resolve() for folder in folders]
    for event, what in seen:
        if event in _RUNS:
            # A checkout asks git which commit it is.
            assert event == "subprocess.Popen" and "git" in what, (event, what)
        elif what != os.devnull:
            place = Path(what).resolve()
            assert any(root == place or root in place.parents for root in roots), (event, what)
