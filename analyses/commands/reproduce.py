"""`hijacklens reproduce`: the figures and statements of the paper, each with its checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from analyses.commands import names
from analyses.commands.options import option, overwrite_option
from analyses.commands.screen import Output, output_options
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid

if TYPE_CHECKING:
    from analyses.reproduction.reproduction import Reproduction
    from analyses.reproduction.workbench import Workbench

EVERYTHING = "all"
TIMES = (
    "quick on two cores, paper on one core. +: in addition to models that other analyses train;",
    "shared: nothing more to train; depends: on models and facts; ~: estimated from parts",
)


@click.command("reproduce")
@click.argument("names", nargs=-1, metavar="[ID]...|all", shell_complete=names.analyses)
@option("--list", "listing", is_flag=True, help="Print every id with a line and its cost.")
@option(
    "--scale",
    type=click.Choice(["quick", "paper"]),
    default="quick",
    help="quick: ten minutes in all on two cores. paper: the paper's seeds and sizes, hours.",
)
@option(
    "--model",
    "models",
    multiple=True,
    metavar="M",
    shell_complete=names.models,
    help="A language model. Repeatable.  [default: the packaged ones]",
)
@option(
    "--facts",
    "source",
    metavar="SOURCE",
    shell_complete=names.facts,
    help="Facts, as `hijacklens hijack` has them.",
)
@option("--device", help="cpu, cuda, ...  [default: a GPU if there is one]")
@option("--out", type=click.Path(path_type=Path), help="Folder for the files.")
@option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for trained models, which runs share.  [default: OUT/work]",
)
@overwrite_option
@output_options("analyses", "folder", "scale")
@click.pass_context
def command(
    context: click.Context,
    names: tuple[str, ...],
    listing: bool,
    scale: Any,
    models: tuple[str, ...],
    source: str | None,
    device: str | None,
    out: Path | None,
    work: Path | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Reproduce figures, theorems and lemmas of the paper (arXiv 2406.18400).

    Each has checks that were written before it was run: a direction, or a number with a
    tolerance. Exits with status 1 if one fails. Started again with the same folder, the command
    goes on where it was. With --list, `analyses` of --json has the descriptions.

    \b
    Writes for each id: table.csv, figure.svg, figure.png, result.json (settings,
    which of them are ours, checks, provenance); and README.md, the ledger of all.

    \b
    Examples:
      hijacklens reproduce --list
      hijacklens reproduce fig3a --out runs/fig3a
      hijacklens reproduce all --scale paper --out runs/paper
    """  # noqa: D301
    from analyses.reproduction.catalogue import CATALOGUE, entry_of

    if listing:
        columns = {
            "id": "{id}",
            "quick": "{quick:>}",
            "paper": "{paper:>}",
            "what": "{reference}: {title}",
        }
        listed = [asdict(entry) for entry in CATALOGUE.values()]
        table = Grid.of(listed, columns)
        output.show(table, "", *TIMES, analyses=listed, folder=None, scale=scale)
        return
    if not names:
        raise InputError("name an analysis, several, or `all`; --list prints them.")
    asked = {name: entry_of(name) for name in names if name != EVERYTHING}
    if out is None:
        raise InputError("--out is missing: name the folder for the files.")
    chosen = list(CATALOGUE if EVERYTHING in names else asked)

    from analyses.reproduction.ledger import write_ledger
    from analyses.reproduction.reproduction import Reproduction, reproduce
    from analyses.reproduction.workbench import DEFAULT_MODELS, Workbench
    from analyses.texts import choose_facts
    from hijacklens.files import RECORD, claim_folder, expand_home, write_whole
    from hijacklens.results.result import load_result

    root = expand_home(out)
    bench = Workbench(
        folder=expand_home(work) if work else root / "work",
        models=models or DEFAULT_MODELS,
        facts=choose_facts(source, (), (), None, 0) if source else None,
        device=device,
        quiet=output.quiet,
    )
    results: list[Reproduction] = []
    for place, name in enumerate(chosen, start=1):
        if not output.quiet and len(chosen) > 1:
            click.echo(f"[{place}/{len(chosen)}] {name}: {CATALOGUE[name].title}", err=True)
        if (root / name / RECORD).exists() and not overwrite:
            found = load_result(root / name)
            assert isinstance(found, Reproduction)
            _same_run(found, root / name, scale, bench)
        else:
            found = reproduce(name, scale=scale, workbench=bench)
            found.save(claim_folder(root / name, overwrite=overwrite), overwrite=overwrite)
        results.append(found)
        output.show("", found.glance())
        ledger = write_ledger(root)
        write_whole(root / "README.md", partial(_write_text, ledger))
    failed = sum(not result.passed for result in results)
    count = "1 analysis" if len(results) == 1 else f"{len(results)} analyses"
    output.show(
        "",
        f"{count}, {failed} with a failed check; written to {out}/",
        analyses=[_record(result) for result in results],
        folder=str(out),
        scale=scale,
    )
    if failed:
        context.exit(1)


def _same_run(found: Reproduction, folder: Path, scale: str, bench: Workbench) -> None:
    """Refuse what is already in a folder where it comes of another call.

    Raises:
        InputError: It has another scale, other models or other facts, or checks or settings that
            the analysis does not have any more.
    """
    from analyses.reproduction.reproduction import asked_of

    asked = {"scale": scale, **asked_of(found.analysis.id, bench)}
    for what, value in asked.items():
        held = getattr(found, what)
        if held != value:
            raise InputError(
                f"{str(folder)!r} holds {found.analysis.id} with the {what} {_short(held)}, not "
                f"{_short(value)}; choose another folder or pass --overwrite."
            )
    claims = [check.claim for check in found.analysis.checks]
    if [outcome.claim for outcome in found.outcomes] != claims:
        raise InputError(
            f"{str(folder)!r} holds {found.analysis.id} with other checks than it has now; choose "
            "another folder or pass --overwrite."
        )
    held, now = asdict(found.settings), asdict(found.analysis.settings[found.scale])
    changed = [f"{name} {held[name]}, not {now[name]}" for name in now if held[name] != now[name]]
    if changed:
        raise InputError(
            f"{str(folder)!r} holds {found.analysis.id} with other settings than it has now "
            f"({'; '.join(changed)}); choose another folder or pass --overwrite."
        )


def _short(value: Any) -> str:
    """A scale, models or facts in a few words."""
    if isinstance(value, Mapping):
        return f"{value['name']} ({value['n']} facts, hash {value['hash'][:8]})"
    return value if isinstance(value, str) else ", ".join(value)


def _record(result: Reproduction) -> dict[str, Any]:
    """What --json says of an analysis that was run."""
    entry = asdict(result.analysis.entry)
    checks = [asdict(outcome) for outcome in result.outcomes]
    found = {"passed": result.passed, "checks": checks, "seconds": round(result.seconds, 1)}
    return {**entry, **found, "seed": result.provenance.seed}


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
