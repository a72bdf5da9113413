"""Print the output of a command: tables for people, or one JSON document for programs.

Results are printed by their `glance` (`hijacklens.results.glance`), in colour only on a terminal:
titles are bold, `pass` is green, `fail` red, `open` yellow. NO_COLOR turns colour off
(https://no-color.org).

With --json a command prints one document on standard output and nothing else there. It always has
all keys that the help of the option lists; no value is NaN.

Names and texts come from files that nobody has read. `printable_streams` escapes every character
that could steer a terminal or that its encoding lacks, whoever prints it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from analyses.commands.declarations import option
from hijacklens.files import RECORD, json_text
from hijacklens.results.glance import Glance, Grid, drawn, printable

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
            click.echo(json_text(dict(sorted(document.items()))))
        elif parts and not self.as_json:
            colour = sys.stdout.isatty() and colour_for_click() is None
            click.echo(drawn(*parts, colour=colour))

    def show_saved(self, folder: Path, glance: Glance, **document: Any) -> None:
        """Print a glance and the files of the result in a folder, or the document of --json.

        Args:
            folder: Holds the result.
            glance: What the result shows.
            document: The document, apart from `folder` and `files`.
        """
        listed = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        # One entry, such as `models/`, for all files of a folder.
        names = [re.sub("/.*", "/", name) for name in [*listed, RECORD]]
        files = [*dict.fromkeys(names)]
        written = f"written to {folder}/  ({', '.join(files)})"
        self.show(glance, written, folder=str(folder), files=files, **document)

    def note(self, text: str) -> None:
        """Print a note on standard error, unless --quiet is given."""
        if not self.quiet:
            say(f"note: {text}")

    def loading(self, name: str) -> None:
        """Say that a model is being loaded, if somebody watches."""
        from hijacklens.progress import watched

        if watched() and not self.quiet:
            say(f"loading {name}")


def say(text: str, *, name: str = "") -> None:
    """Print one line on standard error; `name` begins it in red."""
    start = f"{click.style(name, fg='red')} " if name else ""
    click.echo(start + printable(text), err=True, color=colour_for_click())


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
            context = click.get_current_context(silent=True)
            quiet = context and (context.params.get("quiet") or context.params.get("as_json"))
            if quiet and category.__name__ == "FigureWarning":
                return
            if ours or "the next release drops the old name" in str(message):
                say(f"note: {message}")
            else:
                show(message, category, *where, **more)

        warnings.showwarning = note
        yield


STEERING = re.compile(r"(\r|\x1b\[[\d;]*[mA])")
"""What a progress bar and colours write to a terminal."""


class Printable:
    r"""A text stream that escapes control characters and characters that its encoding lacks.

    Escapes have the form of JSON, so that a JSON document keeps its meaning.

    >>> import io
    >>> screen = io.StringIO()
    >>> _ = Printable(screen).write("a\x1b[2J\u202eb")
    >>> screen.getvalue()
    'a\\u001b[2J\\u202eb'
    """

    def __init__(self, stream: Any, *, name: str = "") -> None:
        """Wrap a stream. With a name, errors of writing name it; without one they are ignored."""
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # bytes would go past `write`
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str | bytes) -> int:
        """Write a text, or the bytes of one.

        Raises:
            TypeError: There are no bytes: so click asks whether a stream takes bytes.
        """
        if not isinstance(text, str):
            if not text:
                raise TypeError("this is a stream of text")
            text = text.decode()
        parts = STEERING.split(text) if self._stream.isatty() else [text]
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        parts[::2] = [_escaped(part, encoding) for part in parts[::2]]
        with self._failures():
            self._stream.write("".join(parts))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Write what is buffered."""
        with self._failures():
            self._stream.flush()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._name:
                error.filename = self._name
                raise


def _escaped(text: str, encoding: str) -> str:
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if _fits(c, encoding) else json.dumps(c)[1:-1] for c in text)


def _fits(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    spaces = character in "\n\t" or unicodedata.category(character) == "Zs"
    return spaces or character.isprintable()


@contextmanager
def printable_streams() -> Iterator[None]:
    """Run the body with standard output and standard error as `Printable`."""
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = Printable(sys.stdout, name="standard output")
    if sys.stderr is not None:
        sys.stderr = Printable(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
