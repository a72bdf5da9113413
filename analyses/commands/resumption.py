"""How a long command ends early and goes on: the same command, started again, does the rest.

Finished readings are in the store (`hijacklens.store.store`). Of several models, those that are
done are saved with a note of what is missing, and that note lets the same command write into the
folder again.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.scoring.result import HijackResult

UNFINISHED = "unfinished"
"""Key of the note in the settings of `result.json`."""


def is_unfinished(folder: Path, models: Sequence[str]) -> bool:
    """Whether a folder holds the first part of a run on just these models."""
    from hijacklens.files import RECORD, expand_home

    try:
        record = json.loads((expand_home(folder) / RECORD).read_text(encoding="utf-8"))
        return record.get("settings", record)[UNFINISHED]["asked"] == list(models)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def usual_folder(label: str, *, overwrite: bool, models: Sequence[str] = ()) -> Path:
    """The folder below `runs/` for files where none was named: of this day, and not yet taken.

    Args:
        label: What was done, and to which model.
        overwrite: Take the first one of this day, whatever it holds.
        models: The models of a run that may be in parts; one that is not finished is gone on with.
    """
    first = Path("runs") / f"{date.today()}-{label}"
    numbered = (first.with_name(f"{first.name}-{count}") for count in itertools.count(2))
    return next(
        folder
        for folder in itertools.chain([first], numbered)
        if overwrite or not folder.exists() or (models and is_unfinished(folder, models))
    )


def save_part(
    result: HijackResult, folder: Path, *, asked: Sequence[str], missing: Sequence[str]
) -> None:
    """Save a result, with a note if models are missing that were asked for.

    Raises:
        InputError: The folder cannot be written, or the disk is full.
    """
    if missing:
        note = {"asked": list(asked), "missing": list(missing)}
        result = replace(result, settings=replace(result.settings, unfinished=note))
    try:
        result.save(folder, overwrite=True)
    except OSError as error:
        raise InputError(
            f"cannot write the result to {str(folder)!r}: {error}. Make room there, or name "
            "another folder with --out; what was computed is in the store (unless that was off), "
            "so the same command takes it from there."
        ) from error


@contextmanager
def telling_of_the_store() -> Iterator[None]:
    """Run the body; what becomes of the store is told in one line of standard error each time."""
    from hijacklens.store.database import StoreWarning

    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message: Any, category: type[Warning], *where: Any) -> None:
            if issubclass(category, StoreWarning):
                click.echo(f"note: {message}", err=True)
            else:
                show(message, category, *where)

        warnings.simplefilter("always", StoreWarning)
        warnings.showwarning = tell
        yield


@contextmanager
def resumable(*, store: bool) -> Iterator[None]:
    """Run the body; if it is interrupted, say what the same command will do.

    Args:
        store: Whether the body may use the store.
    """
    from hijacklens.store.store import chosen_store

    with telling_of_the_store():
        try:
            yield
        except KeyboardInterrupt:
            kept = "what is finished is kept; the same command goes on from there"
            lost = "there is no store, so the same command starts anew"
            click.echo(f"note: {kept if chosen_store(store) else lost}.", err=True)
            raise
