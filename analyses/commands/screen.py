"""What commands put on the screen: text with a little colour, or one JSON document.

Colour says what a glance should find, and nothing else: titles are bold, `pass` is green, `fail`
red, `open` yellow. It is left out where standard output is no terminal, and where NO_COLOR is set
(https://no-color.org).

With --json a command prints one document on standard output and nothing else there. Its keys are
those that the option names in the help, always all of them; no value is NaN.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hijacklens.files import json_text
from hijacklens.results.glance import Glance, Grid, drawn

if TYPE_CHECKING:
    import pandas as pd

Command = TypeVar("Command", bound=Callable[..., Any])

QUIET = "No progress bars, notes or hints; results and errors are printed."


def output_options(*keys: str) -> Callable[[Command], Command]:
    """The options --json, whose document has these keys, and --quiet."""

    def add(command: Command) -> Command:
        for option in (
            click.option(
                "--json",
                "as_json",
                is_flag=True,
                help="Print one JSON document and nothing else. "
                f"Its keys: {', '.join(sorted(keys))}.",
            ),
            click.option("--quiet", is_flag=True, help=QUIET),
        ):
            command = option(command)
        return command

    return add


def document(**values: Any) -> None:
    """Print the document of --json."""
    click.echo(json_text(dict(sorted(values.items()))))


def records(found: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for a document; what is missing is None."""
    return found.astype(object).where(found.notna(), None).to_dict("records")


def colour() -> bool | None:
    """What click is told: False for no colour; None for colour on terminals alone."""
    return False if os.environ.get("NO_COLOR") else None


def show(*parts: str | Grid | Glance) -> None:
    """Print lines, tables and glances on standard output."""
    terminal = sys.stdout.isatty() and colour() is None
    click.echo(drawn(*parts, colour=terminal))


def files_written(folder: Any, names: Sequence[str]) -> str:
    """The last line of a command that wrote a folder."""
    return f"written to {folder}/  ({', '.join(names)})"


def say_loading(name: str, *, quiet: bool) -> None:
    """Say on standard error that a model is being loaded; a log does not need it."""
    from hijacklens.progress import watched

    if watched() and not quiet:
        click.echo(f"loading {name}", err=True)


def note(text: str, *, quiet: bool) -> None:
    """A note on standard error."""
    if not quiet:
        click.echo(f"note: {text}", err=True)
