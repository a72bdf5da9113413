"""`hijacklens heads`: find the heads that carry a hijack, and test them on held-out facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from analyses.commands import names
from analyses.commands.options import (
    ExecutionChoice,
    FactsChoice,
    FolderChoice,
    ModelChoice,
    batch_options,
    collected,
    facts_options,
    folder_options,
    model_option,
    model_options,
    option,
    rule_option,
)
from analyses.commands.screen import Output, files_in, files_written, output_options, records
from analyses.texts import read_doses


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchChoice:
    """What is searched, and how; see `probes.heads.search`."""

    scheme: str
    dose: int
    size: int
    candidates: int
    attribution: Any
    kind: Any
    strategy: Any


search_options = collected(
    "search",
    SearchChoice,
    option(
        "--scheme",
        default="do-not-think",
        metavar="S",
        shell_complete=names.schemes,
        help="Scheme of the search.",
    ),
    option("--dose", type=int, default=1, help="Sentences before the query."),
    option("--size", type=int, default=5, help="How many heads to choose."),
    option(
        "--candidates",
        type=int,
        default=20,
        help="How many of the heads with the highest attribution to ablate one by one.",
    ),
    option(
        "--attribution",
        type=click.Choice(["gradient", "direct"]),
        default="gradient",
        help="Rank heads by attribution patching, or by what they write directly to the logits.",
    ),
    option(
        "--ablation",
        "kind",
        type=click.Choice(["mean", "zero"]),
        default="mean",
        help="The replacement of a head's output: its mean over bare queries, or zero.",
    ),
    option(
        "--strategy",
        type=click.Choice(["top", "greedy"]),
        default="top",
        help="Choose the heads with the largest single effects, or add the best head "
        "one at a time (slower).",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TestChoice:
    """How the facts are split, and what the heads are tested on."""

    split: Any
    test_schemes: tuple[str, ...]
    test_doses: str | None
    random_sets: int


test_options = collected(
    "test",
    TestChoice,
    option(
        "--split",
        type=click.Choice(["fact", "relation"]),
        default="fact",
        help="Search on half of the facts, or of the relations; test on the other half.",
    ),
    option(
        "--test-scheme",
        "test_schemes",
        multiple=True,
        metavar="S",
        shell_complete=names.schemes,
        help="Scheme of the test. Repeatable.  [default: the scheme of the search]",
    ),
    option(
        "--test-doses",
        metavar="LIST",
        help="Doses of the test.  [default: the dose of the search]",
    ),
    option(
        "--random-sets",
        type=click.IntRange(min=0),
        default=20,
        help="Random sets of each kind (same layers, any layer) to compare with.",
    ),
)


@click.command("heads")
@model_option
@search_options
@test_options
@facts_options
@model_options
@batch_options
@rule_option
@folder_options("heads-<model>")
@output_options(
    "folder", "files", "seed", "rule", "heads", "candidates", "growth", "agreement", "summary",
    "side_effects", "skipped",
)  # fmt: skip
def command(
    name: str,
    search: SearchChoice,
    test: TestChoice,
    facts: FactsChoice,
    loading: ModelChoice,
    execution: ExecutionChoice,
    rule: Any,
    folder: FolderChoice,
    output: Output,
) -> None:
    """Find the heads that carry the hijack's logit shift, and test them on held-out facts.

    A head carries the part of the shift that disappears when its output is ablated. On one half
    of the facts, all heads are ranked by attribution, the best are ablated one by one, and a set
    is chosen. On the other half the model is scored with no head ablated, with the set ablated,
    and with random sets of its size ablated; side effects on the bare query are printed too.

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
    from hijacklens.prompts.schemes import get_scheme

    scheme = get_scheme(search.scheme)
    test_schemes = [get_scheme(name) for name in test.test_schemes] or [scheme]
    doses = [search.dose] if test.test_doses is None else read_doses(test.test_doses)
    all_facts = facts.load()
    path = folder.check(f"heads-{Path(name).name}")

    from hijacklens.files import RECORD
    from hijacklens.scoring.pairs import pairs
    from probes import heads

    searched, held_out = heads.halves(all_facts, by=test.split, seed=facts.seed)
    output.loading(name)
    model = loading.load(name)
    if all_facts.note:
        output.note(f"{all_facts.name}: {all_facts.note}")
    computed = {"execution": execution.load(), "quiet": output.quiet}
    head_search = heads.search(
        model,
        pairs(model, searched, scheme=scheme, dose=search.dose, seed=facts.seed),
        size=search.size,
        candidates=search.candidates,
        method=heads.Method(
            attribution=search.attribution, kind=search.kind, strategy=search.strategy
        ),
        **computed,
    )
    (path / RECORD).unlink(missing_ok=True)
    head_search.save(path / "search", overwrite=True)  # kept if the test fails
    output.show(head_search.glance(), "")
    result = head_search.test(
        held_out, schemes=test_schemes, doses=doses, random_sets=test.random_sets, **computed
    )
    result.save(path, overwrite=folder.overwrite)
    written = [*files_in(path), "search/"]
    output.show(
        result.glance(rule=rule),
        files_written(path, written),
        folder=str(path),
        files=written,
        seed=facts.seed,
        rule=rule,
        heads=[list(head) for head in head_search.heads],
        candidates=records(head_search.to_dataframe().dropna(subset=["carried"])),
        growth=records(head_search.growth),
        agreement=asdict(head_search.agreement),
        summary=records(result.summary(rule=rule)),
        side_effects=records(result.side_effects(rule=rule)),
        skipped=records(result.skipped),
    )
