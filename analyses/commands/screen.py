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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from analyses.commands.declarations import option
from hijacklens.files import RECORD, json_text
from hijacklens.results.glance import Glance, Grid, drawn

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a command prints."""

    quiet: Annotated[
        bool, option("No progress bars, notes or hints; results and errors are printed.")
    ] = False
    as_json: Annotated[
        bool, option("Print one JSON document and nothing else. Its keys: $keys.", "--json")
    ] = False

    def show(self, *parts: str | Grid | Glance, **document: Any) -> None:
        """Print lines, tables and glances, or the document of --json if one is given."""
        if self.as_json and document:
            unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
            click.echo(json_text(dict(sorted(document.items())), ascii=not unicode))
        elif parts and not self.as_json:
            colour = sys.stdout.isatty() and colour_for_click() is None
            click.echo(drawn(*parts, colour=colour))

    def show_saved(
        self, folder: Path, glance: Glance, *, more: Sequence[str] = (), **document: Any
    ) -> None:
        """Print a glance and the files of the result in a folder, or the document of --json.

        Args:
            folder: Holds the result.
            glance: What the result shows.
            more: Files of the folder that are not part of the result.
            document: The document, apart from `folder` and `files`.
        """
        listed = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        # One entry, such as `models/`, for all files of a folder.
        names = [re.sub("/.*", "/", name) for name in [*listed, RECORD]]
        files = [*dict.fromkeys(names), *more]
        written = f"written to {folder}/  ({', '.join(files)})"
        self.show(glance, written, folder=str(folder), files=files, **document)

    def note(self, text: str) -> None:
        """Print a note on standard error, unless --quiet is given."""
        if not self.quiet:
            click.echo(f"note: {text}", err=True)

    def loading(self, name: str) -> None:
        """Say that a model is being loaded, if somebody watches."""
        from hijacklens.progress import watched

        if watched() and not self.quiet:
            click.echo(f"loading {name}", err=True)


def colour_for_click() -> bool | None:
    """Return False for no colour, None for colour on terminals only."""
    return False if os.environ.get("NO_COLOR") else None


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table for a document; missing values are None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


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
