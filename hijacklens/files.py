"""TODO."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hijacklens.errors import InputError

if TYPE_CHECKING:
    pass

CACHE_VARIABLE = "HIJACKLENS_CACHE"


def expand_home(path: str | Path) -> Path:
    """The path with `~` in place; one of an unknown user stays as it is, and does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def named_path(path: str | Path, what: str) -> Path:
    """A path that a user names, with `~` in place.

    Raises:
        InputError: It is no path: of another type, empty, or nothing a file system can look up.
    """
    if not isinstance(path, (str, Path)) or not str(path):
        raise InputError(f"a {what} is named by a text or a Path, not {path!r}.")
    found = expand_home(path)
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL in it, ...
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot name a {what}: {reason}.") from error
    return found


def cache_folder() -> Path:
    """Where unpacked models are kept: HIJACKLENS_CACHE, or the user's cache folder."""
    import platformdirs

    given = os.environ.get(CACHE_VARIABLE)
    return expand_home(given) if given else Path(platformdirs.user_cache_dir("hijacklens"))


RECORD = "result.json"


def check_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse a folder that holds a result already; nothing is made yet.

    Raises:
        InputError: A result is there and `overwrite` is False, the path is a file, or it cannot
            be written.
    """
    path = named_path(folder, "folder")
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot write results to {str(folder)!r}: it is a file, not a folder.")
    if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
        raise InputError(
            f"cannot write results to {str(folder)!r}: this user may not write there. Name "
            "another folder."
        )
    if (path / RECORD).exists() and not overwrite:
        raise InputError(
            f"{str(folder)!r} holds a result already. Choose another folder, or say overwrite "
            "(--overwrite on the command line) to replace it."
        )
    return path


def claim_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Make the folder for a result, and refuse one that holds a result already.

    Raises:
        InputError: As `check_folder`, or the folder cannot be made.
    """
    path = check_folder(folder, overwrite=overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}.") from error
    return path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: to a name of its own first, then renamed into place."""
    part = path.with_name(f".part{os.getpid()}-{path.name}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as strict JSON: no NaN (null instead), UTF-8, keys in their order."""
    text = json_text(record)

    def write(part: Path) -> None:
        part.write_text(text + "\n", encoding="utf-8")

    write_whole(path, write)


def json_text(record: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """A record as JSON, its keys in their order, letters of all languages as they are."""
    return json.dumps(_strict(record), indent=indent, ensure_ascii=False, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return [_strict(item) for item in sorted(value, key=str)]
    if isinstance(value, (list, tuple, range)):
        return [_strict(item) for item in value]
    # Commands that list names do without NumPy; where it was never imported, nothing is of it.
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return _strict(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
