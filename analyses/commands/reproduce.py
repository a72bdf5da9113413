"""`hijacklens reproduce`: the figures and statements of the paper, each with its checks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hijacklens.errors import InputError

if TYPE_CHECKING:
    from analyses.reproduction import Reproduction

EVERYTHING = "all"


@click.command("reproduce")
@click.argument("names", nargs=-1, metavar="[ID]...|all")
@click.option("--list", "show", is_flag=True, help="Print every id with a line and its cost.")
@click.option(
    "--scale",
    type=click.Choice(["quick", "paper"]),
    default="quick",
    show_default=True,
    help="quick: 20 minutes in all on two cores. paper: the paper's seeds and sizes, hours.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="M",
    help="A language model. Repeatable.  [default: the packaged ones]",
)
@click.option("--facts", "source", metavar="SOURCE", help="Facts, as `hijacklens hijack` has them.")
@click.option("--device", help="cpu, cuda, ...  [default: a GPU if there is one]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for trained models, which runs share.  [default: OUT/work]",
)
@click.option("--overwrite", is_flag=True, help="Run again what is in the folder.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.pass_context
def command(
    context: click.Context,
    names: tuple[str, ...],
    show: bool,
    scale: Any,
    models: tuple[str, ...],
    source: str | None,
    device: str | None,
    out: Path | None,
    work: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Reproduce figures, theorems and lemmas of the paper (arXiv 2406.18400).

    Each has checks that were written before it was run: a direction, or a number with a
    tolerance. Exits with status 1 if one fails. Started again with the same folder, the command
    goes on where it was.

    \b
    Writes for each id: table.csv, figure.svg, figure.png, result.json (settings,
    which of them are ours, checks, provenance); and README.md, the ledger of all.

    \b
    Examples:
      hijacklens reproduce --list
      hijacklens reproduce fig3a --out runs/fig3a
      hijacklens reproduce all --scale paper --out runs/paper
    """  # noqa: D301
    from analyses.registry import analyses, get_analysis

    if show:
        click.echo(_listing(analyses().values()))
        return
    if not names:
        raise InputError("name an analysis, several, or `all`; --list prints them.")
    if out is None:
        raise InputError("--out is missing: name the folder for the files.")
    chosen = list(analyses()) if EVERYTHING in names else [get_analysis(n).id for n in names]

    from analyses.ledger import write_ledger
    from analyses.options import choose_facts
    from analyses.reproduction import Reproduction, reproduce
    from analyses.workbench import DEFAULT_MODELS, Workbench
    from hijacklens.results import RECORD, claim_folder, expand_home, load_result, write_whole

    root = expand_home(out)
    bench = Workbench(
        folder=expand_home(work) if work else root / "work",
        models=models or DEFAULT_MODELS,
        facts=choose_facts(source, (), (), None, 0) if source else None,
        device=device,
        quiet=quiet,
    )
    results: list[Reproduction] = []
    for name in dict.fromkeys(chosen):
        if (root / name / RECORD).exists() and not overwrite:
            found = load_result(root / name)
            assert isinstance(found, Reproduction)
            if found.scale != scale:
                raise InputError(
                    f"{str(root / name)!r} holds {name} at scale {found.scale}; choose another "
                    "folder or pass --overwrite."
                )
        else:
            found = reproduce(name, scale=scale, workbench=bench)
            found.save(claim_folder(root / name, overwrite=overwrite), overwrite=overwrite)
        results.append(found)
        click.echo(_report(found))
        ledger = write_ledger(root)
        write_whole(root / "README.md", partial(_write_text, ledger))
    failed = sum(not result.passed for result in results)
    click.echo(f"{len(results)} analyses, {failed} with a failed check; written to {out}/")
    if failed:
        context.exit(1)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _listing(found: Any) -> str:
    from analyses.tables import table

    rows = [
        (item.id, item.source, item.title, item.cost["quick"], item.cost["paper"]) for item in found
    ]
    return table(("id", "source", "what", "quick", "paper"), rows, left="lllrr")


def _report(result: Reproduction) -> str:
    analysis = result.analysis
    entry = analysis.entry
    lines = [f"\n{entry.id} · {entry.source} · {entry.title} ({result.seconds:.0f} s)"]
    for outcome in result.outcomes:
        lines.append(
            f"  {outcome.state:4}  {outcome.claim}: {outcome.value:.4g} "
            f"[{outcome.low:.4g}, {outcome.high:.4g}], allowed {outcome.allowed}"
        )
        if outcome.remark:
            lines.append(f"        {outcome.remark}")
    return "\n".join(lines)
