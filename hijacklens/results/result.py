"""What all results share: labels, a table, a figure, a folder on disk, and their provenance.

A result is a frozen dataclass that derives from `Result`. `save` writes every field by its type
(`hijacklens.results.stored`), the tables and figures that the class declares, and `result.json`
last: a folder with a `result.json` is complete. `load_result` reads any such folder back as the
type that wrote it. A result that replaces another is first written completely next to it.
`result.json` lists the files, so that the new result leaves none of the old files behind.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache, partial
from importlib import metadata
from inspect import isabstract
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from hijacklens.errors import InputError
from hijacklens.files import (
    RECORD,
    check_folder,
    locked,
    make_folder,
    named_path,
    remove_empty,
    write_json,
    write_whole,
)
from hijacklens.results.exhibits import Drawing, Exhibit, Table
from hijacklens.results.glance import Glance, Shown
from hijacklens.results.older_forms import FORM, MOVED, upgraded
from hijacklens.results.stored import read_fields, to_record, write_table, writers

PACKAGES = ("hijacklens", "transformer-lens", "torch", "transformers", "tokenizers", "numpy")
FILES = "files"
"""Key of the names of the files in `result.json`."""
HASHES = "sha256"
"""Key of the hashes of the files that are read again."""
PART = ".part-"
"""Beginning of the name of a folder with a result that is being written."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result came from: when, by which command, with which versions, at which commit."""

    created: str
    """UTC, ISO 8601."""
    command: str
    """The command line; `python` for a notebook or script."""
    seed: int | None
    """The seed of the run; None if nothing was drawn."""
    commit: str | None
    """Commit of the hijacklens checkout, with a `+` if it had changes; None if installed."""
    python: str
    platform: str
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def now(cls, *, seed: int | None = None) -> Provenance:
        """Return the provenance of a result of the present process."""
        program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
        command = shlex.join([program, *sys.argv[1:]]) if program == "hijacklens" else "python"
        return cls(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command,
            seed=seed,
            commit=_commit(),
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            versions={name: _version(name) for name in PACKAGES},
        )


@cache  # finding a package takes milliseconds, and what is imported stays
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache  # of the code that was imported, whatever is committed later
def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class Result(Shown, ABC):
    """Base of all results. A subclass is a frozen dataclass with a field `provenance`.

    It shows itself by its `glance` (`hijacklens.results.glance`), in a terminal and in a notebook.
    """

    provenance: Provenance
    leads: ClassVar[bool] = False
    """Whether a report begins with the results of this type."""
    figures: ClassVar[Mapping[str, Mapping[str, Any]]] = {"curve": {}}
    """File name without ending -> options of `plot()`; saved as SVG and PNG."""
    derived: ClassVar[Mapping[str, str]] = {}
    """File name -> the attribute or method that gives its table. `save` writes these tables for
    other programs; they are not read back."""

    def glance(self) -> Glance:
        """Say what the result is of, its main numbers, and the next step."""
        rows = len(self.to_dataframe())
        return Glance(f"{rows} rows", steps=("to_dataframe()", "plot()", "save(folder)"))

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """Return the result as one tidy table, a row per observation."""

    @abstractmethod
    def plot(self) -> Figure:
        """Draw the result; the figure is returned, not shown."""

    def exhibits(self) -> Sequence[Exhibit]:
        """Return what a report shows after the glance: by default the figure and the table."""
        return [Drawing("Figure", self.plot()), Table("Table", self.to_dataframe())]

    def findings(self) -> dict[str, Any]:
        """Return the main numbers of the result, ready for JSON; `result.json` holds them too."""
        return {}

    def configuration(self) -> dict[str, Any]:
        """Return the settings of the run and its `findings`, ready for JSON."""
        record = to_record(self)
        return {k: v for k, v in record.items() if k != "provenance"} | self.findings()

    def files(self) -> dict[str, Callable[[Path], None]]:
        """Return file name -> function that writes it, for everything but figures and record."""

        def write_derived(attribute: str, path: Path) -> None:
            value = getattr(self, attribute)
            table: Any = value() if callable(value) else value
            write_table(table, path)

        return writers(self) | {
            name: partial(write_derived, attribute) for name, attribute in self.derived.items()
        }

    @classmethod
    def read(cls, folder: Path, record: Mapping[str, Any]) -> Any:
        """Return the result whose files are in `folder` and whose `result.json` is `record`."""
        return cls(**read_fields(cls, folder, record))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write all files of the result into `folder` and return its path.

        A result that the folder contains is replaced when the new one is complete.

        Raises:
            InputError: The folder already contains a result and `overwrite` is False, or the
                folder cannot be made.
            OSError: There is no room for the files. Nothing has changed in the folder.
        """
        files = self.files()
        read_again = [name for name in files if name not in self.derived]
        for stem, options in self.figures.items():
            from hijacklens import plots

            draw = partial(plots.write, self.plot(**options))
            files |= {f"{stem}.svg": draw, f"{stem}.png": draw}
        record = {
            "type": f"{type(self).__module__}:{type(self).__qualname__}",
            "form": FORM,
            **self.configuration(),
            FILES: list(files),
            "provenance": to_record(self)["provenance"],
        }
        with staged(folder, overwrite=overwrite) as place:
            for name, write in files.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(place / name, write)
            record[HASHES] = {name: _hash_of(place / name) for name in read_again}
            write_json(place / RECORD, record)
        return named_path(folder, "folder")


def load_result(folder: str | Path) -> Result:
    """Read a saved result of any type from its folder, or from the `result.json` in it.

    Raises:
        InputError: The folder has no readable `result.json`, it does not name a type of result, or
            the files do not fit that type.
    """
    path, record = record_of(folder)
    kind = str(record["type"])
    # The type is named by a file, so only our own packages are ever imported for it.
    match = re.fullmatch(r"((?:hijacklens|probes|analyses)(?:\.\w+)+):(\w+)", MOVED.get(kind, kind))
    cls: Any = None
    if match:
        with suppress(ImportError):
            cls = getattr(importlib.import_module(match[1]), match[2], None)
    if not (isinstance(cls, type) and issubclass(cls, Result) and not isabstract(cls)):
        raise InputError(
            f"{path} names the type {kind!r}, which this version of hijacklens "
            f"({_version('hijacklens')}) does not have."
        )
    try:
        for name, digest in record.get(HASHES, {}).items():
            file = path.parent / name
            if file.is_file() and _hash_of(file) != digest:
                raise InputError(
                    f"{file} is not the file that was saved with this result: it was "
                    "changed or replaced. Run it again with --overwrite."
                )
        result = cls.read(path.parent, upgraded(record))
        # Evaluate eagerly so that damaged files fail at load time.
        for look in (repr, cls.to_dataframe, cls.configuration):
            look(result)
    except InputError:
        raise
    except Exception as error:  # pandas, pyarrow, NumPy and safetensors raise dozens of types
        raise InputError(
            f"the result in {str(folder)!r} is not complete and cannot be read "
            f"({type(error).__name__}: {error}): a file is missing, was changed, or is of another "
            f"version of hijacklens than this one ({_version('hijacklens')}). Run it again with "
            "--overwrite."
        ) from error
    return result


def _hash_of(path: Path) -> str:
    """Return the SHA-256 of a file; line ends do not count in texts, since git may change them."""
    octets = path.read_bytes()
    text = path.suffix in (".csv", ".json")
    return hashlib.sha256(octets.replace(b"\r\n", b"\n") if text else octets).hexdigest()


def record_of(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the `result.json` of a folder, or that file itself, and its content.

    Raises:
        InputError: There is none, or it is not the record of a result.
    """
    path = named_path(folder, "folder")
    path = path if path.name == RECORD else path / RECORD
    record = read_record(path)
    if record is None:
        raise InputError(
            f"no result in {str(folder)!r}: it has no {RECORD}. Name a folder that a run wrote "
            "with --out or save(); a run that was cut short has no such file."
        )
    return path, record


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a result, or None if there is no such file.

    Raises:
        InputError: It is not the record of a result.
    """
    if not path.is_file():  # reading a pipe of that name would never end
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
        record["type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not the record of a result: {error}.") from error
    return record


@contextmanager
def staged(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Make results in a folder next to their place, and move them there when they are complete.

    The body writes into the folder that it gets. After it, results that are replaced are removed,
    and the new files are moved, records last. If the body fails, nothing in `folder` has changed.
    The outer record lists all files, so that results inside another one are replaced with it.

    Args:
        folder: The place of the result; it may contain other files, which stay.
        overwrite: Replace a result in the folder.

    Raises:
        InputError: As `claim_folder`.
    """
    target = named_path(folder, "folder")
    made = make_folder(target, folder)
    place = None
    try:
        check_folder(folder, overwrite=overwrite)
        with ExitStack() as own:
            with locked(target):
                _remove_rests(target)
                scratch = Path(own.enter_context(_scratch(dir=target)))
                own.enter_context(locked(scratch))  # tells others that this process lives
            place = scratch / "new"  # not locked: a result may be staged in it
            place.mkdir()
            yield place
            new = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
            # Outer records last: where there is one, everything below it is complete.
            new.sort(key=lambda path: (path.name == RECORD, -len(path.parts)))
            _list_in_record(place, new)
            with locked(target):  # one at a time, so that a folder never holds parts of two results
                check_folder(folder, overwrite=overwrite)  # another process may have been quicker
                for path in reversed(new):
                    if path.name == RECORD:
                        _remove_result((target / path).parent)
                for path in new:
                    (target / path).parent.mkdir(parents=True, exist_ok=True)
                    (place / path).replace(target / path)
    except BaseException as error:
        remove_empty(made)
        if place and isinstance(error, OSError) and error.filename:
            with suppress(ValueError):
                error.filename = str(target / Path(error.filename).relative_to(place))
        raise


_scratch = partial(TemporaryDirectory, prefix=PART, ignore_cleanup_errors=True)


def _remove_rests(folder: Path) -> None:
    """Remove folders of killed processes; a running process holds a lock on its folder."""
    for rest in folder.glob(f"{PART}*"):
        with locked(rest, wait=False) as dead:
            if dead:
                shutil.rmtree(rest, ignore_errors=True)


def _list_in_record(folder: Path, paths: Sequence[Path]) -> None:
    """List all files in the outer record: what is made together is replaced together."""
    record = read_record(folder / RECORD)
    if record is not None:
        names = [path.as_posix() for path in paths if path != Path(RECORD)]
        more = [name for name in names if name not in record[FILES]]
        if more:
            write_json(folder / RECORD, {**record, FILES: [*record[FILES], *more]})


def _remove_result(folder: Path) -> None:
    """Remove the result in a folder: the record first, then the files that it lists.

    Files that the record does not list stay, and so do files outside the folder, even if the
    record lists them.
    """
    try:
        record = read_record(folder / RECORD) or {}
    except InputError:
        record = {}
    (folder / RECORD).unlink(missing_ok=True)
    listed = record.get(FILES)
    root = folder.resolve()
    for name in listed if isinstance(listed, list) else ():
        path = folder / name if isinstance(name, str) and "\0" not in name else folder
        place = path.parent.resolve()
        if path.name and (place == root or root in place.parents) and path.is_file():
            path.unlink()
            while place != root and not any(place.iterdir()):
                place.rmdir()
                place = place.parent
