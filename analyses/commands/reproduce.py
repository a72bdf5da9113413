"""`hijacklens reproduce`: the figures and statements of the paper, each with its checks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from analyses.commands import names as completion
from analyses.commands.declarations import argument, declared, option
from analyses.commands.options import (
    ModelChoice,
    Overwrite,
    model_option,
    out_option,
    source_option,
)
from analyses.commands.screen import Output, say
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid

if TYPE_CHECKING:
    from analyses.reproduction.check import Scale
    from analyses.reproduction.reproduction import Reproduction
    from analyses.reproduction.workbench import Workbench

EVERYTHING = "all"
TIMES = (
    "quick on two cores, full on one core. +: in addition to models that other analyses train;",
    "shared: nothing more to train; depends: on models and facts; ~: estimated from parts",
)


@click.command("reproduce")
@declared("analyses", "folder", "scale")
def command(
    *,
    names: Annotated[
        tuple[str, ...], argument(metavar="[ID]...|all", shell_complete=completion.analyses)
    ],
    listing: Annotated[bool, option("List every id with its title and cost.", "--list")] = False,
    scale: Annotated[
        Literal["quick", "full", "paper"],
        option(
            "quick: ten minutes in all on two cores. full: the paper's seeds and sizes, hours. "
            "paper: former name of full."
        ),
    ] = "quick",
    changes: Annotated[
        tuple[str, ...],
        option("NAME=JSON: another value of a setting. Repeatable.", "--set", metavar="NAME=JSON"),
    ] = (),
    models: Annotated[
        tuple[str, ...],
        model_option("A language model. Repeatable.  [default: the packaged ones]", "--model"),
    ] = (),
    source: Annotated[
        str | None,
        source_option("The facts; see `hijacklens hijack --help`.", "--facts"),
    ] = None,
    device: Annotated[
        str | None, option("cpu, cuda, ...  [default: a GPU if there is one]")
    ] = None,
    out: Annotated[Path | None, out_option("Folder for the files.")] = None,
    work: Annotated[
        Path | None,
        out_option("Folder for trained models, which runs share.  [default: OUT/work]"),
    ] = None,
    overwrite: Overwrite = False,
    output: Output,
) -> None:
    """Reproduce figures, theorems and lemmas of the paper (arXiv 2406.18400).

    Each has checks: a direction, or a number with a tolerance. Exits with status 1 if a check
    fails. The same command with the same folder resumes
    an interrupted run. With --list, the key `analyses` of --json has the descriptions.

    \b
    Writes for each id: table.csv, figure.svg, figure.png, result.json (settings,
    which of them are ours, checks, provenance); and README.md, the ledger of all checks.

    \b
    Examples:
      hijacklens reproduce --list
      hijacklens reproduce fig3a --out runs/fig3a
      hijacklens reproduce all --scale full --out runs/full
    """  # noqa: D301
    from analyses.reproduction.catalogue import CATALOGUE, entry_of

    if listing:
        columns = {
            "id": "{id}",
            "quick": "{quick:>}",
            "full": "{full:>}",
            "what": "{reference}: {title}",
        }
        listed = [asdict(entry) for entry in CATALOGUE.values()]
        table = Grid.of(listed, columns)
        output.show(table, "", *TIMES, analyses=listed, folder=None, scale=scale)
        return
    if not names:
        raise InputError("name an analysis, several, or `all`; --list prints them.")
    requested = {name: entry_of(name) for name in names if name != EVERYTHING}
    if out is None:
        raise InputError("--out is missing: name the folder for the files.")
    ids = list(CATALOGUE if EVERYTHING in names else requested)
    ModelChoice(device=device).check(*models)
    from hijacklens.facts.loading import load_facts

    facts = load_facts(source) if source else None

    from analyses.reproduction.analysis import get_analysis
    from analyses.reproduction.check import scale_named
    from analyses.reproduction.ledger import write_ledger
    from analyses.reproduction.reproduction import Reproduction, reproduce
    from analyses.reproduction.settings import change
    from analyses.reproduction.workbench import DEFAULT_MODELS, Workbench
    from hijacklens.files import RECORD, expand_home, write_text
    from hijacklens.results.result import load_result

    root, size = expand_home(out), scale_named(scale)
    changed = dict(map(_setting, changes))
    for name in ids:  # refused now, not after the analyses before it
        change(get_analysis(name).settings[size], changed)
    bench = Workbench(
        folder=expand_home(work) if work else root / "work",
        models=models or DEFAULT_MODELS,
        facts=facts,
        device=device,
        quiet=output.quiet,
    )
    results: list[Reproduction] = []
    for number, name in enumerate(ids, start=1):
        if not output.quiet and len(ids) > 1:
            say(f"[{number}/{len(ids)}] {name}: {CATALOGUE[name].title}")
        if (root / name / RECORD).exists() and not overwrite:
            result = load_result(root / name)
            assert isinstance(result, Reproduction)
            _check_same_run(result, root / name, size, changed, bench)
        else:
            result = reproduce(name, scale=size, changes=changed, workbench=bench)
            result.save(root / name, overwrite=overwrite)
        results.append(result)
        output.show("", result.glance())
        write_text(root / "README.md", write_ledger(root))
    failed = sum(not result.passed for result in results)
    count = "1 analysis" if len(results) == 1 else f"{len(results)} analyses"
    output.show(
        "",
        f"{count}, {failed} with a failed check; written to {out}/",
        analyses=[_record(result) for result in results],
        folder=str(out),
        scale=size,
    )
    if failed:
        click.get_current_context().exit(1)


def _setting(text: str) -> tuple[str, Any]:
    """Read NAME=JSON."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise InputError(
            f"--set {text!r} is not NAME=JSON; write for example limit=200 or 'doses=[0, 1, 5]'."
        ) from None


def _check_same_run(
    saved: Reproduction, folder: Path, scale: Scale, changes: dict[str, Any], bench: Workbench
) -> None:
    """Refuse a saved result that differs from what this call would compute.

    Raises:
        InputError: It has another scale, other models or facts, or other checks or settings.
    """
    from analyses.reproduction.reproduction import asked_of
    from analyses.reproduction.settings import change

    differences = [
        f"the {what} {_short(getattr(saved, what))}, not {_short(value)}"
        for what, value in {"scale": scale, **asked_of(saved.analysis.id, bench)}.items()
        if getattr(saved, what) != value
    ]
    claims = [check.claim for check in saved.analysis.checks]
    if [outcome.claim for outcome in saved.outcomes] != claims:
        differences.append("other checks than it has now")
    old, new = map(asdict, (saved.settings, change(saved.analysis.settings[saved.scale], changes)))
    changed = [f"{name} {old[name]}, not {new[name]}" for name in new if old[name] != new[name]]
    if changed:
        differences.append(f"other settings than it has now ({'; '.join(changed)})")
    if differences:
        raise InputError(
            f"{str(folder)!r} holds {saved.analysis.id} with {differences[0]}; choose another "
            "folder or pass --overwrite."
        )


def _short(value: Any) -> str:
    """Write a scale, models or facts in a few words."""
    from hijacklens.facts.fact import FactsRecord

    if isinstance(value, FactsRecord):
        return f"{value.name} ({value.n} facts, hash {value.hash[:8]})"
    return value if isinstance(value, str) else ", ".join(value)


def _record(result: Reproduction) -> dict[str, Any]:
    """Return what --json shows of an analysis that was run."""
    return {
        **asdict(result.analysis.entry),
        "passed": result.passed,
        "checks": [asdict(outcome) for outcome in result.outcomes],
        "seconds": round(result.seconds, 1),
        "seed": result.provenance.seed,
    }
