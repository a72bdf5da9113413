"""What commands put on the screen: text with a little colour, or one JSON document.

Colour says what a glance should find, and nothing else: titles are bold, `pass` is green, `fail`
red, `open` yellow. It is left out where standard output is no terminal, and where NO_COLOR is set
(https://no-color.org).

With --json a command prints one document on standard output and nothing else there. Its keys are
those that the option names in the help, always all of them; no value is NaN.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from hijacklens.files import json_text
from hijacklens.results.glance import interval, share, table

if TYPE_CHECKING:
    import pandas as pd
if TYPE_CHECKING:
    from hijacklens.scoring.efficacy import Rule
    from hijacklens.scoring.result import HijackResult

Command = TypeVar("Command", bound=Callable[..., Any])

COLOURS = {"pass": "green", "fail": "red", "open": "yellow"}

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


def title(text: str) -> str:
    """The title of a table."""
    return click.style(text, bold=True)


def state(name: str) -> str:
    """`pass`, `fail` or `open`, four characters wide."""
    return click.style(f"{name:4}", fg=COLOURS[name])


def colour() -> bool | None:
    """What click is told: False for no colour; None for colour on terminals alone."""
    return False if os.environ.get("NO_COLOR") else None


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: str = "") -> str:
    """A table whose last column is wrapped where a terminal is too narrow for it."""
    whole = table(header, rows, left=left)
    if not sys.stdout.isatty() or not rows:
        return whole
    width = shutil.get_terminal_size().columns
    before = sum(max(len(row[i]) for row in [header, *rows]) + 2 for i in range(len(header) - 1))
    if max(map(len, whole.splitlines())) <= width or width - before < 20:
        return whole
    wrapped: list[Sequence[str]] = []
    for row in rows:
        first, *rest = textwrap.wrap(row[-1], width - before) or [""]
        wrapped.append((*row[:-1], first))
        wrapped += [(*[""] * (len(header) - 1), line) for line in rest]
    return table(header, wrapped, left=left)


def stacked(header: Sequence[str], rows: Sequence[Sequence[str]], *, keys: int, left: str) -> str:
    """A table which, where a terminal is too narrow, goes on below with its first columns again.

    Args:
        header: Column titles.
        rows: Cells as text.
        keys: How many columns say what a row is about; every part begins with them.
        left: For each column `l` or `r`.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) + 2 for i in range(len(header))]
    room = shutil.get_terminal_size().columns + 2  # none follows the last column
    if not sys.stdout.isatty() or sum(widths) <= room:
        return table(header, rows, left=left)
    named = list(range(keys))
    parts: list[list[int]] = [[*named]]
    for column in range(keys, len(header)):
        if len(parts[-1]) > keys and sum(widths[i] for i in (*parts[-1], column)) > room:
            parts.append([*named])
        parts[-1].append(column)
    return "\n\n".join(
        table(
            [header[i] for i in part],
            [[row[i] for i in part] for row in rows],
            left="".join(left[i] for i in part),
        )
        for part in parts
    )


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


def hijack_tables(result: HijackResult, *, rule: Rule, known_only: bool = False) -> str:
    """The tables of a hijack run: one per model and scheme, a row per dose."""
    summary = result.summary(rule=rule, known_only=known_only)
    blocks = []
    source = result.settings["facts"]["name"]
    for key, group in summary.groupby(["model", "scheme"], sort=False):
        model, scheme = cast("tuple[str, str]", key)
        n = int(group["n"].iloc[0])
        what = "known facts" if known_only else "facts"
        title = f"{model} · {source}, {n} {what} · {scheme} · rule {rule}"
        rows = [
            (
                str(row["dose"]),
                interval(row["efficacy"], row["efficacy_low"], row["efficacy_high"]),
                share(row["retention"]),
                str(row["ties"]),
                f"{row['mean_shift']:+.2f}" if row["dose"] else "0.00",
            )
            for row in group.to_dict("records")
        ]
        header = ("dose", "efficacy", "retention", "ties", "mean shift")
        blocks.append(f"{title}\n{table(header, rows, left='rllrr')}")
    return "\n\n".join(blocks)
