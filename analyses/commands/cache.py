"""`hijacklens cache`: what the store of finished readings holds, and deleting it."""

from __future__ import annotations

from dataclasses import asdict

import click

from analyses.commands.resumption import telling_of_the_store
from analyses.commands.screen import document, output_options, show
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid


@click.group("cache")
def command() -> None:
    """Show or clear the store of finished readings.

    Every score that a run computes is kept in one file, so that a run that was cut short goes on
    where it was and no prompt is run twice. Weights, settings, tokenizer, dtype and probes are
    part of what a reading goes by, so two models never mix.

    \b
    The file lies in the cache folder. HIJACKLENS_CACHE moves that folder,
    HIJACKLENS_STORE names another file, HIJACKLENS_STORE=off turns it off.
    """  # noqa: D301


@command.command("info")
@output_options("path", "bytes", "models", "aside")
def info(as_json: bool, quiet: bool) -> None:
    """Show the file, its size, and how many readings it holds of which model."""
    from hijacklens.store.store import usual_store

    with telling_of_the_store():
        contents = usual_store().contents()
    if as_json:
        document(
            path=str(contents.path),
            bytes=contents.size,
            models=[asdict(row) for row in contents.rows],
            aside=[str(file) for file in contents.aside],
        )
        return
    columns = {
        "model": "{model}",
        "arithmetic": "{arithmetic}",
        "probes": "{probes}",
        "readings": "{readings:,}",
        "since (UTC)": "{created}",
        "versions": "{versions}",
    }
    rows = [{**asdict(row), "probes": "; ".join(row.probes) or "none"} for row in contents.rows]
    show(
        f"{contents.path}  ({_size(contents.size)})",
        *(("", Grid.of(rows, columns)) if rows else ("no readings are stored",)),
        *(
            f"set aside as broken: {file}  ({_size(file.stat().st_size)}); delete it if you do "
            "not need it"
            for file in contents.aside
        ),
    )


@command.command("clear")
@click.option("--model", metavar="M", help="Only the readings of this model, as `info` names it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_options("path", "model", "deleted")
def clear(model: str | None, yes: bool, as_json: bool, quiet: bool) -> None:
    """Delete the stored readings, or those of one model, after asking."""
    from hijacklens.store.store import usual_store

    store = usual_store()
    with telling_of_the_store():
        counted = store.count(model=model)
    if as_json:
        if not yes:
            raise InputError("--json does not ask; add --yes to delete the stored readings.")
        deleted = store.clear(model=model) if counted else 0
        document(path=str(store.path), model=model, deleted=deleted)
        return
    if not counted:
        click.echo("no readings are stored")
        return
    of_model = f" of {model}" if model else ""
    question = f"Delete {counted:,} readings{of_model} from {store.path}?"
    if not yes and not click.confirm(question):
        click.echo("nothing was deleted")
        return
    click.echo(f"deleted {store.clear(model=model):,} readings{of_model} from {store.path}")


def _size(octets: int) -> str:
    return f"{octets / 2**20:,.1f} MiB" if octets >= 2**20 else f"{octets / 2**10:,.0f} KiB"
