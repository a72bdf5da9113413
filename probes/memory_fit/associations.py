"""Associations: which token is said to look up which, as pairs of token ids.

A memory is tested on pairs (source, target): attending to the source token shall raise the logit
of the target token. On the one-layer model they are the neighbours of equation 5.1, on a language
model pairs of your own or those of facts (the last token of the subject and the first token of the
target, or a near word and the target).

>>> from hijacklens.one_layer.task import ConceptTask
>>> found = neighbours(ConceptTask(bits=2))
>>> list(zip(found.source, found.target))
[(1, 0), (2, 0), (0, 1), (3, 1), (0, 2), (3, 2), (1, 3), (2, 3)]
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from hijacklens.errors import InputError, unknown
from hijacklens.facts.fact import Fact, FactSet, Skipped
from hijacklens.one_layer.task import ConceptTask
from hijacklens.prompts.prompt import make_prompt
from hijacklens.prompts.tokens import continuation, encode, locate

Cue: TypeAlias = Literal["subject", "near"]
"""What of a fact looks the target up: the last token of its subject, or that of the word that is
close in meaning to the target, read behind the prompt."""
Answer: TypeAlias = Literal["true", "false"]
"""Which target of a fact is looked up."""


@dataclass(frozen=True, slots=True)
class Associations:
    """Distinct pairs of token ids: the i-th source is said to look up the i-th target."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    label: str
    """What they are, as it is printed and saved."""
    skipped: tuple[Skipped, ...] = ()
    """Facts that give no pair, with the reason."""

    def __post_init__(self) -> None:
        pairs = list(zip(self.source, self.target, strict=True))
        if len(set(pairs)) < len(pairs):
            raise InputError(f"{self.label}: a pair occurs twice; give each pair once.")
        if len(pairs) < 2:
            raise InputError(f"{self.label}: {len(pairs)} pairs; a memory fit needs at least 2.")
        if len(set(self.target)) < 2 or len(set(self.source)) < 2:
            raise InputError(
                f"{self.label}: {len(set(self.source))} sources and {len(set(self.target))} "
                "targets; with fewer than 2 of either there is nothing to tell apart."
            )

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        sources, targets = len(set(self.source)), len(set(self.target))
        return f"Associations({self.label!r}, {len(self)} pairs, {sources} x {targets} tokens)"


def pairs(
    listed: Iterable[tuple[int, int]], *, label: str = "pairs", skipped: Iterable[Skipped] = ()
) -> Associations:
    """Associations from pairs (source id, target id); a pair that comes twice counts once.

    Raises:
        InputError: Something else than pairs of whole numbers of at least 0, or too few of them.
    """
    found: dict[tuple[int, int], None] = {}
    for pair in listed:
        try:
            source, target = (operator.index(token) for token in pair)
        except (TypeError, ValueError):
            source = target = -1
        if source < 0 or target < 0:
            raise InputError(f"{label}: pairs are two token ids (source, target); got {pair!r}.")
        found[source, target] = None
    first, second = (tuple(pair[i] for pair in found) for i in range(2))
    return Associations(first, second, label, tuple(skipped))


def neighbours(task: ConceptTask) -> Associations:
    """The pairs of equation 5.1: t' looks up t if t' is in N(t) at Hamming distance 1.

    Raises:
        InputError: The support has no neighbours at Hamming distance 1.
    """
    near = task.neighbours() & (task.hamming() == 1)
    target, source = near.nonzero().unbind(1)
    return pairs(
        zip(source.tolist(), target.tolist(), strict=True),
        label=f"Hamming-1 neighbours, m = {task.bits}, support {task.support_name}",
    )


def of_facts(
    facts: FactSet, tokenizer: Any, *, cue: Cue = "subject", answer: Answer = "true"
) -> Associations:
    """The pairs of facts: the token that stands for a cue, and the first token of a target.

    Prompts are tokenised as for scoring, and the target is read behind the prompt. Several facts
    may give the same pair, which counts once.

    Args:
        facts: The facts.
        tokenizer: The model's tokenizer; `model.tokenizer`.
        cue: `"subject"`: the last token of the subject in the prompt. `"near"`: the last token of
            the near word (France for French) behind the prompt; facts without one are skipped.
        answer: Whether the `"true"` or the `"false"` target is looked up.

    Raises:
        InputError: An unknown cue or answer, or fewer than two distinct pairs.
    """
    if cue not in get_args(Cue):
        raise unknown("cue", cue, get_args(Cue))
    if answer not in get_args(Answer):
        raise unknown("answer", answer, get_args(Answer))
    found: list[tuple[int, int]] = []
    skipped: list[Skipped] = []
    for fact in facts:
        try:
            found.append(_pair(fact, tokenizer, cue, answer))
        except ValueError as reason:
            place = (fact.case_id, fact.relation_id, fact.subject)
            skipped.append(Skipped(*place, reason=str(reason)))
    return pairs(found, label=f"{facts.name}: {cue} to {answer} target", skipped=skipped)


def _pair(fact: Fact, tokenizer: Any, cue: Cue, answer: Answer) -> tuple[int, int]:
    prompt = make_prompt(fact, sentence="", dose=0, scheme="bare")
    located = locate(tokenizer, prompt)

    def behind(word: str) -> tuple[int, ...]:
        (whole,) = encode(tokenizer, [f"{prompt.text} {word}"])
        return continuation(located.ids, whole).target

    target = behind(fact.target_true if answer == "true" else fact.target_false)[0]
    if cue == "near":
        word = fact.near_true if answer == "true" else fact.near_false
        if not word:
            raise ValueError(f"the fact has no word near to its {answer} target")
        return behind(word)[-1], target
    places = located.spans["subject"]
    if not places:
        raise ValueError("no token of the prompt belongs to the subject")
    return located.ids[places[-1]], target
