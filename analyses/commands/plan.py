"""`hijacklens plan`: what a run would compute, by the tokenizer alone."""

from __future__ import annotations

from typing import Any

import click

from analyses.options import choose_facts, facts_options, read_doses, read_template
from hijacklens.errors import InputError


@click.command("plan")
@click.option(
    "--tokenizer",
    required=True,
    metavar="DIR|ID",
    help="A packaged model (`hijacklens models`), a folder with a tokenizer, or a hub id.",
)
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    metavar="S",
    help="A scheme (`hijacklens schemes`). Repeatable.  [default: do-not-think]",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="NAME=TEXT",
    help="A scheme of your own: 'never-say=Never say {target_false}.' Repeatable.",
)
@click.option(
    "--doses",
    default="0-5",
    show_default=True,
    help="How many sentences stand before the query: a range or a list. 0 is always scored.",
)
@facts_options
@click.option(
    "--way",
    type=click.Choice(["auto", "plain", "packed", "cached"]),
    default="auto",
    show_default=True,
    help="How prompts share what they have in common; auto takes the cheapest.",
)
def command(
    tokenizer: str,
    schemes: tuple[str, ...],
    templates: tuple[str, ...],
    doses: str,
    source: str,
    relations: tuple[str, ...],
    cases: tuple[int, ...],
    limit: int | None,
    seed: int,
    way: Any,
) -> None:
    """Say how many tokens a run would compute, without a model.

    Costs are weighed as for GPT-2 small on a CPU; another model or machine may cut the tree of
    prompts a little differently.

    \b
    Example:
      hijacklens plan --tokenizer gpt2 --facts counterfact --scheme do-not-think --doses 0-5
    """  # noqa: D301
    from analyses.tables import table
    from hijacklens.schemes import Scheme, get_scheme
    from hijacklens.scoring.forecast import forecast

    counts = read_doses(doses)
    own = [Scheme(name=name, template=text) for name, text in map(read_template, templates)]
    chosen = [get_scheme(name) for name in schemes] + own or [get_scheme("do-not-think")]
    facts = choose_facts(source, relations, cases, limit, seed)
    found = forecast(_tokenizer(tokenizer), facts, schemes=chosen, doses=counts, seed=seed, way=way)
    plan = found.plan
    names = ", ".join(scheme.name for scheme in chosen)
    click.echo(f"{facts.name}, {len(facts):,} facts · {names} · doses {doses} · {tokenizer}")
    fewer = found.naive_tokens / plan.forward_tokens
    rows = [
        ("prompts", f"{found.prompts:,}", ""),
        ("naive tokens", f"{found.naive_tokens:,}", "every prompt by itself"),
        (
            "planned forward tokens",
            f"{plan.forward_tokens:,}",
            f"{plan.way}, as {plan.why}: {fewer:.2f} times fewer",
        ),
        ("trie bound", f"{plan.trie_tokens:,}", "distinct nodes of the prefix tree"),
    ]
    click.echo(table(("", "", ""), rows, left="lrl").lstrip("\n"))
    if found.skipped:
        click.echo(f"skipped: {found.skipped:,} pairs of fact and scheme")


def _tokenizer(name: str) -> Any:
    """The tokenizer of a packaged model, a folder or a hub id."""
    from transformers import AutoTokenizer

    from hijacklens.packaged import PACKAGED, expand_home, quiet_transformers

    place = PACKAGED[name].folder() if name in PACKAGED else expand_home(name)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(place) if place.exists() else name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--tokenizer {name!r}: no tokenizer can be read there. Name a folder that "
            "tokenizer.save_pretrained wrote, a packaged model (`hijacklens models`), or a hub id; "
            f"the libraries said: {str(error).strip().splitlines()[0]}"
        ) from error
