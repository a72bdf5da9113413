"""`hijacklens plan`: what a run would compute, by the tokenizer alone."""

from __future__ import annotations

from typing import Any

import click

from analyses.commands import names
from analyses.commands.options import choose_schemes, facts_options, schemes_options, sharing_option
from analyses.commands.screen import document, output_options, show
from analyses.texts import choose_facts, read_doses
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid, Title


@click.command("plan")
@click.option(
    "--tokenizer",
    "--model",
    "tokenizer",
    required=True,
    metavar="DIR|ID",
    shell_complete=names.models,
    help="A packaged model (`hijacklens models`), a folder with a tokenizer, or a hub id.",
)
@schemes_options
@facts_options
@sharing_option
@output_options(
    "tokenizer",
    "facts",
    "schemes",
    "doses",
    "seed",
    "prompts",
    "naive_tokens",
    "planned_tokens",
    "trie_tokens",
    "sharing",
    "why",
    "skipped",
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
    sharing: Any,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say how many tokens a run would compute, without a model.

    Costs are weighed as for GPT-2 small on a CPU; another model or machine may cut the tree of
    prompts a little differently.

    \b
    Example:
      hijacklens plan --tokenizer gpt2 --facts counterfact --scheme do-not-think --doses 0-5
    """  # noqa: D301
    from hijacklens.scoring.forecast import forecast

    counts = read_doses(doses)
    chosen = choose_schemes(schemes, templates)
    facts = choose_facts(source, relations, cases, limit, seed)
    found = forecast(
        _tokenizer(tokenizer),
        facts,
        schemes=chosen,
        doses=counts,
        seed=seed,
        sharing=sharing,
        quiet=quiet,
    )
    plan = found.plan
    if as_json:
        document(
            tokenizer=tokenizer,
            facts={"name": facts.name, "n": len(facts), "hash": facts.content_hash()},
            schemes=[scheme.name for scheme in chosen],
            doses=list(counts),
            seed=seed,
            prompts=found.prompts,
            naive_tokens=found.naive_tokens,
            planned_tokens=plan.forward_tokens,
            trie_tokens=plan.trie_tokens,
            sharing=plan.sharing,
            why=plan.why,
            skipped=found.skipped,
        )
        return
    schemes_text = ", ".join(scheme.name for scheme in chosen)
    fewer = found.naive_tokens / plan.forward_tokens
    why = f"{plan.sharing}, as {plan.why}: {fewer:.2f} times fewer"
    rows = (
        ("prompts", f"{found.prompts:,}", ""),
        ("naive tokens", f"{found.naive_tokens:,}", "every prompt by itself"),
        ("planned forward tokens", f"{plan.forward_tokens:,}", why),
        ("trie bound", f"{plan.trie_tokens:,}", "distinct nodes of the prefix tree"),
    )
    show(
        Title(
            f"{facts.name}, {len(facts):,} facts · {schemes_text} · doses {doses} · {tokenizer} · "
            f"seed {seed}"
        ),
        Grid(("", "", ""), rows, "lrl"),
        *([f"skipped: {found.skipped:,} pairs of fact and scheme"] if found.skipped else []),
    )


def _tokenizer(name: str) -> Any:
    """The tokenizer of a packaged model, a folder or a hub id."""
    from transformers import AutoTokenizer

    from hijacklens.files import expand_home
    from hijacklens.models.packaged import PACKAGED, quiet_transformers

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
