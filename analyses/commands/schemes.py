"""`hijacklens schemes`: list the hijack schemes."""

from __future__ import annotations

import click

from analyses.commands.options import option
from analyses.commands.screen import Output, output_options
from hijacklens.prompts.schemes import PLACEHOLDERS, schemes
from hijacklens.results.glance import Grid


@click.command("schemes")
@option("--relations", is_flag=True, help="Show the sentences of every relation.")
@output_options("schemes", "placeholders")
def command(relations: bool, output: Output) -> None:
    """List the hijack schemes: text, direction and what a fact needs for them."""
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
    rows = [{**row, "text": row["template"] or "(by relation: --relations)"} for row in listed]
    what = "{direction}: {summary}"
    parts: list[str | Grid] = [
        Grid.of(rows, {"scheme": "{name}", "text": "{text}", "direction: what it is": what})
    ]
    if relations:
        sentences = [
            {"scheme": row["name"], "relation": relation, "text": text}
            for row in listed
            for relation, text in (row["templates"] or {}).items()
        ]
        columns = {"scheme": "{scheme}", "relation": "{relation}", "text": "{text}"}
        parts += ["", Grid.of(sentences, columns)]
    if not output.quiet:
        parts += [
            "",
            "Your own: --template 'never-say=Never say {target_false}.' Placeholders:",
            *(f"  {'{' + name + '}':15}{meaning}" for name, meaning in PLACEHOLDERS.items()),
        ]
    output.show(*parts, schemes=listed, placeholders=PLACEHOLDERS)
