"""`hijacklens trace`: the account of one fact's logit shift, as tables, maps and a page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from analyses.commands import names
from analyses.commands.options import (
    make_probes,
    model_option,
    model_options,
    overwrite_option,
    probes_option,
    read_probes,
)
from analyses.commands.resumption import usual_folder
from analyses.commands.screen import (
    document,
    files_written,
    output_options,
    records,
    say_loading,
    show,
)
from analyses.texts import choose_facts
from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.facts.fact import Fact

PAGE = "attention.html"
BY = ("token", "position", "layer", "head")
"""What the biggest parts are summed over to."""


@click.command("trace")
@model_option
@click.option(
    "--facts",
    "source",
    metavar="SOURCE",
    shell_complete=names.facts,
    help="atlas (embedded), counterfact, a file, or a hub id.  [default: atlas]",
)
@click.option("--case", type=int, metavar="ID", help="The fact with this case id.")
@click.option("--prompt", metavar="TEXT", help="A fact of your own: the prompt, ...")
@click.option("--subject", metavar="TEXT", help="... its subject, which occurs in it once, ...")
@click.option("--true", "target_true", metavar="TEXT", help="... its true target ...")
@click.option("--false", "target_false", metavar="TEXT", help="... and a false one.")
@click.option(
    "--relation",
    metavar="P",
    default="",
    shell_complete=names.relations,
    help="Its relation, for scheme `relation`.",
)
@click.option(
    "--scheme",
    default="do-not-think",
    show_default=True,
    metavar="S",
    shell_complete=names.schemes,
    help="A scheme (`hijacklens schemes`).",
)
@click.option("--dose", type=int, default=1, show_default=True, help="How often it is repeated.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seeds what a scheme draws.")
@click.option("--top", type=int, default=12, show_default=True, help="How many parts to print.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the files.  [default: runs/<date>-trace-<model>-<case>, then -2, ...]",
)
@overwrite_option
@probes_option
@model_options
@output_options(
    "folder",
    "files",
    "seed",
    "fact",
    "probes",
    "bare",
    "hijacked",
    "shift",
    "residual",
    "parts",
    "biggest",
)
def command(
    name: str,
    source: str | None,
    case: int | None,
    prompt: str | None,
    subject: str | None,
    target_true: str | None,
    target_false: str | None,
    relation: str,
    scheme: str,
    dose: int,
    seed: int,
    top: int,
    out: Path | None,
    overwrite: bool,
    probes: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Take the logit shift of one fact apart: which tokens, layers, heads and MLPs wrote it.

    The shift is logit(false) - logit(true) behind the hijacked prompt, minus the same behind the
    bare query. Its parts sum to it; the residual is what they miss.

    Writes into the folder: account.parquet (a row per part), summary.csv,
    token_layer.svg and .png, layer_head.svg and .png, patterns.npz (attention),
    attention.html (opens with no network), result.json (totals in logits, provenance).

    \b
    Examples:
      hijacklens trace --model smollm2-135m --case 42 --out runs/krakow
      hijacklens trace --model gpt2 --subject "Eiffel Tower" --true Paris --false Guam \\
          --prompt "The Eiffel Tower is in the city of" --dose 2
    """  # noqa: D301
    from hijacklens.facts.fact import FactSet

    own = {"--prompt": prompt, "--subject": subject, "--true": target_true, "--false": target_false}
    if any(own.values()):
        if source is not None or case is not None:
            raise InputError(
                "give either a fact of your own (--prompt, ...) or --facts and --case."
            )
        facts = FactSet((_own_fact(own, relation),), name="own")
    elif case is None:
        raise InputError(
            "name a fact: --case ID of --facts, or --prompt, --subject, --true and --false. "
            "`hijacklens facts` lists case ids."
        )
    else:
        facts = choose_facts(source or "atlas", (), (case,), None, seed)
    specified = read_probes(probes)
    if top < 1:
        raise InputError(f"--top must be at least 1, not {top}.")
    label = f"trace-{Path(name).name}-{'own' if case is None else case}"

    from hijacklens.files import check_folder, claim_folder
    from hijacklens.prompts.schemes import get_scheme

    rule = get_scheme(scheme)
    folder = check_folder(out or usual_folder(label, overwrite=overwrite), overwrite=overwrite)

    from hijacklens.models.loading import load_model
    from hijacklens.progress import bar
    from hijacklens.scoring.pairs import pairs
    from probes.logit_shift import trace
    from probes.logit_shift.page import save_attention_page, with_patterns

    say_loading(name, quiet=quiet)
    model = load_model(name, **loading)
    on = make_probes(specified, model, None, quiet=quiet)
    pair = pairs(model, facts, scheme=rule, dose=dose, seed=seed)
    with bar(4, unit="steps", label="trace", quiet=quiet) as progress:
        account = trace(model, pair, probes=on)
        progress.update()
        account = with_patterns(model, account, probes=on)
        progress.update()
        claim_folder(folder, overwrite=overwrite)
        save_attention_page(model, account, folder / PAGE, probes=on)
        progress.update()
        account.save(folder, overwrite=overwrite)
        progress.update()
    written = [*account.files(), PAGE, "result.json"]
    if as_json:
        document(
            folder=str(folder),
            files=written,
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
        return
    show(account.glance(top), files_written(folder, written))


def _own_fact(given: dict[str, str | None], relation: str) -> Fact:
    """The fact that the options spell out."""
    from hijacklens.facts.fact import Fact
    from hijacklens.facts.relations import country_of_language

    missing = [option for option, value in given.items() if not value]
    if missing:
        raise InputError(f"a fact of your own also needs {' and '.join(missing)}.")
    prompt, subject, true, false = (str(value) for value in given.values())
    if prompt.count(subject) != 1:
        raise InputError(
            f"the subject {subject!r} occurs {prompt.count(subject)} times in the prompt; it must "
            "occur once."
        )
    return Fact(
        case_id=0,
        relation_id=relation,
        subject=subject,
        template=prompt.replace(subject, "{}"),
        target_true=true,
        target_false=false,
        near_true=country_of_language().get(true),
        near_false=country_of_language().get(false),
    )
