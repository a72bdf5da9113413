"""`hijacklens facts`: what a set of facts holds."""

from __future__ import annotations

from dataclasses import asdict

import click

from analyses.commands.options import facts_options
from analyses.commands.screen import document, fitted, note, output_options, title
from analyses.texts import choose_facts


@click.command("facts")
@facts_options
@click.option("--show", is_flag=True, help="Show the facts themselves, not the relations.")
@output_options("name", "n", "hash", "seed", "note", "unreadable", "relations", "facts")
def command(
    source: str,
    relations: tuple[str, ...],
    cases: tuple[int, ...],
    limit: int | None,
    seed: int,
    show: bool,
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
    if as_json:
        found = [
            {"relation": key, "label": known()[key].label if key in known() else None, "facts": n}
            for key, n in facts.relations().items()
        ]
        document(
            name=facts.name,
            n=len(facts),
            hash=facts.content_hash(),
            seed=seed,
            note=facts.note or None,
            unreadable=[asdict(row) for row in facts.skipped],
            relations=found,
            facts=[asdict(fact) for fact in facts] if show or cases else None,
        )
        return
    drawn = f", drawn with seed {seed}" if limit is not None else ""
    count = "1 fact" if len(facts) == 1 else f"{len(facts)} facts"
    about = f"{facts.name}: {count}, hash {facts.content_hash()[:16]}"
    click.echo(f"{title(about)}{drawn}")
    if facts.note:
        note(facts.note, quiet=quiet)
    if facts.skipped:
        click.echo(f"{len(facts.skipped)} records could not be read; {facts.skipped[0].reason}")
    if show or cases:
        rows = [
            (str(f.case_id), f.relation_id, f.target_true, f.target_false, f.prompt) for f in facts
        ]
        click.echo(fitted(("case", "relation", "true", "false", "prompt"), rows))
        return
    rows = [
        (relation, str(count), known()[relation].label if relation in known() else "")
        for relation, count in facts.relations().items()
    ]
    click.echo(fitted(("relation", "facts", "meaning"), rows, left="lrl"))
