"""What every result shares: labels, a table, a figure, a folder on disk, and where it came from.

A result is a frozen dataclass that derives from `Result`. `save` writes its files into a folder,
each one whole or not at all, and `result.json` last: a folder with a `result.json` is complete.
`load_result` reads any such folder back as the type that wrote it. `result.json` lists the files,
so that a result that takes the place of another one leaves none of its files behind.
"""

from __future__ import annotations

import importlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from hijacklens.errors import InputError
from hijacklens.files import RECORD, claim_folder, named_path, write_json, write_whole
from hijacklens.results.glance import Glance, Shown
from hijacklens.results.provenance import Provenance, _version

if TYPE_CHECKING:
    from hijacklens.results.exhibits import Exhibit

FILES = "files"
"""Key of the names of the files in `result.json`; results themselves never see it."""


MOVED = {
    "hijacklens.concepts.trained:TrainingResult": "hijacklens.one_layer.trained:TrainingResult",
    "analyses.sweep_result:SweepResult": "analyses.sweeps.run:SweepResult",
    "analyses.reproduction:Reproduction": "analyses.reproduction.reproduction:Reproduction",
}
"""Type in the record of a result folder -> where that type is now, if it has moved."""


class Result(Shown, ABC):
    """Base of all results. A subclass is a frozen dataclass with a field `provenance`.

    It shows itself by its `glance` (`hijacklens.results.glance`), in a terminal and in a notebook.
    """

    provenance: Provenance
    figure_names: ClassVar[tuple[str, ...]] = ("curve.svg", "curve.png")
    """Files that `save` writes `plot()` to."""

    def glance(self) -> Glance:
        """What it is of, the main numbers, and the next step."""
        rows = len(self.to_dataframe())
        return Glance(f"{rows} rows", steps=("to_dataframe()", "plot()", "save(folder)"))

    @abstractmethod
    def to_dataframe(self) -> pd.DataFrame:
        """The result as one tidy table, a row per observation."""

    @abstractmethod
    def plot(self) -> Figure:
        """The figure of the result; it is returned, not shown."""

    def exhibits(self) -> Sequence[Exhibit]:
        """What a report shows of the result, its `glance` apart: its figure and its table."""
        from hijacklens.results.exhibits import Drawing, Table

        return [Drawing("Figure", self.plot()), Table("Table", self.to_dataframe())]

    @abstractmethod
    def configuration(self) -> dict[str, Any]:
        """What the run was asked to do and what it found in one number each, ready for JSON."""

    @abstractmethod
    def files(self) -> Mapping[str, Callable[[Path], None]]:
        """File name -> function that writes it to a path; the figures come by themselves."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, record: Mapping[str, Any]) -> Result:
        """The result whose files are in `folder` and whose `result.json` holds `record`."""

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write all files of the result into `folder` and return its path.

        Raises:
            InputError: The folder holds a result already and `overwrite` is False.
        """
        target = claim_folder(folder, overwrite=overwrite)
        files = dict(self.files())
        if self.figure_names:
            from hijacklens import plots

            figure = self.plot()
            draw = partial(plots.write, figure)
            files |= dict.fromkeys(self.figure_names, draw)
        remove_result(target)
        for place in {(target / name).parent for name in files}:
            for left in place.glob(".part*-*"):  # by a save that was killed
                left.unlink(missing_ok=True)
        for name, write in files.items():
            write_whole(target / name, write)
        kind = type(self)
        record = {
            "type": f"{kind.__module__}:{kind.__qualname__}",
            **self.configuration(),
            FILES: list(files),
            "provenance": asdict(self.provenance),
        }
        write_json(target / RECORD, record)
        return target


def load_result(folder: str | Path) -> Result:
    """Read a saved result of any type.

    Raises:
        InputError: The folder has no readable `result.json`, it names no type of result, or the
            files are not those of such a result.
    """
    path = named_path(folder, "folder") / RECORD
    record = _read_record(path)
    if record is None:
        raise InputError(
            f"no result in {str(folder)!r}: it has no {RECORD}. Name a folder that a run wrote "
            "with --out or save(); a run that was cut short has no such file."
        )
    kind = str(record["type"])
    # The type is named by a file, so only our own packages are ever imported for it.
    match = re.fullmatch(r"((?:hijacklens|probes|analyses)(?:\.\w+)+):(\w+)", MOVED.get(kind, kind))
    found: Any = None
    if match:
        try:
            found = getattr(importlib.import_module(match[1]), match[2], None)
        except ImportError:
            found = None
    usable = isinstance(found, type) and issubclass(found, Result) and not isabstract(found)
    if not usable:
        raise InputError(
            f"{path} names the type {kind!r}, which this version of hijacklens "
            f"({_version('hijacklens')}) does not have."
        )
    try:
        result = found.read(path.parent, {k: v for k, v in record.items() if k != FILES})
        # What is damaged shall show here, and not when it is first looked at.
        for look in (repr, found.to_dataframe, found.configuration):
            look(result)
    except InputError:
        raise
    except Exception as error:  # pandas, pyarrow, NumPy and safetensors raise dozens of types
        raise InputError(
            f"the result in {str(folder)!r} cannot be read ({type(error).__name__}: {error}): its "
            f"files were changed, or are of another version of hijacklens than this one "
            f"({_version('hijacklens')}). Run it again with --overwrite."
        ) from error
    return result


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of a saved result; None where there is none."""
    if not path.is_file():  # a pipe of that name would never end
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not the record of a result: {error}.") from error
    return record


def remove_result(folder: Path) -> None:
    """Remove the result in a folder: the record first, then the files that it lists.

    What the record does not list stays, and so does what lies outside the folder, whatever a
    record says.
    """
    try:
        record = _read_record(folder / RECORD) or {}
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
