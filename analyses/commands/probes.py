"""`hijacklens probes`: the kinds of probes that --probe takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from analyses.commands import names
from analyses.commands.screen import Output, output_options
from hijacklens.errors import unknown
from hijacklens.results.glance import Grid, Title

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
def command(names: tuple[str, ...], output: Output) -> None:
    """List the kinds of probes, or explain the options of the named kinds.

    \b
    A probe changes what a model computes while it is scored:
      hijacklens hijack --model gpt2 --probe knock-out:source=last,target=hijack,layers=8-11
    """  # noqa: D301
    from hijacklens.prompts.spans import FORMS
    from probes.specification import KINDS

    for name in names:
        if name not in KINDS:
            raise unknown("kind of probe", name, KINDS)
    parts: list[str | Grid] = []
    for name in names:
        kind = KINDS[name]
        columns = {"option": "{name}=", "left out": "{left_out}", "allowed": "{form}"}
        rows = [
            {"name": o.name, "left_out": o.default or "(required)", "form": o.form}
            for o in kind.options
        ]
        parts += [
            Title(f"{kind.name}: {kind.summary}"),
            Grid.of(rows, columns),
            f"for example: --probe {kind.example}",
            "",
        ]
    if not names:
        rows = [
            {"name": kind.name, "summary": kind.summary, "options": _options(kind)}
            for kind in KINDS.values()
        ]
        parts += [
            Grid.of(rows, {"kind": "{name}", "what it does": "{summary}"}),
            "",
            Grid.of(rows, {"kind": "{name}", "options ([ ]: optional)": "{options}"}),
            "",
        ]
    if not output.quiet and not names:
        parts += [
            "Examples:",
            *(f"  --probe {kind.example}" for kind in KINDS.values()),
            "",
            "`hijacklens probes KIND` explains the options of a kind.",
            "",
        ]
    if not output.quiet:
        parts += SPANS.splitlines()
    kinds = [KINDS[name] for name in names] or list(KINDS.values())
    output.show(*parts, kinds=[_record(kind) for kind in kinds], spans=FORMS)


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
    return {"name": kind.name, "summary": kind.summary, "options": options, "example": kind.example}
