"""`hijacklens heads`: find the heads that carry a hijack, and test them on held-out facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import click

from analyses.commands.declarations import Whole, declared, option
from analyses.commands.options import (
    ExecutionChoice,
    FactsChoice,
    FolderChoice,
    Model,
    ModelChoice,
    Rule,
    run_name,
    scheme_option,
)
from analyses.commands.screen import Output, records
from analyses.texts import read_doses
from hijacklens.files import RECORD, check_folder
from probes.checks import check_searched, check_size

SEARCH = "search"
"""The folder of the search, in that of the test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchChoice:
    """What is searched, and how; see `probes.heads.search`."""

    scheme: Annotated[str, scheme_option("Scheme of the search.")] = "do-not-think"
    dose: Annotated[int, option("Sentences before the query.", type=Whole(1))] = 1
    size: Annotated[int, option("How many heads to choose.", type=Whole(1))] = 5
    candidates: Annotated[
        int,
        option(
            "How many of the heads with the highest attribution to ablate one by one.",
            type=Whole(1),
        ),
    ] = 20
    attribution: Annotated[
        Literal["gradient", "direct"],
        option("Rank heads by attribution patching, or by what they write directly to the logits."),
    ] = "gradient"
    kind: Annotated[
        Literal["mean", "zero"],
        option(
            "The replacement of a head's output: its mean over bare queries, or zero.",
            "--ablation",
        ),
    ] = "mean"
    strategy: Annotated[
        Literal["top", "greedy"],
        option(
            "Choose the heads with the largest single effects, or add the best head "
            "one at a time (slower)."
        ),
    ] = "top"


@dataclass(frozen=True, slots=True, kw_only=True)
class TestChoice:
    """How the facts are split, and what the heads are tested on."""

    split: Annotated[
        Literal["fact", "relation"],
        option("Search on half of the facts, or of the relations; test on the other half."),
    ] = "fact"
    schemes: Annotated[
        tuple[str, ...],
        scheme_option(
            "Scheme of the test. Repeatable.  [default: the scheme of the search]", "--test-scheme"
        ),
    ] = ()
    doses: Annotated[
        str | None,
        option(
            "Doses of the test.  [default: the dose of the search]", "--test-doses", metavar="LIST"
        ),
    ] = None
    random_sets: Annotated[
        int,
        option(
            "Random sets of each kind (same layers, equal harm) to compare with.",
            type=Whole(0),
        ),
    ] = 20


@click.command("heads")
@declared(
    "folder", "files", "seed", "rule", "heads", "candidates", "growth", "agreement", "summary",
    "side_effects", "skipped", label="heads-<model>",
)  # fmt: skip
def command(
    *,
    name: Model,
    search: SearchChoice,
    test: TestChoice,
    facts: FactsChoice,
    loading: ModelChoice,
    execution: Annotated[ExecutionChoice, ("batch_tokens",)],
    rule: Rule = "first",
    folder: FolderChoice,
    output: Output,
) -> None:
    """Find the heads that carry the hijack's logit shift, and test them on held-out facts.

    A head carries the part of the shift that disappears when its output is ablated. On one half
    of the facts, all heads are ranked by attribution, the best are ablated one by one, and a set
    is chosen. On the other half the model is scored with no head ablated, with the set ablated,
    and with random sets ablated: of its size in the same layers, and from anywhere with as much
    harm to the bare queries. Side effects on the bare query are printed too.

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
    from hijacklens.facts.halves import halves
    from hijacklens.prompts.schemes import get_scheme

    scheme = get_scheme(search.scheme)
    test_schemes = [get_scheme(name) for name in test.schemes] or [scheme]
    doses = [search.dose] if test.doses is None else read_doses(test.doses)
    path = folder.check(run_name("heads", name, loading=loading, form=facts))
    check_folder(path / SEARCH, overwrite=folder.overwrite)
    check_size(search.size, search.candidates)
    loading.check(name)
    all_facts = facts.load()
    searched, held_out = halves(all_facts, by=test.split, seed=facts.seed)
    check_searched(len(searched), all_facts.name)

    from hijacklens.results.result import staged
    from hijacklens.scoring.pairs import pairs
    from probes import heads

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
    if not (path / RECORD).exists():  # kept if the test fails
        head_search.save(path / SEARCH, overwrite=folder.overwrite)
    output.show(head_search.glance(), "")
    result = head_search.test(
        held_out, schemes=test_schemes, doses=doses, random_sets=test.random_sets, **computed
    )
    with staged(path, overwrite=folder.overwrite) as place:
        head_search.save(place / SEARCH)
        result.save(place)
    output.show_saved(
        path,
        result.glance(rule=rule),
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
