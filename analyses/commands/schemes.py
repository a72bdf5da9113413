"""`hijacklens schemes`: the registry of hijack schemes."""

from __future__ import annotations

import click

from analyses.tables import table
from hijacklens.schemes import PLACEHOLDERS, schemes


@click.command("schemes")
@click.option("--relations", is_flag=True, help="Show the sentences of every relation.")
def command(relations: bool) -> None:
    """List the hijack schemes: text, direction and what a fact needs for them."""
    rows = [
        (
            scheme.name,
            scheme.direction,
            scheme.template or "(one sentence per relation: --relations)",
            scheme.summary,
        )
        for scheme in schemes().values()
    ]
    click.echo(table(("scheme", "direction", "text", "what it is"), rows))
    if relations:
        for scheme in schemes().values():
            for relation, text in (scheme.templates or {}).items():
                click.echo(f"{scheme.name:14}  {relation:6}{text}")
    click.echo("\nYour own: --template 'never-say=Never say {target_false}.' Placeholders:")
    for name, meaning in PLACEHOLDERS.items():
        click.echo(f"  {'{' + name + '}':15}{meaning}")
