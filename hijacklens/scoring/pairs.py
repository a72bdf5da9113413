"""Prompt pairs: the bare query of each fact and its hijacked prompt, in tokens, with both targets.

Pairs hold the items that `hijacklens.hijack` scores. They are made once and handed to every probe
that compares the two prompts:

    pairs = hl.pairs(model, facts, scheme="do-not-think", dose=1)
    logit_shift.trace(model, pairs[0])
    logit_shift.average(model, pairs)
    heads.search(model, pairs)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, TypeAlias, cast

import pandas as pd

from hijacklens.errors import Function, InputError, choice, one_of_type, strict, warn, whole_number
from hijacklens.facts.chat import takes_chat
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.models.hooked import HookedLanguageModel, require_text, vocabulary_of
from hijacklens.prompts.correspondence import Correspondence, Unit, align, units
from hijacklens.prompts.layout import mark
from hijacklens.prompts.prompt import MOST_SENTENCES
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.prompts.tokens import Continuation, LocatedPrompt, locate
from hijacklens.prompts.wordings import Unscored, make_prompts
from hijacklens.results.glance import Glance, Shown
from hijacklens.scoring.items import (
    Item,
    make_items,
    skipped_table,
    steps_in_context,
)

Direction: TypeAlias = Literal["denoise", "noise"]
"""From the clean (bare) prompt into the hijacked one, or from the hijacked into the clean one."""
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")
SAME_FIRST_TOKEN = "both targets start with the same token, so that there is no shift"
UNEVEN = "the tokenizer joins the end of the prompt with one of the targets only"


@dataclass(frozen=True, slots=True)
class Pair:
    """The bare query of a fact and its hijacked prompt, in tokens."""

    bare: LocatedPrompt
    hijacked: LocatedPrompt
    items: tuple[Item, Item]
    """The same two prompts, each with both targets read in its context."""
    units: tuple[Unit, ...]
    """All tokens of both prompts, grouped where they correspond."""
    scheme: Scheme
    seed: int
    """The seed that the scheme drew with."""

    @property
    def fact(self) -> Fact:
        """The fact that both prompts query."""
        return self.items[0].fact

    @property
    def dose(self) -> int:
        """How many hijacking sentences precede the query of the hijacked prompt."""
        return self.items[1].prompt.dose

    @property
    def same_first_token(self) -> bool:
        """Whether both targets start with the same token, so that there is no shift."""
        return any(item.true[0] == item.false[0] for item in self.items)

    def marked(self, spans: Sequence[str]) -> tuple[Item, Item]:
        """Return the items with symbols (`hijacklens.prompts.layout`) that mark spans.

        `hijacklens.probe.spans_of` gives the spans of probes.
        """
        if not spans:
            return self.items
        bare, hijacked = self.items
        return _marked(bare, self.bare, spans), _marked(hijacked, self.hijacked, spans)

    def align(self, *, direction: Direction, span: str = "query") -> Correspondence:
        """Pair the tokens of a span that correspond, from one prompt to the other.

        Raises:
            InputError: An unknown direction, or as `hijacklens.prompts.correspondence.align`.
        """
        choice("direction", direction, DIRECTIONS)
        ends = (self.bare, self.hijacked)
        source, target = ends if direction == "denoise" else ends[::-1]
        return align(source, target, span=span)

    def answers(self) -> tuple[int, int]:
        """Return the first tokens of the true and of the false target, which both prompts share.

        Raises:
            InputError: As `Item.first_tokens`, or the first token of a target differs between the
                prompts.
        """
        first_tokens = {item.first_tokens for item in self.items}
        if len(first_tokens) > 1:
            raise InputError("the first token of a target differs after the hijacked prompt")
        return first_tokens.pop()


@dataclass(frozen=True, eq=False)
class Pairs(Shown):
    """The prompt pairs of many facts and how they were made; `pairs` makes them."""

    pairs: tuple[Pair, ...]
    """In the order of the facts."""
    skipped: pd.DataFrame
    """Facts without a pair: model, case_id, relation_id, subject, scheme, reason."""
    facts: FactSet
    """The facts that pairs were made of, including those of `skipped`."""
    scheme: Scheme
    dose: int
    """How many hijacking sentences precede the query."""
    seed: int
    model: str
    """The name of the model whose tokenizer was used."""

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def glance(self) -> Glance:
        """How many pairs, how they were made, and how many facts were skipped."""
        return Glance(
            f"{self.model} · {self.facts.record().title}, {len(self)} pairs · {self.scheme.name}, "
            f"dose {self.dose} · {len(self.skipped)} skipped · seed {self.seed}",
            steps=("skipped", "facts"),
        )

    def without(self, reasons: Iterable[str | None]) -> Pairs:
        """Return the pairs without those that have a reason, whose facts `skipped` then lists."""
        listed = list(zip(self.pairs, reasons, strict=True))
        unscored = [Unscored(pair.fact, pair.scheme.name, why) for pair, why in listed if why]
        skipped = pd.concat([self.skipped, skipped_table(unscored, self.model)], ignore_index=True)
        return replace(self, pairs=tuple(pair for pair, why in listed if not why), skipped=skipped)

    def require(self, participle: str) -> None:
        """Raise an `InputError` with the first reason if no pair could be "traced", for example."""
        if not self.pairs:
            raise InputError(
                f"none of the {len(self.facts)} facts of {self.facts.name} could be {participle}; "
                f"the first reason: {self.skipped['reason'].iloc[0]}."
            )


@takes_chat
def pairs(
    model: HookedLanguageModel,
    facts: FactSet,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    seed: int = 0,
) -> Pairs:
    """Make the bare and the hijacked prompt of each fact.

    Args:
        model: Its tokenizer and context window are used.
        facts: The facts; schemes that draw other targets draw them among these.
        scheme: The name of a registered scheme, or a scheme.
        dose: How many sentences precede the query, at least 1.
        seed: Seeds what the scheme draws.
        chat: Ask the facts in this chat, as `facts.in_chat(chat)` does.

    Returns:
        The pairs; `skipped` lists the facts that have none, with the reason.

    Raises:
        InputError: No facts, no fact with a pair, an unknown scheme, a dose below 1, or a "slow"
            tokenizer.
    """
    require_text(model, operation="a prompt pair")
    one_of_type("facts", facts, FactSet, "hl.atlas()")
    if len(facts) == 0:
        raise InputError(f"there are no facts in {facts.name}.")
    seed = whole_number("seed", seed)
    rule = get_scheme(scheme)
    dose = whole_number(
        "a shift compares dose 0 with a higher dose; the dose", dose, least=1,
        most=MOST_SENTENCES,
    )  # fmt: skip
    prompts, unscored = make_prompts(facts, rule, (0, dose), model.tokenizer, seed=seed)
    items, too_long = make_items(
        prompts,
        model.tokenizer,
        context_length=int(model.cfg.n_ctx),
        vocabulary=vocabulary_of(model),
    )
    name = str(model.cfg.model_name)
    # Items come in the order of the facts, dose 0 before the other one.
    made, uneven, listed = [], [], iter(items)
    for both in zip(listed, listed, strict=True):
        if any(any(item.prompt_ends) for item in both):
            uneven.append(Unscored(both[0].fact, rule.name, UNEVEN))
            continue
        bare, hijacked = (locate(model.tokenizer, item.prompt) for item in both)
        made.append(Pair(bare, hijacked, both, units(bare, hijacked, model.tokenizer), rule, seed))
    skipped = skipped_table([*unscored, *too_long, *uneven], name, facts.skipped)
    found = Pairs(tuple(made), skipped, facts, rule, dose, seed, name)
    found.require(f"paired with its prompt under {rule.name}")
    return found


def only(pairs: Pair | Pairs, *, operation: str) -> Pair:
    """Return the pair that a probe of the shift of one fact works on.

    Raises:
        InputError: There are several pairs, none, or something else, or both targets start with the
            same token.
    """
    if not isinstance(pairs, Pair):
        one_of_type("pairs", pairs, Pairs, "hl.pairs(model, facts)[0]")
        if len(pairs) != 1:
            raise InputError(
                f"{operation} takes one pair of prompts, and these are {len(pairs)}; give one of "
                "them, such as pairs[0]."
            )
        pairs = pairs[0]
    if pairs.same_first_token:
        raise InputError(
            f"{operation} cannot take case {pairs.fact.case_id}: {SAME_FIRST_TOKEN}. Choose "
            "targets that begin differently, or score the fact under the rule sum."
        )
    return pairs


def takes_facts(function: Function) -> Function:
    """Let a function of a model and prompt pairs take facts, scheme, dose and seed for one release.

    Warns:
        FutureWarning: On a call with facts.
    """
    checked = strict(function)

    @wraps(function)
    def call(model: Any, *arguments: Any, **keywords: Any) -> Any:
        old = [keywords.pop(name) for name in ("fact", "facts") if name in keywords]
        first, *rest = [*old, *arguments] or [keywords.pop("pairs", None)]
        if isinstance(first, (Fact, FactSet)):
            names = ("scheme", "dose", "seed")
            choices = {name: keywords.pop(name) for name in names if name in keywords}
            warn(
                f"{function.__name__} takes prompt pairs: pairs = hl.pairs(model, facts, scheme=, "
                "dose=, seed=); the next release no longer takes facts.",
                FutureWarning,
            )
            if isinstance(first, Fact):
                first = FactSet((first,), name=f"case {first.case_id}")
            first = pairs(model, first, **choices)
        return checked(model, first, *rest, **keywords)

    return cast("Function", call)


def _marked(item: Item, prompt: LocatedPrompt, spans: Sequence[str]) -> Item:
    true, false = (
        steps_in_context(
            Continuation(steps[0][0], tuple(token for _, token in steps)), prompt, spans
        )
        for steps in (item.true, item.false)
    )
    ids = mark(item.ids, [prompt.positions(span) for span in spans])
    return replace(item, ids=ids, true=true, false=false)
