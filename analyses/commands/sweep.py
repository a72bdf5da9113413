"""`hijacklens sweep`: many runs from one file, resumable, with one table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click

from analyses.commands.declarations import argument, declared
from analyses.commands.options import ExecutionChoice, out_option
from analyses.commands.screen import Output, records, say


@click.command("sweep")
@declared("folder", "files", "cells", "rows", "failed")
def command(
    *,
    config: Annotated[Path, argument()],
    out: Annotated[Path, out_option("Folder for the results.")],
    execution: Annotated[ExecutionChoice, ("engine", "workers", "ray_address", "no_cache")],
    output: Output,
) -> None:
    """Run models x schemes x facts x seeds, and one-layer tasks x recipes, from a TOML file.

    CONFIG is checked before anything runs; examples/sweep.toml shows its keys. Every run of the
    sweep has a separate folder: the same command resumes after an interruption, and a changed
    sweep runs only what is new. Exits with status 1 if a cell failed.

    Writes into the folder: sweep.csv (a row per cell and dose, or cell and learning rate),
    failed.csv (cells that failed), result.json, sweep.svg and sweep.png,
    scoring/<cell>/ and training/<cell>/ (as `hijacklens hijack` and `train` write them).

    \b
    Examples:
      hijacklens sweep examples/sweep.toml --out runs/sweep
      hijacklens sweep examples/sweep.toml --out runs/sweep --engine ray --workers 2
    """  # noqa: D301
    from analyses.sweeps.file import load_sweep

    plan = load_sweep(config)
    computed = execution.load()

    from analyses.sweeps.run import run_sweep

    def tell(line: str) -> None:
        if not output.quiet:
            say(line)

    result = run_sweep(plan, out, execution=computed, quiet=output.quiet, tell=tell)
    cells, failed = len(result.settings.cells), len(result.failed)
    output.show_saved(
        out,
        result.glance(),
        cells=cells,
        rows=records(result.table),
        failed=records(result.failed),
    )
    if failed:
        first = result.failed.iloc[0]
        say(
            f"hijacklens: {failed} of {cells} cells failed (failed.csv); the first, "
            f"{first['cell']}: {first['reason']} The same command tries them again."
        )
        click.get_current_context().exit(1)
