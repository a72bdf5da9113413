"""`hijacklens compare`, `report`, `show`, `export`, `cache`: saved results and readings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import click

from analyses.commands.declarations import argument, declared, option
from analyses.commands.options import Overwrite, Rule, out_option
from analyses.commands.screen import Output, records
from hijacklens.errors import InputError, fraction_margin
from hijacklens.files import RECORD, check_folder
from hijacklens.results.glance import Grid


@click.command("compare")
@declared(
    *("changes", "clusters", "correction", "differences", "equivalence", "first", "folder"),
    *("gate", "second", "unmatched"),
)
def compare(
    *,
    sides: Annotated[
        tuple[str, ...],
        argument(required=True, type=str, metavar="DIR [DIR | FIRST SECOND]"),
    ],
    dose: Annotated[int | None, option("Only this dose.", metavar="N")] = None,
    scheme: Annotated[str | None, option("Only this scheme.", metavar="S")] = None,
    model: Annotated[str | None, option("Only this model.", metavar="M")] = None,
    rule: Rule = "first",
    clusters: Annotated[
        tuple[str, ...],
        option(
            "What is a sample of its kind: relation, subject, target_false or template. Give it "
            "twice to cross two.  [default: relation]",
            "--by",
        ),
    ] = (),
    correction: Annotated[
        Literal["holm", "benjamini-hochberg", "none"],
        option("Corrects p for the number of tests."),
    ] = "holm",
    equivalence: Annotated[
        float | None,
        option("Also test that fractions change by less than this.", metavar="X"),
    ] = None,
    max_rise: Annotated[
        float | None,
        option(
            "Gate: status 0 if efficacy is shown to rise by less than this, 1 if it rises, "
            "3 if the facts do not tell.",
            metavar="X",
        ),
    ] = None,
    claim: Annotated[
        Literal["facts", "relations"],
        option("Whether the gate is about these facts, or about relations like these."),
    ] = "relations",
    strict: Annotated[
        bool, option("Refuse runs that differ in more than the model (name, weights, device).")
    ] = False,
    out: Annotated[Path | None, out_option("Save the comparison in this folder.")] = None,
    overwrite: Overwrite = False,
    output: Output,
) -> int:
    """Compare two saved runs, or two schemes, doses, rules or models of one, fact by fact.

    A DIR is a folder that `hijacklens hijack` wrote. Changes are the second side minus the first,
    with two intervals: one about these facts, one about relations like these.

    \b
    Examples:
      hijacklens compare runs/plain runs/probed --dose 1
      hijacklens compare runs/first do-not-think think --dose 1
      hijacklens compare runs/first 1 5
      hijacklens compare runs/base runs/new --scheme think --dose 1 --max-rise 0.05
    """  # noqa: D301
    chosen = {"dose": dose, "scheme": scheme, "model": model, "rule": rule}
    if len(sides) not in (2, 3):
        raise InputError(
            f"compare takes two folders, or a folder and two names; given: {len(sides)} words."
        )
    for name, margin in (("max_rise", max_rise), ("equivalence", equivalence)):
        if margin is not None:
            fraction_margin(name, margin)
    if out is not None:
        check_folder(out, overwrite=overwrite)

    from hijacklens.scoring import comparison

    if len(sides) == 2:
        only = {name: value for name, value in chosen.items() if value is not None}
        found = comparison.compare(*sides, first=only, second=only)
    else:
        first, second = (int(side) if side.isdecimal() else side for side in sides[1:])
        if first in ("first", "sum", "mean"):
            chosen["rule"] = None
        found = comparison.compare_within(sides[0], first, second, chosen)
    from hijacklens.scoring.matching import MODEL

    more = {name: pair for name, pair in found.differences.items() if name not in MODEL}
    if strict and more:
        pairs = "; ".join(f"{name} {one} -> {other}" for name, (one, other) in more.items())
        raise InputError(f"the runs differ in more than the model ({pairs}); --strict forbids it.")
    if max_rise is not None:
        found = found.with_gate(max_rise, claim=claim)
    by = clusters or ("relation",)
    options = {"by": by, "correction": correction, "equivalence": equivalence}
    document = {
        "changes": records(found.changes(**options)),
        "clusters": list(by),
        "correction": correction,
        "differences": found.differences,
        "equivalence": equivalence,
        "gate": asdict(found.gate) if found.gate else None,
        "first": found.labels["reference"],
        "second": found.labels["other"],
        "unmatched": records(found.unmatched),
    }
    glance = found.glance(**options)
    if out is None:
        output.show(glance, folder=None, **document)
    else:
        folder = found.save(out, overwrite=overwrite)
        output.show(glance, f"written to {folder}/", folder=str(folder), **document)
    return STATUS[found.gate.verdict] if found.gate else 0


STATUS = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
"""Verdict of a gate -> exit status."""


@click.command("report")
@declared("file", "bytes", "results")
def report(
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


@click.command("show")
@declared("results")
def show(
    *,
    folders: Annotated[
        tuple[str, ...],
        argument(required=True, type=click.Path(path_type=str), metavar="DIR [DIR ...]"),
    ],
    output: Output,
) -> None:
    """Print the tables of saved results again, and which command made them.

    A DIR is a folder that any command wrote, or one that holds such folders.

    \b
    Example:
      hijacklens show runs/first
    """  # noqa: D301
    from hijacklens.report.writing import results_in
    from hijacklens.results.result import load_result
    from hijacklens.world.trained import RECORD as WORLD
    from hijacklens.world.trained import load_world

    documents = []
    found = [one for source in folders for one in results_in(source, RECORD, WORLD)]
    for i, folder in enumerate(found):
        path = Path(folder)
        result = load_world(path) if (path / WORLD).exists() else load_result(path)
        glance, provenance = result.glance(), getattr(result, "provenance", None)
        made = f"; made {provenance.created} by: {provenance.command}" if provenance else ""
        inner = [str(one.parent) for one in sorted(path.glob(f"[!.]*/{RECORD}"))]
        hint = [f"results inside: {', '.join(inner)}"] if inner else []
        output.show(*[""] * bool(i), glance, f"read from {path}/{made}", *hint)
        kind = type(result).__name__
        documents.append({"folder": str(path), "type": kind, **asdict(glance), "inner": inner})
    output.show(results=documents)


@click.command("export")
@declared("files", "folder")
def export(
    *,
    folder: Annotated[str, argument(metavar="DIR")],
    to: Annotated[
        tuple[Literal["lm-eval", "every-eval-ever", "hub", "dataset"], ...],
        option("The form of the files; give it several times for several.", required=True),
    ],
    out: Annotated[Path, out_option("The folder; each form gets a folder in it.")],
    rule: Rule = "first",
    ids: Annotated[
        tuple[str, ...],
        option(
            "Id of a model on the hub, if the run names it otherwise.",
            "--id",
            metavar="NAME=OWNER/NAME",
        ),
    ] = (),
    dataset: Annotated[
        str, option("For hub: id of the benchmark's data set.", metavar="OWNER/NAME")
    ] = "",
    organization: Annotated[
        str, option("For every-eval-ever: who ran the evaluation.", metavar="TEXT")
    ] = "unknown",
    overwrite: Annotated[bool, option("Replace existing files.")] = False,
    output: Output,
) -> None:
    """Write a saved run in forms that other tools read.

    DIR is a folder that `hijacklens hijack` wrote. lm-eval: results and samples of
    lm-evaluation-harness. every-eval-ever: its records, aggregate and per instance, with
    intervals. hub: .eval_results of each model's repository. dataset: a folder for
    datasets.load_dataset, with a card.

    \b
    Examples:
      hijacklens export runs/first --to lm-eval --to dataset --out export
      hijacklens export runs/first --to hub --out export --dataset me/facts --id gpt2=me/gpt2
    """  # noqa: D301
    for pair in ids:
        if not all(pair.partition("=")[::2]):
            raise InputError(f"--id takes NAME=OWNER/NAME, such as gpt2=me/gpt2; given: {pair!r}.")

    from hijacklens.exports.export import export as write

    named = dict(pair.split("=", 1) for pair in ids)
    files: list[Path] = []
    for kind in dict.fromkeys(to):
        files += write(
            folder,
            out / kind,
            to=kind,
            rule=rule,
            ids=named,
            dataset=dataset,
            organization=organization,
            overwrite=overwrite,
        )
    written = [f"written to {out / kind}/" for kind in dict.fromkeys(to)]
    output.show(*written, folder=str(out), files=[str(path.relative_to(out)) for path in files])


@click.group("cache")
def cache() -> None:
    """Show or clear the store of finished readings.

    Every score that a run computes is kept in one file, so that an interrupted run resumes and no
    prompt is run twice. Readings are keyed by weights, settings, tokenizer, dtype and probes, so
    those of two models never mix.

    \b
    The file is in the cache folder. HIJACKLENS_CACHE moves that folder,
    HIJACKLENS_STORE names another file, HIJACKLENS_STORE=off turns the store off.
    """  # noqa: D301


@cache.command("info")
@declared("path", "bytes", "models", "aside")
def info(*, output: Output) -> None:
    """Show the file, its size, and how many readings it holds of each model."""
    from hijacklens.store.contents import usual_store

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


@cache.command("clear")
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
    from hijacklens.store.contents import usual_store

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
