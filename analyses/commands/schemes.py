"""`hijacklens schemes`: the registry of hijack schemes."""

from __future__ import annotations

import click

from analyses.commands.screen import document, fitted, output_options
from hijacklens.prompts.schemes import PLACEHOLDERS, schemes


@click.command("schemes")
@click.option("--relations", is_flag=True, help="Show the sentences of every relation.")
@output_options("schemes", "placeholders")
def command(relations: bool, as_json: bool, quiet: bool) -> None:
    """List the hijack schemes: text, direction and what a fact needs for them."""
    if as_json:
        listed = [
            {
                "name": scheme.name,
                "direction": scheme.direction,
                "template": scheme.template,
                "templates": dict(scheme.templates) if scheme.templates else None,
                "needs": scheme.needs,
                "summary": scheme.summary,
            }
            for scheme in schemes().values()
        ]
        document(schemes=listed, placeholders=PLACEHOLDERS)
        return
    rows = [
        (
            scheme.name,
            scheme.template or "(by relation: --relations)",
            f"{scheme.direction}: {scheme.summary}",
        )
        for scheme in schemes().values()
    ]
    click.echo(fitted(("scheme", "text", "direction: what it is"), rows))
    if relations:
        click.echo()
        sentences = [
            (scheme.name, relation, text)
            for scheme in schemes().values()
            for relation, text in (scheme.templates or {}).items()
        ]
        click.echo(fitted(("scheme", "relation", "text"), sentences))
    if not quiet:
        click.echo("\nYour own: --template 'never-say=Never say {target_false}.' Placeholders:")
        for name, meaning in PLACEHOLDERS.items():
            click.echo(f"  {'{' + name + '}':15}{meaning}")
