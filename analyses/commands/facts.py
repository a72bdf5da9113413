"""`hijacklens facts`: what a set of facts holds."""

from __future__ import annotations

from dataclasses import asdict

import click

from analyses.commands.options import facts_options
from analyses.commands.screen import document, note, output_options, show
from analyses.texts import choose_facts
from hijacklens.results.glance import Grid, Title


@click.command("facts")
@facts_options
@click.option(
    "--show", "show_facts", is_flag=True, help="Show the facts themselves, not the relations."
)
@output_options("name", "n", "hash", "seed", "note", "unreadable", "relations", "facts")
def command(
    source: str,
    relations: tuple[str, ...],
    cases: tuple[int, ...],
    limit: int | None,
    seed: int,
    show_facts: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """List the relations of a set of facts, or show single facts.

    \b
    Examples:
      hijacklens facts
      hijacklens facts --facts counterfact.json --relation P190 --limit 10 --show
    """  # noqa: D301
    from hijacklens.facts.relations import relations as known

    facts = choose_facts(source, relations, cases, limit, seed)
    labels = {key: relation.label for key, relation in known().items()}
    counts = [
        {"relation": key, "label": labels.get(key), "facts": n}
        for key, n in facts.relations().items()
    ]
    if as_json:
        document(
            name=facts.name,
            n=len(facts),
            hash=facts.content_hash(),
            seed=seed,
            note=facts.note or None,
            unreadable=[asdict(row) for row in facts.skipped],
            relations=counts,
            facts=[asdict(fact) for fact in facts] if show_facts or cases else None,
        )
        return
    if facts.note:
        note(facts.note, quiet=quiet)
    sample = f", drawn with seed {seed}" if limit is not None else ""
    count = "1 fact" if len(facts) == 1 else f"{len(facts)} facts"
    lines: list[str] = [Title(f"{facts.name}: {count}, hash {facts.content_hash()[:16]}{sample}")]
    if facts.skipped:
        reason = facts.skipped[0].reason
        lines.append(f"{len(facts.skipped)} records could not be read; {reason}")
    if show_facts or cases:
        rows = [asdict(fact) | {"prompt": fact.prompt} for fact in facts]
        columns = {
            "case": "{case_id}",
            "relation": "{relation_id}",
            "true": "{target_true}",
            "false": "{target_false}",
            "prompt": "{prompt}",
        }
    else:
        rows = counts
        columns = {"relation": "{relation}", "facts": "{facts:d}", "meaning": "{label}"}
    show(*lines, Grid.of(rows, columns))
