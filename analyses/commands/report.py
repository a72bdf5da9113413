"""`hijacklens report`: write saved results as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click

from analyses.commands.declarations import argument, declared, option
from analyses.commands.screen import Output


@click.command("report")
@declared("file", "bytes", "results")
def command(
    *,
    folders: Annotated[
        tuple[str, ...],
        argument(required=True, type=click.Path(path_type=str), metavar="DIR [DIR ...]"),
    ],
    out: Annotated[Path, option("The HTML file.")] = Path("report.html"),
    title: Annotated[str | None, option("Title of the page.", metavar="TEXT")] = None,
    overwrite: Annotated[bool, option("Replace an existing file.")] = False,
    output: Output,
) -> None:
    """Put saved results on one page: curves, tables, facts that flip, maps, attention, data.

    A DIR is a folder that a run wrote (hijack, trace, heads, train, sweep), or one that holds
    such folders (reproduce). The page is one file that any browser opens without a network; its
    tables can be sorted, filtered, searched and downloaded.

    \b
    Examples:
      hijacklens report runs/first --out first.html
      hijacklens report runs/first runs/trace runs/heads --out study.html
    """  # noqa: D301
    from hijacklens.report import TITLE, write_report

    path = write_report(folders, out=out, title=title or TITLE, overwrite=overwrite)
    size = path.stat().st_size
    if not (output.quiet and not output.as_json):
        output.show(
            f"written to {path}  ({size / 1e6:.1f} MB)",
            file=str(path),
            bytes=size,
            results=list(folders),
        )
