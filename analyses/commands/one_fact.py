"""`hijacklens ask` and `trace`: commands on one fact, which options may write out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import click

from analyses.commands.declarations import Whole, argument, declared, option
from analyses.commands.options import (
    FolderChoice,
    Model,
    ModelChoice,
    Models,
    Probes,
    PromptForm,
    relation_option,
    run_name,
    scheme_option,
    source_option,
)
from analyses.commands.screen import Output, records
from hijacklens.errors import InputError
from hijacklens.results.glance import Grid, Title

if TYPE_CHECKING:
    from hijacklens.facts.fact import FactSet
    from hijacklens.prompts.prompt import Prompt
    from hijacklens.scoring.answers import Answer

PAGE = "attention.html"
BY = ("token", "position", "layer", "head")
"""The columns that the biggest parts are summed over to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFact(PromptForm):
    """The parts of a fact other than its prompt, written as options."""

    subject: Annotated[
        str | None, option("The subject, which must occur once in the prompt.", metavar="TEXT")
    ] = None
    target_true: Annotated[str | None, option("The true target.", "--true", metavar="TEXT")] = None
    target_false: Annotated[str | None, option("The false target.", "--false", metavar="TEXT")] = (
        None
    )
    relation: Annotated[
        str,
        relation_option("The relation by id or name, for the scheme `relation`."),
    ] = ""

    def require(self, what: str, needed: Iterable[str], **more: str | None) -> None:
        """Refuse a fact that lacks some of its parts.

        Args:
            what: What needs them, for the message.
            needed: Names of fields.
            more: Further parts that are needed, by name.
        """
        options = {"target_true": "--true", "target_false": "--false"}
        parts = {**more, **{name: getattr(self, name) for name in needed}}
        missing = [options.get(name, f"--{name}") for name, part in parts.items() if not part]
        if missing:
            raise InputError(f"{what} needs {' and '.join(missing)}.")

    def require_two_targets(self) -> None:
        """Refuse targets that a fact may not have."""
        from hijacklens.facts.fact import same_name

        true, false = self.target_true, self.target_false
        if true and false and same_name(true.strip()) == same_name(false.strip()):
            raise InputError(f"--true {true!r} and --false {false!r} name one thing; give two.")

    def facts(self, prompt: str) -> FactSet:
        """Return a set of the one fact. A missing target becomes a placeholder text.

        Raises:
            InputError: The subject does not occur exactly once in the prompt.
        """
        from hijacklens.facts.records import facts_from_records
        from hijacklens.facts.relations import country_of_language

        countries = country_of_language()
        record = {
            "prompt": prompt,
            "subject": self.subject,
            "relation_id": self.relation,
            "answer_a": self.target_true or "(no true target)",
            "answer_b": self.target_false or "(no false target)",
            "near_true": countries.get(self.target_true or ""),
            "near_false": countries.get(self.target_false or ""),
        }
        return self.write(facts_from_records([record], name="own", joining=self.joining))


@click.command("ask")
@declared("answers", "probes")
def ask(
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
    written.require_two_targets()
    if scheme:
        sentence = _sentence(scheme, prompt, written, output)
    prompts = _prompts(prompt, written, sentence, dose)
    loading.check(*models)
    targets = [target for target in (written.target_true, written.target_false) if target]
    from hijacklens.scoring.answers import answer

    if prompt.endswith(" "):
        output.note("the prompt ends in a space, which tokenizers usually join to the next word")
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


def _sentence(name: str, prompt: str, written: WrittenFact, output: Output) -> str:
    """Return the sentence that a scheme makes for the written fact."""
    from hijacklens.prompts.schemes import Unusable, get_scheme

    scheme = get_scheme(name)
    targets = {"near_true": "target_true", "near_false": "target_false"}
    needed = {targets.get(part, part) for part in scheme.needs}
    parts = ("subject", "target_true", "target_false")
    written.require(f"scheme {name!r}", [part for part in parts if part in needed])
    facts = written.facts(prompt)
    if facts.note:
        output.note(facts.note)
    try:
        return scheme.sentence(facts[0])
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


@click.command("trace")
@declared(
    "folder", "files", "seed", "fact", "probes", "bare", "hijacked", "shift", "residual", "parts",
    "biggest", label="trace-<model>-<case>",
)  # fmt: skip
def trace(
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
    words = ("trace", name, "own" if case is None else str(case))
    path = folder.check(run_name(*words, loading=loading, form=written, probes=probes))
    loading.check(name)
    facts = _fact(prompt, written, source, case)
    if facts.note:
        output.note(f"{facts.name}: {facts.note}")

    from hijacklens.progress import bar
    from hijacklens.results.result import staged
    from hijacklens.scoring.pairs import pairs
    from probes import logit_shift
    from probes.logit_shift.page import save_attention_page, with_patterns

    output.loading(name)
    model = loading.load(name)
    active = [probe.probe(model=model, quiet=output.quiet) for probe in probes]
    pair = pairs(model, facts, scheme=rule, dose=dose, seed=seed)
    with bar(4, unit="steps", label="trace", quiet=output.quiet) as progress:
        account = logit_shift.trace(model, pair, probes=active)
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
    from hijacklens.facts.loading import load_facts

    parts = ("subject", "target_true", "target_false")
    if prompt or any(getattr(written, part) for part in parts):
        if source is not None or case is not None:
            raise InputError(
                "give either a fact of your own (--prompt, ...) or --facts and --case."
            )
        written.require("a fact of your own also", parts[1:], prompt=prompt)
        return written.facts(prompt or "")
    if case is None:
        raise InputError(
            "name a fact: --case ID of --facts, or --prompt, --subject, --true and --false. "
            "`hijacklens facts` lists case ids."
        )
    facts = load_facts(source or "atlas", joining=written.joining)
    return written.write(facts.where(case_ids=[case]))
