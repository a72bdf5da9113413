"""`hijacklens cache`: show or clear the store of finished readings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import click

from analyses.commands.declarations import declared, option
from analyses.commands.screen import Output
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid


@click.group("cache")
def command() -> None:
    """Show or clear the store of finished readings.

    Every score that a run computes is kept in one file, so that an interrupted run resumes and no
    prompt is run twice. Readings are keyed by weights, settings, tokenizer, dtype and probes, so
    those of two models never mix.

    \b
    The file is in the cache folder. HIJACKLENS_CACHE moves that folder,
    HIJACKLENS_STORE names another file, HIJACKLENS_STORE=off turns the store off.
    """  # noqa: D301


@command.command("info")
@declared("path", "bytes", "models", "aside")
def info(*, output: Output) -> None:
    """Show the file, its size, and how many readings it holds of each model."""
    from hijacklens.store.store import usual_store

    contents = usual_store().contents()
    columns = {
        "model": "{model}",
        "arithmetic": "{arithmetic}",
        "probes": "{probes}",
        "readings": "{readings:,}",
        "since (UTC)": "{created}",
        "versions": "{versions}",
    }
    rows = [{**asdict(row), "probes": "; ".join(row.probes) or "none"} for row in contents.rows]
    output.show(
        f"{contents.path}  ({_size(contents.size)})",
        *(("", Grid.of(rows, columns)) if rows else ("no readings are stored",)),
        *(
            f"set aside as broken: {file}  ({_size(file.stat().st_size)}); delete it if you do "
            "not need it"
            for file in contents.aside
        ),
        path=str(contents.path),
        bytes=contents.size,
        models=[asdict(row) for row in contents.rows],
        aside=[str(file) for file in contents.aside],
    )


@command.command("clear")
@declared("path", "model", "deleted")
def clear(
    *,
    model: Annotated[
        str | None, option("Only the readings of this model, as `info` names it.", metavar="M")
    ] = None,
    yes: Annotated[bool, option("Do not ask.")] = False,
    output: Output,
) -> None:
    """Delete the stored readings, or those of one model, after asking."""
    if output.as_json and not yes:
        raise InputError("--json does not ask; add --yes to delete the stored readings.")
    from hijacklens.store.store import usual_store

    store = usual_store()
    count = store.count(model=model)
    readings = f"{count:,} readings{f' of {model}' if model else ''}"
    if count and not yes and not click.confirm(f"Delete {readings} from {store.path}?"):
        click.echo("nothing was deleted")
        return
    output.show(
        f"deleted {readings} from {store.path}" if count else "no readings are stored",
        path=str(store.path),
        model=model,
        deleted=store.clear(model=model) if count else 0,
    )


def _size(octets: int) -> str:
    return f"{octets / 2**20:,.1f} MiB" if octets >= 2**20 else f"{octets / 2**10:,.0f} KiB"
