"""`hijacklens ask`: one prompt, bare and hijacked, side by side (paper, Figure 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import click

from analyses.commands.declarations import Whole, argument, declared, option
from analyses.commands.options import ModelChoice, Models, Probes, WrittenFact, scheme_option
from analyses.commands.screen import Output
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid, Title

if TYPE_CHECKING:
    from hijacklens.prompts.prompt import Prompt
    from hijacklens.scoring.answers import Answer


@click.command("ask")
@declared("answers", "probes")
def command(
    *,
    prompt: Annotated[str, argument()],
    models: Models,
    scheme: Annotated[
        str | None,
        scheme_option("The scheme that makes the hijacking sentence."),
    ] = None,
    sentence: Annotated[
        str | None, option("Your own hijacking sentence, in place of --scheme.", metavar="TEXT")
    ] = None,
    dose: Annotated[int, option("How many times the sentence is repeated.", type=Whole(1))] = 1,
    written: WrittenFact,
    top: Annotated[int, option("How many next tokens.", type=Whole(0))] = 5,
    tokens: Annotated[int, option("Length of the completion.", type=Whole(0))] = 12,
    probes: Probes,
    loading: ModelChoice,
    output: Output,
) -> None:
    """Show the likeliest next tokens and the greedy completion of PROMPT.

    With --scheme or --sentence, the hijacked prompt is run too and shown next to the bare one.
    Probes act on both.

    \b
    Example:
      hijacklens ask --model gemma3-270m "The Eiffel Tower is in the city of" \\
          --scheme do-not-think --true Paris --false Guam
    """  # noqa: D301
    if scheme and sentence:
        raise InputError("give either --scheme or --sentence, not both.")
    if scheme:
        sentence = _sentence(scheme, prompt, written)
    loading.check(*models)
    targets = [target for target in (written.target_true, written.target_false) if target]
    from hijacklens.scoring.answers import answer

    if prompt.endswith(" "):
        output.note("the prompt ends in a space, which tokenizers usually join to the next word")
    prompts = _prompts(prompt, written, sentence, dose)
    rows = []
    for name in models:
        output.loading(name)
        model = loading.load(name)
        active = [probe.probe(model=model, quiet=output.quiet) for probe in probes]
        answers = [
            answer(
                model,
                prompt,
                targets=targets,
                top=top,
                tokens=tokens,
                probes=active,
                chat=written.chat,
            )
            for prompt in prompts
        ]
        output.show("", *_side_by_side(name, answers, targets))
        sides = zip(("bare", "hijacked"), answers, strict=False)
        rows += [{"model": name, "prompt": side, **asdict(one)} for side, one in sides]
    keys = [probe.text for probe in probes]
    output.show(*(["", f"probes: {', '.join(keys)}"] if keys else []), answers=rows, probes=keys)


def _prompts(query: str, written: WrittenFact, sentence: str | None, dose: int) -> list[Prompt]:
    """Return the bare prompt, and the hijacked one if there is a sentence, with their spans."""
    from hijacklens.prompts.prompt import compose

    subject = written.subject
    start = query.find(subject) if subject else -1
    span = (start, start + len(subject)) if subject and start >= 0 else None
    doses = (0, dose) if sentence else (0,)
    return [
        compose(
            query,
            subject=span,
            sentence=sentence or "",
            dose=k,
            named=(written.target_true, written.target_false),
            joining=written.joining,
            opening=written.opening,
        )
        for k in doses
    ]


def _sentence(name: str, prompt: str, written: WrittenFact) -> str:
    """Return the sentence that a scheme makes for the written fact."""
    from hijacklens.prompts.schemes import Unusable, get_scheme

    scheme = get_scheme(name)
    targets = {"near_true": "target_true", "near_false": "target_false"}
    needed = {targets.get(part, part) for part in scheme.needs}
    parts = ("subject", "target_true", "target_false")
    written.require(f"scheme {name!r}", [part for part in parts if part in needed])
    try:
        return scheme.sentence(written.fact(prompt))
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
