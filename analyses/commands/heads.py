"""`hijacklens heads`: find the heads that carry a hijack, and test them on facts held back."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from analyses.commands import names
from analyses.commands.options import (
    batch_tokens_option,
    facts_options,
    model_option,
    model_options,
    overwrite_option,
    rule_option,
)
from analyses.commands.resumption import usual_folder
from analyses.commands.screen import (
    document,
    files_written,
    note,
    output_options,
    records,
    say_loading,
    show,
)
from analyses.texts import choose_facts, read_doses

SHOWN: dict[str, Any] = {"show_default": True}


@click.command("heads")
@model_option
@click.option(
    "--scheme",
    default="do-not-think",
    metavar="S",
    shell_complete=names.schemes,
    help="Searched with.",
    **SHOWN,
)
@click.option("--dose", type=int, default=1, help="Sentences before the query.", **SHOWN)
@click.option("--size", type=int, default=5, help="How many heads to choose.", **SHOWN)
@click.option(
    "--candidates",
    type=int,
    default=20,
    help="How many heads, the best by attribution, are ablated one by one.",
    **SHOWN,
)
@click.option(
    "--attribution",
    type=click.Choice(["gradient", "direct"]),
    default="gradient",
    help="Attribution patching, or what heads write to the logits themselves.",
    **SHOWN,
)
@click.option(
    "--ablation",
    "kind",
    type=click.Choice(["mean", "zero"]),
    default="mean",
    help="What replaces a head's output: its mean over bare queries, or zero.",
    **SHOWN,
)
@click.option(
    "--strategy",
    type=click.Choice(["top", "greedy"]),
    default="top",
    help="The best candidates one by one, or one added after another (slower).",
    **SHOWN,
)
@click.option(
    "--split",
    type=click.Choice(["fact", "relation"]),
    default="fact",
    help="Search on half of the facts, or of the relations; test on the other half.",
    **SHOWN,
)
@click.option(
    "--test-scheme",
    "test_schemes",
    multiple=True,
    metavar="S",
    shell_complete=names.schemes,
    help="Scheme of the test. Repeatable.  [default: that of the search]",
)
@click.option(
    "--test-doses", metavar="LIST", help="Doses of the test.  [default: that of the search]"
)
@click.option(
    "--random-sets",
    type=int,
    default=20,
    help="Random sets of each kind (same layers, any layer) to compare with.",
    **SHOWN,
)
@facts_options
@model_options
@batch_tokens_option
@rule_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the files.  [default: runs/<date>-heads-<model>, then -2, ...]",
)
@overwrite_option
@output_options(
    "folder",
    "files",
    "seed",
    "rule",
    "heads",
    "candidates",
    "growth",
    "agreement",
    "summary",
    "side_effects",
    "skipped",
)
def command(
    name: str,
    scheme: str,
    dose: int,
    test_schemes: tuple[str, ...],
    test_doses: str | None,
    random_sets: int,
    split: Any,
    source: str,
    relations: tuple[str, ...],
    cases: tuple[int, ...],
    limit: int | None,
    seed: int,
    batch_tokens: int | None,
    rule: Any,
    out: Path | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    size: int,
    candidates: int,
    attribution: Any,
    kind: Any,
    strategy: Any,
    **loading: Any,
) -> None:
    """Find the heads that carry the hijack's logit shift, and test them on facts held back.

    A head carries as much of the shift as goes away when its output is ablated. All heads are
    ranked by attribution, the best are ablated one by one, and a set is chosen, on one half of
    the facts. On the other half the model is scored with no head ablated, with the set, and with
    random sets of its size. What the set does to the bare query is printed beside it.

    Writes into the folder: items.parquet (a row per ablation, fact, scheme and
    dose), sets.csv, summary.csv, side_effects.csv, skipped.csv, result.json,
    test.svg and .png; and into search/: heads.csv (a row per head), growth.csv,
    facts.parquet, skipped.csv, search.npz, result.json, heads.svg and .png.

    \b
    Examples:
      hijacklens heads --model smollm2-135m --limit 100 --split relation
      hijacklens heads --model gpt2 --facts counterfact --limit 600 --size 8 \\
          --test-scheme do-not-think --test-scheme relation --random-sets 100
    """  # noqa: D301
    from hijacklens.errors import InputError
    from hijacklens.files import RECORD, check_folder
    from hijacklens.prompts.schemes import get_scheme
    from hijacklens.scoring.execution import Execution

    chosen = get_scheme(scheme)
    tested = [get_scheme(given) for given in test_schemes] or [chosen]
    doses = [dose] if test_doses is None else read_doses(test_doses)
    if not 1 <= size <= candidates or random_sets < 0:
        raise InputError(
            f"--size {size}, --candidates {candidates}, --random-sets {random_sets}: the size is "
            "from 1 to the number of candidates, and random sets are 0 or more."
        )
    facts = choose_facts(source, relations, cases, limit, seed)
    label = f"heads-{Path(name).name}"
    folder = check_folder(out or usual_folder(label, overwrite=overwrite), overwrite=overwrite)

    from hijacklens.models.loading import load_model
    from hijacklens.scoring.pairs import pairs
    from probes import heads

    searched, held_back = heads.halves(facts, by=split, seed=seed)
    say_loading(name, quiet=quiet)
    model = load_model(name, **loading)
    if facts.note:
        note(f"{facts.name}: {facts.note}", quiet=quiet)
    execution = Execution(batch_tokens=batch_tokens)
    found = heads.search(
        model,
        pairs(model, searched, scheme=chosen, dose=dose, seed=seed),
        size=size,
        candidates=candidates,
        attribution=attribution,
        kind=kind,
        strategy=strategy,
        execution=execution,
        quiet=quiet,
    )
    (folder / RECORD).unlink(missing_ok=True)
    found.save(folder / "search", overwrite=True)  # kept if the test fails
    if not as_json:
        show(found.glance())
    result = found.test(
        held_back,
        schemes=tested,
        doses=doses,
        random_sets=random_sets,
        execution=execution,
        quiet=quiet,
    )
    result.save(folder, overwrite=overwrite)
    written = [*result.files(), "result.json", *result.figure_names, "search/"]
    if as_json:
        table = found.to_dataframe()
        document(
            folder=str(folder),
            files=written,
            seed=seed,
            rule=rule,
            heads=[list(head) for head in found.heads],
            candidates=records(table.dropna(subset=["carried"])),
            growth=records(found.growth),
            agreement=asdict(found.agreement),
            summary=records(result.summary(rule=rule)),
            side_effects=records(result.side_effects(rule=rule)),
            skipped=records(result.skipped),
        )
        return
    show("", result.glance(rule=rule), files_written(folder, written))
