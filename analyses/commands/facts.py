"""`hijacklens facts`: list the relations or the facts of a set."""

from __future__ import annotations

from dataclasses import asdict

import click

from analyses.commands.options import FactsChoice, facts_options, option
from analyses.commands.screen import Output, output_options
from hijacklens.results.glance import Grid, Title


@click.command("facts")
@facts_options
@option("--show", "show_facts", is_flag=True, help="Show the facts themselves, not the relations.")
@output_options("name", "n", "hash", "seed", "note", "unreadable", "relations", "facts")
def command(facts: FactsChoice, show_facts: bool, output: Output) -> None:
    """List the relations of a set of facts, or show single facts.

    \b
    Examples:
      hijacklens facts
      hijacklens facts --facts counterfact.json --relation P190 --limit 10 --show
    """  # noqa: D301
    from hijacklens.facts.relations import relations as known

    fact_set = facts.load()
    labels = {key: relation.label for key, relation in known().items()}
    counts = [
        {"relation": key, "label": labels.get(key), "facts": count}
        for key, count in fact_set.relations().items()
    ]
    if fact_set.note and not output.as_json:
        output.note(fact_set.note)
    sample = f", drawn with seed {facts.seed}" if facts.limit is not None else ""
    number = "1 fact" if len(fact_set) == 1 else f"{len(fact_set)} facts"
    lines: list[str] = [
        Title(f"{fact_set.name}: {number}, hash {fact_set.content_hash()[:16]}{sample}")
    ]
    if fact_set.skipped:
        reason = fact_set.skipped[0].reason
        lines.append(f"{len(fact_set.skipped)} records could not be read; {reason}")
    listed = [asdict(fact) for fact in fact_set] if show_facts or facts.cases else None
    if listed is None:
        columns = {"relation": "{relation}", "facts": "{facts:d}", "meaning": "{label}"}
        grid = Grid.of(counts, columns)
    else:
        columns = {
            "case": "{case_id}",
            "relation": "{relation_id}",
            "true": "{target_true}",
            "false": "{target_false}",
            "prompt": "{prompt}",
        }
        prompts = ({"prompt": fact.prompt} for fact in fact_set)
        grid = Grid.of([row | more for row, more in zip(listed, prompts, strict=True)], columns)
    output.show(
        *lines,
        grid,
        name=fact_set.name,
        n=len(fact_set),
        hash=fact_set.content_hash(),
        seed=facts.seed,
        note=fact_set.note or None,
        unreadable=[asdict(row) for row in fact_set.skipped],
        relations=counts,
        facts=listed,
    )
