"""`hijacklens report`: write saved results as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from analyses.commands.options import option
from analyses.commands.screen import Output, output_options


@click.command("report")
@click.argument(
    "folders", nargs=-1, required=True, type=click.Path(path_type=str), metavar="DIR [DIR ...]"
)
@option(
    "--out", type=click.Path(path_type=Path), default=Path("report.html"), help="The HTML file."
)
@option("--title", metavar="TEXT", help="Title of the page.")
@option("--overwrite", is_flag=True, help="Replace an existing file.")
@output_options("file", "bytes", "results")
def command(
    folders: tuple[str, ...], out: Path, title: str | None, overwrite: bool, output: Output
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
