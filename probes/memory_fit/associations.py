"""Associations: pairs of token ids of which one should look up the other.

A memory is tested on pairs (source, target): attending to the source token should raise the logit
of the target token. On the one-layer model they are the neighbours of equation 5.1, on a language
model pairs of your own or those of facts (the last token of the subject and the first token of the
target, or a near word and the target).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from hijacklens.errors import InputError, choice
from hijacklens.facts.fact import Fact, FactSet, Skipped
from hijacklens.one_layer.task import ConceptTask
from hijacklens.prompts.chat import prompt_of
from hijacklens.prompts.prompt import Prompt
from hijacklens.prompts.tokens import continuation, encode, locate

Cue: TypeAlias = Literal["subject", "near"]
"""The source of a fact: the last token of its subject, or of the word close in meaning to the
target, read after the prompt."""
Answer: TypeAlias = Literal["true", "false"]
"""The target of a fact that is looked up."""


@dataclass(frozen=True, slots=True)
class Associations:
    """Distinct pairs of token ids: the i-th source should look up the i-th target."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    label: str
    """A description, which is printed and saved."""
    skipped: tuple[Skipped, ...] = ()
    """Facts without a pair, with the reason."""

    def __post_init__(self) -> None:
        pairs = list(zip(self.source, self.target, strict=True))
        if len(set(pairs)) < len(pairs):
            raise InputError(f"{self.label}: a pair occurs twice; give each pair once.")
        if len(pairs) < 2:
            raise InputError(f"{self.label}: {len(pairs)} pairs; a memory fit needs at least 2.")
        if len(set(self.target)) < 2 or len(set(self.source)) < 2:
            raise InputError(
                f"{self.label}: {len(set(self.source))} sources and {len(set(self.target))} "
                "targets; give at least 2 of each, so that there is something to distinguish."
            )

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        sources, targets = len(set(self.source)), len(set(self.target))
        return f"Associations({self.label!r}, {len(self)} pairs, {sources} x {targets} tokens)"


def pairs(
    listed: Iterable[tuple[int, int]], *, label: str = "pairs", skipped: Iterable[Skipped] = ()
) -> Associations:
    """Make associations from pairs (source id, target id); repeated pairs count once.

    Raises:
        InputError: An item is not a pair of whole numbers of at least 0, or there are too few.
    """
    distinct: dict[tuple[int, int], None] = {}
    for pair in listed:
        try:
            source, target = (operator.index(token) for token in pair)
        except (TypeError, ValueError):
            source = target = -1
        if source < 0 or target < 0:
            raise InputError(f"{label}: pairs are two token ids (source, target); got {pair!r}.")
        distinct[source, target] = None
    sources, targets = zip(*distinct, strict=True) if distinct else ((), ())
    return Associations(sources, targets, label, tuple(skipped))


def neighbours(task: ConceptTask) -> Associations:
    """Return the pairs of equation 5.1: t' looks up t if t' is in N(t) at Hamming distance 1.

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
    """Return the pairs of facts: the token of a cue, and the first token of a target.

    Prompts are tokenised as for scoring, and the target is read after the prompt. Several facts
    may give the same pair, which counts once.

    Args:
        facts: The facts.
        tokenizer: The model's tokenizer; `model.tokenizer`.
        cue: `"subject"`: the last token of the subject in the prompt. `"near"`: the last token of
            the near word (France for French) after the prompt; facts without one are skipped.
        answer: Whether the `"true"` or the `"false"` target is looked up.

    Raises:
        InputError: The cue or answer is unknown, or there are fewer than two distinct pairs.
    """
    choice("cue", cue, get_args(Cue))
    choice("answer", answer, get_args(Answer))
    listed: list[tuple[int, int]] = []
    skipped: list[Skipped] = []
    for fact in facts:
        try:
            prompt = prompt_of(fact, facts, tokenizer)
            listed.append(_pair(fact, prompt, tokenizer, cue, answer))
        except ValueError as reason:
            names = (fact.case_id, fact.relation_id, fact.subject)
            skipped.append(Skipped(*names, reason=str(reason)))
    return pairs(listed, label=f"{facts.name}: {cue} to {answer} target", skipped=skipped)


def _pair(fact: Fact, prompt: Prompt, tokenizer: Any, cue: Cue, answer: Answer) -> tuple[int, int]:
    located = locate(tokenizer, prompt)

    def tokens_after_prompt(word: str) -> tuple[int, ...]:
        (ids,) = encode(tokenizer, [prompt.followed_by(word)], templated=prompt.templated)
        return continuation(located.ids, ids).target

    target = tokens_after_prompt(fact.target_true if answer == "true" else fact.target_false)[0]
    if cue == "near":
        word = fact.near_true if answer == "true" else fact.near_false
        if not word:
            raise ValueError(f"the fact has no word near to its {answer} target")
        return tokens_after_prompt(word)[-1], target
    positions = located.spans["subject"]
    if not positions:
        raise ValueError("no token of the prompt belongs to the subject")
    return located.ids[positions[-1]], target
