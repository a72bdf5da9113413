"""Resume a long command that was interrupted: the same command, started again, does the rest.

Finished readings are in the store (`hijacklens.store.store`). If a run on several models is
interrupted, the finished models are saved with a note of the missing ones, and that note lets the
same command write into the folder again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.scoring.result import HijackResult

UNFINISHED = "unfinished"
"""Key of the note in the settings of `result.json`."""


def is_unfinished(folder: Path, models: Sequence[str]) -> bool:
    """Return whether a folder holds the first part of a run on exactly these models."""
    from hijacklens.files import RECORD, expand_home

    try:
        record = json.loads((expand_home(folder) / RECORD).read_text(encoding="utf-8"))
        return record.get("settings", record)[UNFINISHED]["asked"] == list(models)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def usual_folder(label: str, *, overwrite: bool, models: Sequence[str] = ()) -> Path:
    """Return the folder below `runs/` for a command without --out, named by the date and a label.

    Args:
        label: What is run, and on which model.
        overwrite: Return the first folder of the day, whatever it holds, not the first free one.
        models: The models of a run that may have been interrupted; it is resumed.
    """
    first = Path("runs") / f"{date.today()}-{label}"
    numbered = (first.with_name(f"{first.name}-{count}") for count in itertools.count(2))
    return next(
        folder
        for folder in itertools.chain([first], numbered)
        if overwrite or not folder.exists() or (models and is_unfinished(folder, models))
    )


def save_part(
    result: HijackResult, folder: Path, *, requested: Sequence[str], missing: Sequence[str]
) -> None:
    """Save a result, with a note of the requested models that are still missing.

    Raises:
        InputError: The folder cannot be written, or the disk is full.
    """
    if missing:
        note = {"asked": list(requested), "missing": list(missing)}
        result = replace(result, settings=replace(result.settings, unfinished=note))
    try:
        result.save(folder, overwrite=True)
    except OSError as error:
        raise InputError(
            f"cannot write the result to {str(folder)!r}: {error}. Make room there, or name "
            "another folder with --out; finished readings are in the store (unless it was off), so "
            "the same command resumes from there."
        ) from error


@contextmanager
def resumable(*, store: bool) -> Iterator[None]:
    """Run the body; if it is interrupted, say what the same command will do next time.

    Args:
        store: Whether the body may use the store.
    """
    from hijacklens.store.store import chosen_store

    try:
        yield
    except KeyboardInterrupt:
        kept = "finished readings are kept; the same command resumes from there"
        lost = "there is no store, so the same command starts from scratch"
        click.echo(f"note: {kept if chosen_store(store) else lost}.", err=True)
        raise
