"""`hijacklens trace`: the account of one fact's logit shift, as tables, maps and a page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from analyses.commands.declarations import Whole, declared, option
from analyses.commands.options import (
    FolderChoice,
    Model,
    ModelChoice,
    Probes,
    WrittenFact,
    scheme_option,
    source_option,
)
from analyses.commands.screen import Output, records
from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.facts.fact import FactSet

PAGE = "attention.html"
BY = ("token", "position", "layer", "head")
"""The columns that the biggest parts are summed over to."""


@click.command("trace")
@declared(
    "folder", "files", "seed", "fact", "probes", "bare", "hijacked", "shift", "residual", "parts",
    "biggest", label="trace-<model>-<case>",
)  # fmt: skip
def command(
    *,
    name: Model,
    source: Annotated[
        str | None,
        source_option(
            "atlas (embedded), counterfact, a file, or a hub id.  [default: atlas]", "--facts"
        ),
    ] = None,
    case: Annotated[int | None, option("The fact with this case id.", metavar="ID")] = None,
    prompt: Annotated[
        str | None, option("The prompt of a fact of your own.", metavar="TEXT")
    ] = None,
    written: WrittenFact,
    scheme: Annotated[
        str,
        scheme_option("A scheme (`hijacklens schemes`)."),
    ] = "do-not-think",
    dose: Annotated[int, option("How many times the sentence is repeated.", type=Whole(1))] = 1,
    seed: Annotated[int, option("Seed of the scheme's random draws.", type=Whole(0))] = 0,
    top: Annotated[int, option("How many parts to print.", type=Whole(1))] = 12,
    folder: FolderChoice,
    probes: Probes,
    loading: ModelChoice,
    output: Output,
) -> None:
    """Split the logit shift of one fact by the tokens, layers, heads and MLPs that wrote it.

    The shift is logit(false) - logit(true) after the hijacked prompt, minus the same after the
    bare query. The parts sum to the shift up to the residual, which is reported.

    Writes into the folder: account.parquet (a row per part), summary.csv,
    token_layer.svg and .png, layer_head.svg and .png, patterns.npz (attention),
    attention.html (needs no network), result.json (totals in logits, provenance).

    \b
    Examples:
      hijacklens trace --model smollm2-135m --case 42 --out runs/krakow
      hijacklens trace --model gpt2 --subject "Eiffel Tower" --true Paris --false Guam \\
          --prompt "The Eiffel Tower is in the city of" --dose 2
    """  # noqa: D301
    from hijacklens.prompts.schemes import get_scheme

    rule = get_scheme(scheme)
    path = folder.check(f"trace-{Path(name).name}-{'own' if case is None else case}")
    loading.check(name)
    facts = _fact(prompt, written, source, case)
    if facts.note:
        output.note(f"{facts.name}: {facts.note}")

    from hijacklens.progress import bar
    from hijacklens.results.result import staged
    from hijacklens.scoring.pairs import pairs
    from probes.logit_shift import trace
    from probes.logit_shift.page import save_attention_page, with_patterns

    output.loading(name)
    model = loading.load(name)
    active = [probe.probe(model=model, quiet=output.quiet) for probe in probes]
    pair = pairs(model, facts, scheme=rule, dose=dose, seed=seed)
    with bar(4, unit="steps", label="trace", quiet=output.quiet) as progress:
        account = trace(model, pair, probes=active)
        progress.update()
        account = with_patterns(model, account, probes=active)
        progress.update()
        with staged(path, overwrite=folder.overwrite) as place:
            save_attention_page(model, account, place / PAGE, probes=active)
            progress.update()
            account.save(place)
        progress.update()
    output.show_saved(
        path,
        account.glance(top),
        more=[PAGE],
        seed=seed,
        fact=asdict(account.settings.fact),
        probes=list(account.settings.probes),
        bare=account.bare,
        hijacked=account.hijacked,
        shift=account.shift,
        residual=account.residual,
        parts=records(account.summary()),
        biggest=records(account.biggest(top, by=BY)),
    )


def _fact(
    prompt: str | None, written: WrittenFact, source: str | None, case: int | None
) -> FactSet:
    """Return the one fact that is written as options, or has this case id."""
    from hijacklens.facts.fact import FactSet
    from hijacklens.facts.loading import load_facts

    parts = ("subject", "target_true", "target_false")
    if prompt or any(getattr(written, part) for part in parts):
        if source is not None or case is not None:
            raise InputError(
                "give either a fact of your own (--prompt, ...) or --facts and --case."
            )
        written.require("a fact of your own also", parts[1:], prompt=prompt)
        return written.write(FactSet((written.fact(prompt or ""),), name="own"))
    if case is None:
        raise InputError(
            "name a fact: --case ID of --facts, or --prompt, --subject, --true and --false. "
            "`hijacklens facts` lists case ids."
        )
    facts = load_facts(source or "atlas", joining=written.joining)
    return written.write(facts.where(case_ids=[case]))
