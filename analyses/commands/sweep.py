"""`hijacklens sweep`: many runs from one file, resumable, with one table at the end."""

from __future__ import annotations

from pathlib import Path

import click

from analyses.commands.options import choose_engine, engine_options, no_cache_option
from analyses.commands.screen import document, files_written, output_options, records


@click.command("sweep")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for cells and table."
)
@engine_options
@no_cache_option
@output_options("folder", "files", "cells", "rows", "failed")
@click.pass_context
def command(
    context: click.Context,
    config: Path,
    out: Path,
    engine: str,
    workers: int | None,
    ray_address: str | None,
    no_cache: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run models x schemes x facts x seeds, and one-layer tasks x recipes, from a TOML file.

    CONFIG is checked key by key before anything runs; examples/sweep.toml shows what can stand in
    it. Every finished run has a folder of its own: the same command goes on after a kill, and a
    sweep that was changed does only what is new. Exits with status 1 if a cell failed.

    Writes into the folder: sweep.csv (a row per cell and dose, or cell and learning rate),
    failed.csv (cells that could not be done), result.json, sweep.svg and sweep.png,
    scoring/<cell>/ and training/<cell>/ (as `hijacklens hijack` and `train` write them).

    \b
    Examples:
      hijacklens sweep examples/sweep.toml --out runs/sweep
      hijacklens sweep examples/sweep.toml --out runs/sweep --engine ray --workers 2
    """  # noqa: D301
    from analyses.sweeps.file import load_sweep

    plan = load_sweep(config)
    chosen = choose_engine(engine, workers, ray_address)

    from analyses.commands.resumption import telling_of_the_store
    from analyses.sweeps.run import run_sweep
    from hijacklens.scoring.execution import Execution

    def tell(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    with telling_of_the_store():
        execution = Execution(engine=chosen, store=not no_cache)
        result = run_sweep(plan, out, execution=execution, quiet=quiet, tell=tell)
    cells, failed = len(result.settings.cells), len(result.failed)
    written = [*result.files(), "result.json", *result.figure_names]
    if as_json:
        document(
            folder=str(out),
            files=written,
            cells=cells,
            rows=records(result.table),
            failed=records(result.failed),
        )
    else:
        click.echo(f"{len(result.table)} rows of {cells - failed} cells")
        click.echo(files_written(out, written))
    if failed:
        first = result.failed.iloc[0]
        click.echo(
            f"hijacklens: {failed} of {cells} cells failed (failed.csv); the first, "
            f"{first['cell']}: {first['reason']} The same command tries them again.",
            err=True,
        )
        context.exit(1)
