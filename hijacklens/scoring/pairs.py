"""Prompt pairs: the bare query of a fact and its hijacked prompt, in tokens, with both answers.

They are made as for scoring (`hijacklens.scoring.items`), so a probe of the pair is a probe of
what `hijacklens.hijack` scores.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, TypeAlias

from hijacklens.errors import InputError, unknown, whole_number
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.prompts.correspondence import Correspondence, align
from hijacklens.prompts.prompt import DOSE, MOST_SENTENCES
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.prompts.tokens import LocatedPrompt, locate
from hijacklens.scoring.items import Item, Unscored, make_items, make_prompts

Direction: TypeAlias = Literal["denoise", "noise"]
"""From the clean (bare) prompt into the hijacked one, or from the hijacked into the clean one."""
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")


@dataclass(frozen=True, slots=True)
class PromptPair:
    """The bare and the hijacked prompt of a fact."""

    bare: LocatedPrompt
    hijacked: LocatedPrompt
    items: tuple[Item, Item]
    """The same two prompts with both targets read in their context."""

    @property
    def fact(self) -> Fact:
        """The fact that both prompts ask for."""
        return self.items[0].fact

    def align(self, *, direction: Direction, span: str = "query") -> Correspondence:
        """The tokens of a span that correspond, from one prompt to the other.

        Raises:
            InputError: An unknown direction, or as `hijacklens.prompts.correspondence.align`.
        """
        if direction not in DIRECTIONS:
            raise unknown("direction", direction, DIRECTIONS)
        ends = (self.bare, self.hijacked)
        source, target = ends if direction == "denoise" else ends[::-1]
        return align(source, target, span=span)

    def answers(self) -> tuple[int, int]:
        """The first tokens of the true and of the false target, which both prompts share.

        Raises:
            InputError: A target does not start behind a prompt (the tokenizer joins its first
                letters to the last word), or starts with another token behind the other prompt.
        """
        found = set()
        for item in self.items:
            steps = (item.true[0], item.false[0])
            if any(before != item.ids for before, _ in steps):
                raise InputError("a target does not start with a token of its own")
            found.add((steps[0][1], steps[1][1]))
        if len(found) > 1:
            raise InputError("a target starts with another token behind the hijacked prompt")
        return found.pop()


def prompt_pairs(
    model: HookedLanguageModel,
    facts: FactSet,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    seed: int = 0,
) -> tuple[list[PromptPair], list[Unscored]]:
    """The bare and the hijacked prompt of each fact.

    Args:
        model: Its tokenizer and context window are used.
        facts: The facts; schemes that draw other targets draw them among these.
        scheme: The name of a registered scheme, or a scheme.
        dose: How many sentences stand before the query, at least 1.
        seed: Seeds what the scheme draws.

    Returns:
        The pairs, in the order of the facts, and the facts that scoring leaves out too, with the
        reason.

    Raises:
        InputError: No facts, an unknown scheme, a dose below 1, or a "slow" tokenizer.
    """
    if len(facts) == 0:
        raise InputError(f"there are no facts in {facts.name}.")
    dose = whole_number(DOSE, dose, most=MOST_SENTENCES)
    if dose < 1:
        raise InputError(f"a hijacked prompt has at least 1 sentence before it; dose is {dose}.")
    prompts, unusable = make_prompts(facts, get_scheme(scheme), (0, dose), seed=seed)
    items, too_long = make_items(prompts, model.tokenizer, context_length=int(model.cfg.n_ctx))
    by_fact: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        by_fact[item.fact.case_id].append(item)
    pairs = [
        PromptPair(
            locate(model.tokenizer, bare.prompt),
            locate(model.tokenizer, hijacked.prompt),
            (bare, hijacked),
        )
        for bare, hijacked in by_fact.values()
    ]
    return pairs, [*unusable, *too_long]
