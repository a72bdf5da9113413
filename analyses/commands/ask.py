"""`hijacklens ask`: one prompt, with and without a hijack, side by side (paper, Figure 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from analyses.commands import names
from analyses.commands.options import (
    make_probes,
    model_options,
    models_option,
    probes_option,
    read_probes,
)
from analyses.commands.screen import document, output_options, say_loading, show
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid, Title

if TYPE_CHECKING:
    from hijacklens.prompts.prompt import Prompt
    from hijacklens.scoring.answers import Answer


@click.command("ask")
@click.argument("prompt")
@models_option
@click.option(
    "--scheme",
    metavar="S",
    shell_complete=names.schemes,
    help="The scheme that makes the hijacking sentence.",
)
@click.option("--sentence", metavar="TEXT", help="A hijacking sentence of your own, instead.")
@click.option("--dose", type=int, default=1, show_default=True, help="How often it is repeated.")
@click.option("--subject", metavar="TEXT", help="The subject, for schemes that name it.")
@click.option("--relation", metavar="P", default="", help="Its relation, for scheme `relation`.")
@click.option("--true", "target_true", metavar="TEXT", help="The true target.")
@click.option("--false", "target_false", metavar="TEXT", help="The false target.")
@click.option("--top", type=int, default=5, show_default=True, help="How many next tokens.")
@click.option("--tokens", type=int, default=12, show_default=True, help="Length of the completion.")
@probes_option
@model_options
@output_options("answers", "probes")
def command(
    prompt: str,
    models: tuple[str, ...],
    scheme: str | None,
    sentence: str | None,
    dose: int,
    top: int,
    tokens: int,
    target_true: str | None,
    target_false: str | None,
    subject: str | None,
    relation: str,
    probes: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **loading: Any,
) -> None:
    """Show the likeliest next tokens and the greedy completion of PROMPT.

    With --scheme or --sentence, the hijacked prompt is asked too and shown beside the bare one.
    Probes act on both.

    \b
    Example:
      hijacklens ask --model gemma3-270m "The Eiffel Tower is in the city of" \\
          --scheme do-not-think --true Paris --false Guam
    """  # noqa: D301
    if scheme and sentence:
        raise InputError("give either --scheme or --sentence, not both.")
    if scheme:
        sentence = _sentence(scheme, prompt, subject, relation, target_true, target_false)
    if dose < 1:
        raise InputError(f"--dose counts sentences and must be at least 1, not {dose}.")
    specified = read_probes(probes)
    targets = [target for target in (target_true, target_false) if target]
    from hijacklens.models.loading import load_model
    from hijacklens.scoring.answers import answer

    asked = _prompts(prompt, subject, sentence, dose, targets)
    found = []
    for name in models:
        say_loading(name, quiet=quiet)
        model = load_model(name, **loading)
        on = make_probes(specified, model, None, quiet=quiet)
        answers = [
            answer(model, one, targets=targets, top=top, tokens=tokens, probes=on) for one in asked
        ]
        if not as_json:
            show("", *_side_by_side(name, answers, targets))
        sides = zip(("bare", "hijacked"), answers, strict=False)
        found += [{"model": name, "prompt": side, **asdict(one)} for side, one in sides]
    keys = [probe.text for probe in specified]
    if as_json:
        document(answers=found, probes=keys)
    elif keys:
        click.echo(f"\nprobes: {', '.join(keys)}")


def _prompts(
    prompt: str, subject: str | None, sentence: str | None, dose: int, targets: Sequence[str]
) -> list[Prompt]:
    """The bare prompt, and the hijacked one if there is a sentence, with their spans."""
    from hijacklens.prompts.prompt import compose

    query = prompt.rstrip()
    at = query.find(subject) if subject else -1
    place = (at, at + len(subject)) if subject and at >= 0 else None
    doses = (0, dose) if sentence else (0,)
    return [
        compose(query, subject=place, sentence=sentence or "", dose=k, named=targets) for k in doses
    ]


def _sentence(
    name: str,
    prompt: str,
    subject: str | None,
    relation: str,
    target_true: str | None,
    target_false: str | None,
) -> str:
    """The sentence of a scheme for a fact given by options."""
    from hijacklens.facts.fact import Fact
    from hijacklens.facts.relations import country_of_language
    from hijacklens.prompts.schemes import Unusable, get_scheme

    scheme = get_scheme(name)
    given = {"subject": subject, "target_true": target_true, "target_false": target_false}
    options = {"subject": "--subject", "target_true": "--true", "target_false": "--false"}
    needed = set(scheme.needs)
    needed |= {"target_true"} if "near_true" in needed else set()
    needed |= {"target_false"} if "near_false" in needed else set()
    missing = [options[field] for field in options if field in needed and not given[field]]
    if missing:
        raise InputError(f"scheme {name!r} needs {' and '.join(missing)}.")
    if subject and prompt.count(subject) != 1:
        raise InputError(
            f"the subject {subject!r} occurs {prompt.count(subject)} times in the prompt; it must "
            "occur once."
        )
    fact = Fact(
        case_id=0,
        relation_id=relation,
        subject=subject or prompt,
        template=prompt.replace(subject, "{}") if subject else "{}",
        # A target that the scheme does not name is not in its sentence either.
        target_true=target_true or "(no true target)",
        target_false=target_false or "(no false target)",
        near_true=country_of_language().get(target_true or ""),
        near_false=country_of_language().get(target_false or ""),
    )
    try:
        return scheme.sentence(fact)
    except Unusable as reason:
        raise InputError(f"{reason}. Give a sentence of your own with --sentence.") from None


def _side_by_side(
    name: str, answers: Sequence[Answer], targets: Sequence[str]
) -> Iterator[str | Grid]:
    """Prompts with completions, the next tokens and the targets in one table, the verdict."""
    sides = ["bare", "hijacked"][: len(answers)]
    yield Title(name)
    for side, one in zip(sides, answers, strict=True):
        yield f"  {side + ':':10}{one.text}"
        yield f"  {'':10}-> {one.completion.strip()!r}"
    rows = [
        (str(i + 1), *_cells([one.top[i] for one in answers])) for i in range(len(answers[0].top))
    ]
    for i, target in enumerate(targets):
        candidates = [one.targets[i] for one in answers]
        cells = _cells(candidates)
        for j, candidate in enumerate(candidates):
            cells[3 * j] += f" (rank {candidate.rank + 1})"
        rows.append((f"{target}:", *cells))
    header = ("", *(part for side in sides for part in (side, "p", "nats")))
    yield Grid(header, tuple(rows), "l" + "lrr" * len(answers))
    if len(targets) == 2:
        margins = [one.targets[1].logprob - one.targets[0].logprob for one in answers]
        by_side = (f"{side} {value:+.2f}" for side, value in zip(sides, margins, strict=True))
        shift = f"; shift {margins[1] - margins[0]:+.2f}" if len(margins) == 2 else ""
        yield f"  false - true, nats (rule first): {', '.join(by_side)}{shift}"


def _cells(candidates: Sequence[Any]) -> list[str]:
    return [
        cell
        for item in candidates
        for cell in (repr(item.token), f"{item.probability:.2g}", f"{item.logprob:.2f}")
    ]
