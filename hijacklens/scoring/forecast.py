"""A forecast: how many tokens a run would compute, from the tokenizer alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hijacklens.engine.packs import Costs
from hijacklens.engine.plan import Plan, Sharing, make_plan
from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.progress import bar
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.prompts.wordings import make_prompts
from hijacklens.renamed import renamed
from hijacklens.scoring.items import make_items


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would compute."""

    prompts: int
    """Prompts of all facts, schemes and doses; equal prompts are counted separately."""
    skipped: int
    """Pairs of a fact and a scheme that could not be scored."""
    naive_tokens: int
    """As in `hijacklens.engine.reading.Accounting`."""
    plan: Plan


@renamed(way="sharing")
def forecast(
    tokenizer: Any,
    facts: FactSet,
    *,
    schemes: Sequence[str | Scheme] = ("do-not-think",),
    doses: Iterable[int] = range(6),
    seed: int = 0,
    sharing: Sharing = "auto",
    costs: Costs | None = None,
    quiet: bool = False,
) -> Forecast:
    """Plan the run of `hijacklens.hijack` with the same arguments, without a model.

    Args:
        tokenizer: A Hugging Face tokenizer.
        facts: The facts.
        schemes: Schemes, or their names.
        doses: Numbers of hijacking sentences before the query; 0 is always included.
        seed: Seeds the random choices of a scheme.
        sharing: How prompts share tokens (`hijacklens.engine.plan`); by default the cheapest.
        costs: What rows cost; by default the costs of GPT-2 small on a CPU.
        quiet: Draw no progress bar.

    Raises:
        InputError: An unknown scheme or sharing, or no fact that could be scored.

    Note:
        Costs the tokenisation of all prompts and targets, and the plan: about 5 s of one core for
        the complete CounterFact at doses 0 to 5.
    """
    prompts, unusable = make_prompts(
        facts,
        [get_scheme(scheme) for scheme in schemes],
        sorted({0, *doses}),
        tokenizer,
        seed=seed,
    )
    with bar(len(prompts), unit="prompts", label="tokenising", quiet=quiet) as progress:
        items, too_long = make_items(
            prompts,
            tokenizer,
            context_length=tokenizer.model_max_length,
            tokenised=progress.update,
        )
    if not items:
        raise InputError(f"none of the {len(facts)} facts of {facts.name} could be scored.")
    return Forecast(
        prompts=len(items),
        skipped=len(unusable) + len(too_long),
        naive_tokens=items.naive_tokens,
        plan=make_plan(items.requests.trie, costs or Costs.usual(), sharing=sharing),
    )
