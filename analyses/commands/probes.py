"""`hijacklens probes`: the kinds of probes that --probe takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from analyses.commands import names
from analyses.commands.screen import document, fitted, output_options
from hijacklens.errors import unknown

if TYPE_CHECKING:
    from probes.specification import Kind

SPANS = """\
Spans (source=, target=, span=) say which tokens are meant:
  bos hijack mention query subject last target   named stretches of the prompt
  text:Eiffel Tower                              every occurrence of a text
  at:0  at:-1  at:2..5                           positions, from the start or from the end
  token:17                                       every occurrence of a token id
  all                                            every token; join several by +
(mention: the words in the hijack that name a target, or a word near it)"""


@click.command("probes")
@click.argument("names", nargs=-1, metavar="[KIND]...", shell_complete=names.kinds)
@output_options("kinds", "spans")
def command(names: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """List the kinds of probes, or explain the options of those that are named.

    \b
    A probe changes what a model computes while it is scored:
      hijacklens hijack --model gpt2 --probe knock-out:source=last,target=hijack,layers=8-11
    """  # noqa: D301
    from hijacklens.prompts.spans import FORMS
    from probes.specification import KINDS

    for name in names:
        if name not in KINDS:
            raise unknown("kind of probe", name, KINDS)
    if as_json:
        chosen = [KINDS[name] for name in names] or list(KINDS.values())
        document(kinds=[_record(kind) for kind in chosen], spans=FORMS)
        return
    if names:
        click.echo("\n\n".join(_explained(KINDS[name]) for name in names))
    else:
        rows = [(kind.name, kind.summary) for kind in KINDS.values()]
        click.echo(fitted(("kind", "what it does"), rows))
        rows = [(kind.name, _options(kind)) for kind in KINDS.values()]
        click.echo(f"\n{fitted(('kind', 'options ([ ]: may be left out)'), rows)}")
    if quiet:
        return
    if not names:
        click.echo("\nExamples:")
        click.echo("\n".join(f"  --probe {kind.example}" for kind in KINDS.values()))
        click.echo("\n`hijacklens probes KIND` explains the options of a kind.")
    click.echo(f"\n{SPANS}")


def _options(kind: Kind) -> str:
    return " ".join(
        f"{option.name}=" if option.default is None else f"[{option.name}=]"
        for option in kind.options
    )


def _record(kind: Kind) -> dict[str, Any]:
    options = [
        {"name": option.name, "default": option.default, "allowed": option.form}
        for option in kind.options
    ]
    return {
        "name": kind.name,
        "summary": kind.summary,
        "options": options,
        "example": kind.example,
    }


def _explained(kind: Kind) -> str:
    rows = [
        (f"  {option.name}=", option.default or "(has to be given)", option.form)
        for option in kind.options
    ]
    options = fitted(("  option", "left out", "allowed"), rows)
    return f"{kind.name}: {kind.summary}\n{options}\n  for example: --probe {kind.example}"
