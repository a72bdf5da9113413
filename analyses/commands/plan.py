"""`hijacklens plan`: count the tokens of a run, or the facts that find a change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from analyses.commands.declarations import declared, option
from analyses.commands.options import FactsChoice, SchemesChoice, Sharing, model_option
from analyses.commands.screen import Output, records
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid, Title


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerChoice:
    """What a number of facts must be enough for."""

    power: Annotated[
        bool, option("Print how many facts and relations find a change, with power .8.")
    ] = False
    change: Annotated[float, option("The change of efficacy, for --power.", metavar="X")] = 0.05
    icc: Annotated[
        float | None,
        option("Correlation of changes in a relation.  [default: .119, the atlas]", metavar="X"),
    ] = None
    discordance: Annotated[
        float | None,
        option("Fraction of verdicts that change.  [default: .36, the atlas]", metavar="X"),
    ] = None
    like: Annotated[
        Path | None,
        option("Take both from a comparison that `compare --out` saved.", metavar="DIR"),
    ] = None

    def load(self) -> Any:
        """Return the numbers of facts and relations.

        Raises:
            InputError: A number is out of its range, or the folder holds no comparison.
        """
        from hijacklens.results.result import load_result
        from hijacklens.scoring.comparison import Comparison
        from hijacklens.scoring.power import power

        pilot: Any = None if self.like is None else load_result(self.like)
        if not isinstance(pilot, Comparison | None):
            raise InputError(f"--like {self.like} is no comparison; save one with compare --out.")
        return power(self.change, icc=self.icc, discordance=self.discordance, like=pilot)


KEYS = (
    "tokenizer", "facts", "schemes", "doses", "seed", "prompts", "naive_tokens", "planned_tokens",
    "trie_tokens", "sharing", "why", "skipped", "power",
)  # fmt: skip


@click.command("plan")
@declared(*KEYS)
def command(
    *,
    tokenizer: Annotated[
        str | None,
        model_option(
            "A packaged model (`hijacklens models`), a folder with a tokenizer, or a hub id.",
            "--tokenizer",
            "--model",
            metavar="DIR|ID",
        ),
    ] = None,
    power: PowerChoice,
    prompts: SchemesChoice,
    facts: FactsChoice,
    sharing: Sharing = "auto",
    output: Output,
) -> None:
    """Count the tokens that a run would compute, without a model, or the facts that it needs.

    With --power it prints how many facts and relations find a change of efficacy.

    Costs are those of GPT-2 small on a CPU; for another model or machine the tree of prompts may
    be divided slightly differently.

    \b
    Example:
      hijacklens plan --tokenizer gpt2 --facts counterfact --scheme do-not-think --doses 0-5
      hijacklens plan --power --change 0.05
    """  # noqa: D301
    if power.power:
        found = power.load()
        numbers = {**asdict(found), "relations": records(found.relations)}
        output.show(found.glance(), **{**dict.fromkeys(KEYS), "power": numbers})
        return
    if tokenizer is None:
        raise InputError("plan needs --tokenizer, or --power for the number of facts.")
    doses, schemes = prompts.counts, prompts.load()
    place = _place(tokenizer)
    scored = facts.load()

    from hijacklens.scoring.forecast import forecast

    cost = forecast(
        _tokenizer(tokenizer, place),
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
        power=None,
    )


def _place(name: str) -> str:
    """Return the folder or hub id of a tokenizer, which needs no model next to it.

    Raises:
        InputError: There is no such folder or hub model.
    """
    from hijacklens.files import expand_home
    from hijacklens.models.naming import resolve
    from hijacklens.models.packaged import PACKAGED

    if name in PACKAGED:
        return str(PACKAGED[name].folder())
    if (folder := expand_home(name)).is_dir():
        return str(folder)
    resolve(name, None)
    return name


def _tokenizer(name: str, place: str) -> Any:
    """Load a tokenizer."""
    from transformers import AutoTokenizer

    from hijacklens.models.packaged import quiet_transformers

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--tokenizer {name!r}: no tokenizer can be read there. Name a folder that "
            "tokenizer.save_pretrained wrote, a packaged model (`hijacklens models`), or a hub id; "
            f"the libraries said: {str(error).strip().splitlines()[0]}"
        ) from error
