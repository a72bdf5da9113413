"""`hijacklens facts`: what a set of facts holds."""

from __future__ import annotations

import click

from analyses.options import choose_facts, facts_options
from analyses.tables import table


@click.command("facts")
@facts_options
@click.option("--show", is_flag=True, help="Show the facts themselves, not the relations.")
def command(
    source: str,
    relations: tuple[str, ...],
    cases: tuple[int, ...],
    limit: int | None,
    seed: int,
    show: bool,
) -> None:
    """List the relations of a set of facts, or show single facts.

    \b
    Examples:
      hijacklens facts
      hijacklens facts --facts counterfact.json --relation P190 --limit 10 --show
    """  # noqa: D301
    from hijacklens.facts.relations import relations as known

    facts = choose_facts(source, relations, cases, limit, seed)
    click.echo(f"{facts.name}: {len(facts)} facts, hash {facts.content_hash()[:16]}")
    if facts.note:
        click.echo(f"note: {facts.note}")
    if facts.skipped:
        click.echo(f"{len(facts.skipped)} records could not be read; {facts.skipped[0].reason}")
    if show or cases:
        rows = [
            (str(f.case_id), f.relation_id, f.prompt, f.target_true, f.target_false) for f in facts
        ]
        click.echo(table(("case", "relation", "prompt", "true", "false"), rows))
        return
    rows = [
        (relation, known()[relation].label if relation in known() else "", str(count))
        for relation, count in facts.relations().items()
    ]
    click.echo(table(("relation", "meaning", "facts"), rows, left="llr"))
