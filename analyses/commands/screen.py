"""Print the output of a command: tables for people, or one JSON document for programs.

Results are printed by their `glance` (`hijacklens.results.glance`), in colour only on a terminal:
titles are bold, `pass` is green, `fail` red, `open` yellow. NO_COLOR turns colour off
(https://no-color.org).

With --json a command prints one document on standard output and nothing else there. It always has
all keys that the help of the option lists; no value is NaN.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from analyses.commands.options import Command, collected, option
from hijacklens.files import RECORD, json_text
from hijacklens.results.glance import Glance, Grid, drawn

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a command prints."""

    as_json: bool
    quiet: bool

    def show(self, *parts: str | Grid | Glance, **document: Any) -> None:
        """Print lines, tables and glances, or the document of --json if one is given."""
        if self.as_json and document:
            click.echo(json_text(dict(sorted(document.items()))))
        elif parts and not self.as_json:
            colour = sys.stdout.isatty() and colour_for_click() is None
            click.echo(drawn(*parts, colour=colour))

    def note(self, text: str) -> None:
        """Print a note on standard error, unless --quiet is given."""
        if not self.quiet:
            click.echo(f"note: {text}", err=True)

    def loading(self, name: str) -> None:
        """Say that a model is being loaded, if somebody watches."""
        from hijacklens.progress import watched

        if watched() and not self.quiet:
            click.echo(f"loading {name}", err=True)


def output_options(*keys: str) -> Callable[[Command], Command]:
    """Return the options --quiet and --json, whose document has these keys."""
    return collected(
        "output",
        Output,
        option(
            "--quiet",
            is_flag=True,
            help="No progress bars, notes or hints; results and errors are printed.",
        ),
        option(
            "--json",
            "as_json",
            is_flag=True,
            help=f"Print one JSON document and nothing else. Its keys: {', '.join(sorted(keys))}.",
        ),
    )


def colour_for_click() -> bool | None:
    """Return False for no colour, None for colour on terminals only."""
    return False if os.environ.get("NO_COLOR") else None


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table for a document; missing values are None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def files_in(folder: Path) -> list[str]:
    """Return the files of the result in a folder, with `models/` for all files below `models`."""
    listed = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    return list(dict.fromkeys(re.sub("/.*", "/", name) for name in [*listed, RECORD]))


def files_written(folder: Path, names: list[str]) -> str:
    """Return the last line of a command that wrote a folder."""
    return f"written to {folder}/  ({', '.join(names)})"


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print the warnings of hijacklens as one line each on standard error."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            ours = category.__module__.startswith("hijacklens")
            if ours or "the next release drops the old name" in str(message):
                click.echo(f"note: {message}", err=True)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = note
        yield
