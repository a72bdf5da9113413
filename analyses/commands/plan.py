"""`hijacklens plan`: count the tokens of a run with the tokenizer alone."""

from __future__ import annotations

from typing import Annotated, Any

import click

from analyses.commands.declarations import declared
from analyses.commands.options import FactsChoice, SchemesChoice, Sharing, model_option
from analyses.commands.screen import Output
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid, Title


@click.command("plan")
@declared(
    "tokenizer", "facts", "schemes", "doses", "seed", "prompts", "naive_tokens", "planned_tokens",
    "trie_tokens", "sharing", "why", "skipped",
)  # fmt: skip
def command(
    *,
    tokenizer: Annotated[
        str,
        model_option(
            "A packaged model (`hijacklens models`), a folder with a tokenizer, or a hub id.",
            "--tokenizer",
            "--model",
            metavar="DIR|ID",
        ),
    ],
    prompts: SchemesChoice,
    facts: FactsChoice,
    sharing: Sharing = "auto",
    output: Output,
) -> None:
    """Count the tokens that a run would compute, without a model.

    Costs are those of GPT-2 small on a CPU; for another model or machine the tree of prompts may
    be divided slightly differently.

    \b
    Example:
      hijacklens plan --tokenizer gpt2 --facts counterfact --scheme do-not-think --doses 0-5
    """  # noqa: D301
    from hijacklens.scoring.forecast import forecast

    doses, schemes, scored = prompts.counts, prompts.load(), facts.load()
    cost = forecast(
        _tokenizer(tokenizer),
        scored,
        schemes=schemes,
        doses=doses,
        seed=facts.seed,
        sharing=sharing,
        quiet=output.quiet,
    )
    plan = cost.plan
    fewer = cost.naive_tokens / plan.forward_tokens
    why = f"{plan.sharing}, as {plan.why}: {fewer:.2f} times fewer"
    rows = (
        ("prompts", f"{cost.prompts:,}", ""),
        ("naive tokens", f"{cost.naive_tokens:,}", "every prompt by itself"),
        ("planned forward tokens", f"{plan.forward_tokens:,}", why),
        ("trie bound", f"{plan.trie_tokens:,}", "distinct nodes of the prefix tree"),
    )
    output.show(
        Title(
            f"{scored.name}, {len(scored):,} facts · {', '.join(one.name for one in schemes)} · "
            f"doses {prompts.doses} · {tokenizer} · seed {facts.seed}"
        ),
        Grid(("", "", ""), rows, "lrl"),
        *([f"skipped: {cost.skipped:,} pairs of fact and scheme"] if cost.skipped else []),
        tokenizer=tokenizer,
        facts={"name": scored.name, "n": len(scored), "hash": scored.content_hash()},
        schemes=[scheme.name for scheme in schemes],
        doses=list(doses),
        seed=facts.seed,
        prompts=cost.prompts,
        naive_tokens=cost.naive_tokens,
        planned_tokens=plan.forward_tokens,
        trie_tokens=plan.trie_tokens,
        sharing=plan.sharing,
        why=plan.why,
        skipped=cost.skipped,
    )


def _tokenizer(name: str) -> Any:
    """Load the tokenizer of a packaged model, a folder or a hub id."""
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
