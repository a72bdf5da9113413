"""`hijacklens ask`: one prompt, with and without a hijack, side by side (paper, Figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from analyses.options import model_options, models_option
from hijacklens.errors import InputError

if TYPE_CHECKING:
    from hijacklens.scoring.answers import Answer


@click.command("ask")
@click.argument("prompt")
@models_option
@click.option("--scheme", metavar="S", help="The scheme that makes the hijacking sentence.")
@click.option("--sentence", metavar="TEXT", help="A hijacking sentence of your own, instead.")
@click.option("--dose", type=int, default=1, show_default=True, help="How often it is repeated.")
@click.option("--subject", metavar="TEXT", help="The subject, for schemes that name it.")
@click.option("--relation", metavar="P", default="", help="Its relation, for scheme `relation`.")
@click.option("--true", "target_true", metavar="TEXT", help="The true target.")
@click.option("--false", "target_false", metavar="TEXT", help="The false target.")
@click.option("--top", type=int, default=5, show_default=True, help="How many next tokens.")
@click.option("--tokens", type=int, default=12, show_default=True, help="Length of the completion.")
@model_options
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
    **loading: Any,
) -> None:
    """Show the likeliest next tokens and the greedy completion of PROMPT.

    With --scheme or --sentence, the hijacked prompt is asked too and shown beside the bare one.

    \b
    Example:
      hijacklens ask --model gemma3-270m "The Eiffel Tower is in the city of" \\
          --scheme do-not-think --true Paris --false Guam
    """  # noqa: D301
    if scheme and sentence:
        raise InputError("give either --scheme or --sentence, not both.")
    if scheme:
        sentence = _sentence(scheme, prompt, subject, relation, target_true, target_false)
    from hijacklens.models import load_model
    from hijacklens.scoring.answers import answer

    texts = [prompt]
    if sentence:
        if dose < 1:
            raise InputError(f"--dose counts sentences and must be at least 1, not {dose}.")
        texts.append(" ".join([sentence] * dose + [prompt]))
    targets = [target for target in (target_true, target_false) if target]
    for name in models:
        model = load_model(name, **loading)
        answers = [answer(model, text, targets=targets, top=top, tokens=tokens) for text in texts]
        click.echo(_side_by_side(name, answers, targets))


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
    from hijacklens.schemes import Unusable, get_scheme

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


def _side_by_side(name: str, answers: Sequence[Answer], targets: Sequence[str]) -> str:
    from analyses.tables import table

    titles = ["bare", "hijacked"][: len(answers)]
    lines = [f"\n{name}"]
    for title, found in zip(titles, answers, strict=True):
        lines.append(f"  {title + ':':10}{found.text}")
        lines.append(f"  {'':10}-> {found.completion.strip()!r}")
    header = ["", *(part for title in titles for part in (title, "p", "nats"))]
    rows = []
    for i in range(len(answers[0].top)):
        rows.append([str(i + 1), *_cells([found.top[i] for found in answers])])
    for i, target in enumerate(targets):
        found = [item.targets[i] for item in answers]
        cells = _cells(found)
        for j, candidate in enumerate(found):
            cells[3 * j] += f" (rank {candidate.rank + 1})"
        rows.append([f"{target}:", *cells])
    sides = "l" + "lrr" * len(answers)
    lines.extend("  " + line for line in table(header, rows, left=sides).splitlines())
    return "\n".join(lines)


def _cells(candidates: Sequence[Any]) -> list[str]:
    return [
        cell
        for item in candidates
        for cell in (repr(item.token), f"{item.probability:.2g}", f"{item.logprob:.2f}")
    ]
