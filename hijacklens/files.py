"""Paths that users name, folders for results, and files that are written completely or not at all.

A file is first written under a temporary name in its folder and then renamed, so that an
interrupted run leaves no half-written file. Records are strict JSON.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

from hijacklens.errors import InputError, is_text, shown

CACHE_VARIABLE = "HIJACKLENS_CACHE"
ON = ("on", "1", "yes", "true")
OFF = ("off", "0", "no", "false", "none")
"""Spellings of a switch, in capitals too."""
MOST_ROWS = 1_000_000
"""Up to this number, rows and bytes of text are not compared with the size of their file."""
RECORD = "result.json"
"""The file that makes a folder a result."""


class FolderTakenError(InputError):
    """A folder has a result, which may not be replaced."""


def expand_home(path: str | Path) -> Path:
    """Expand `~`; return the path unchanged if that user is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def variable(name: str) -> str:
    """Return an environment variable; an empty text if it is not set.

    Raises:
        InputError: It is not UTF-8 text.
    """
    value = os.environ.get(name, "")
    if not is_text(value):
        raise InputError(f"the environment variable {name} is not UTF-8 text: {shown(value)}.")
    return value


def switch(value: str) -> bool | None:
    """Return what a switch says in any usual spelling; None if it is neither on nor off.

    >>> switch("OFF"), switch(""), switch("readings.sqlite")
    (False, True, None)
    """
    word = value.strip().lower()
    return False if word in OFF else True if word in ("", *ON) else None


def named_path(path: str | Path, what: str) -> Path:
    """Return a path that a user names, with `~` expanded; `what` names its kind in errors.

    Raises:
        InputError: It has another type, is empty, or the file system cannot look it up.
    """
    if not isinstance(path, (str, Path)) or not is_text(str(path)) or not str(path):
        raise InputError(f"a {what} is named by a text (UTF-8) or a Path, not {path!r}.")
    expanded = expand_home(path)
    try:
        expanded.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it, ...
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot name a {what}: {reason}.") from error
    return expanded


def cache_folder() -> Path:
    """Return the folder of unpacked models: HIJACKLENS_CACHE, or the user's cache folder."""
    import platformdirs

    folder = variable(CACHE_VARIABLE)
    return expand_home(folder) if folder else Path(platformdirs.user_cache_dir("hijacklens"))


def check_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse a folder that cannot take a new result; leave nothing there.

    The folder is made and an unnamed file is opened in it, since the permissions of a file system
    do not say whether it accepts files.

    Raises:
        InputError: The folder has a result and `overwrite` is False, is a file, or cannot be made
            or written to.
    """
    path = named_path(folder, "folder")
    if (path / RECORD).exists() and not overwrite:
        raise FolderTakenError(
            f"{str(folder)!r} already contains a result. Choose another folder, or pass "
            "overwrite=True (--overwrite on the command line) to replace it."
        )
    made = make_folder(path, folder)
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        remove_empty(made)
    return path


def claim_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Make the folder for a result.

    Raises:
        InputError: As `check_folder`.
    """
    path = check_folder(folder, overwrite=overwrite)
    make_folder(path, folder)
    return path


def make_folder(path: Path, name: str | Path) -> list[Path]:
    """Make a folder that the user called `name`; return the folders made, innermost first.

    Raises:
        InputError: It is a file, or cannot be made.
    """
    made: list[Path] = []
    try:
        for each in (path, *path.parents):
            if each.exists():
                break
            made.append(each)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_empty(made)
        raise _unwritable(name, error) from error
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove those folders that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _unwritable(folder: str | Path, error: OSError) -> InputError:
    reason = error.strerror or error
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = "it is, or lies below, a file, not a folder"
    return InputError(
        f"cannot write results to {str(folder)!r}: {reason}. Name another folder, in which this "
        "user may write."
    )


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, which the system releases when a process ends, however it ends.

    Yield whether it is held: not if another process holds it and this one does not `wait`, and
    not where the system or the file system has no such locks.
    """
    descriptor, held = None, False
    with suppress(OSError):
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
    try:
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_size(path: Path, count: int, unit: str, *, most_per_byte: int = 1) -> None:
    """Refuse a small file with so much content that reading it could use up the memory.

    Raises:
        InputError: There are more than `MOST_ROWS` units, and `most_per_byte` of them per byte.
    """
    size = path.stat().st_size
    if count > max(MOST_ROWS, most_per_byte * size):
        raise InputError(
            f"{str(path)!r} has at least {count:,} {unit} in {size:,} bytes, which could use up "
            "the memory: it is damaged, or was made for that. Get it again from its source."
        )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all, by `write(temporary path)` and renaming.

    Raises:
        OSError: There is no room or no permission; the error names the file.
    """
    part = path.with_name(f".part{os.getpid()}-{path.name}")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text completely or not at all, with its line ends as they are."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as `json_text`, completely or not at all."""
    write_text(path, json_text(record) + "\n")


def json_text(record: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """Return a record as strict JSON: null for NaN and infinity, keys in order, letters as is."""
    return json.dumps(_strict(record), indent=indent, ensure_ascii=False, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [_strict(item) for item in sorted(value, key=str)]
    if isinstance(value, (list, tuple, range)):
        return [_strict(item) for item in value]
    # Some commands run without NumPy; if it was never imported, no value can come from it.
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return _strict(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
