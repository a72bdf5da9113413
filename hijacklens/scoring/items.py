"""Items: one fact under one scheme at one dose, from its text to the two scores.

Fact --scheme--> Prompt --tokens--> requests --engine--> readings --> one row of items.parquet
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import pandas as pd

from hijacklens.engine.reading import Reading
from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, FactSet, Skipped
from hijacklens.prompts.chat import prompt_of
from hijacklens.prompts.layout import ID_BITS, mark
from hijacklens.prompts.prompt import Prompt
from hijacklens.prompts.schemes import Scheme, Unusable
from hijacklens.prompts.spans import TEXT
from hijacklens.prompts.tokens import (
    Continuation,
    LocatedPrompt,
    TokenIds,
    continuation,
    encode,
    locate,
    require_known,
)
from hijacklens.results.stored import Stored

ITEM_COLUMNS = (
    "model",
    "case_id",
    "relation_id",
    "subject",
    "scheme",
    "dose",
    "first_true",
    "first_false",
    "sum_true",
    "sum_false",
    "n_tokens_true",
    "n_tokens_false",
    "top_token",
    "top_logprob",
    "same_first_token",
)
PROMPT_COLUMNS = ("case_id", "scheme", "sentence", "query", "target_true", "target_false")
SKIPPED_COLUMNS = ("model", "case_id", "relation_id", "subject", "scheme", "reason")
_SKIPPED_TYPES: dict[str, Any] = {**dict.fromkeys(SKIPPED_COLUMNS, str), "case_id": "Int64"}
SkippedTable: TypeAlias = Annotated[pd.DataFrame, Stored("skipped.csv", dtypes=_SKIPPED_TYPES)]
"""The field of a result that lists what could not be scored, with the reason."""
Step: TypeAlias = tuple[TokenIds, int]
"""The symbols before a token of a target, and that token."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt of a fact in symbols (see `hijacklens.prompts.layout`), with both targets."""

    fact: Fact
    prompt: Prompt
    ids: TokenIds
    true: tuple[Step, ...]
    false: tuple[Step, ...]
    prompt_ends: tuple[int, int] = (0, 0)
    """How many steps of each target are the end of the prompt, which the other target's first token
    includes: both targets are read after the same context."""

    @property
    def reads(self) -> Iterable[tuple[TokenIds, int | None]]:
        """Prefixes with the token to read after each; None where only the top token is needed."""
        yield from ((self.ids, None), *self.true, *self.false)

    @property
    def first_tokens(self) -> tuple[int, int]:
        """The tokens after the prompt with which the true and the false target start.

        Raises:
            InputError: The tokenizer joins a target with the end of the prompt.
        """
        steps = (self.true[0], self.false[0])
        if any(before != self.ids for before, _ in steps):
            raise InputError(
                "a target does not start with a separate token, since the tokenizer joins it with "
                "the end of the prompt, such as a space there"
            )
        return steps[0][1], steps[1][1]

    @property
    def key(self) -> tuple[int, str]:
        """Case id and scheme: items with the same key are scored together or not at all."""
        return self.fact.case_id, self.prompt.scheme


@dataclass(frozen=True, slots=True)
class Unscored:
    """A fact that could not be scored under a scheme, and the reason."""

    fact: Fact
    scheme: str
    reason: str


def skipped_table(
    unscored: Iterable[Unscored], model: str, skipped: Iterable[Skipped] = ()
) -> pd.DataFrame:
    """Return a row per fact that was skipped when facts were read, or not scored by a model."""
    unread = [(x.case_id, x.relation_id, x.subject, "all", x.reason) for x in skipped]
    left_out = [
        (x.fact.case_id, x.fact.relation_id, x.fact.subject, x.scheme, x.reason) for x in unscored
    ]
    rows = [(model, *row) for row in (*unread, *left_out)]
    return pd.DataFrame(rows, columns=list(SKIPPED_COLUMNS)).astype(_SKIPPED_TYPES)


def make_prompts(
    facts: FactSet,
    schemes: Scheme | Sequence[Scheme],
    doses: Sequence[int],
    tokenizer: Any,
    *,
    seed: int,
) -> tuple[list[tuple[Fact, Prompt]], list[Unscored]]:
    """Return the prompts of all facts at all doses, and the facts a scheme has no sentence for.

    The tokenizer has the template of a chat.
    """
    false_targets: dict[str, list[str]] = {}
    for fact in facts:
        false_targets.setdefault(fact.relation_id, []).append(fact.target_false)
    prompts: list[tuple[Fact, Prompt]] = []
    unscored: list[Unscored] = []
    for scheme in [schemes] if isinstance(schemes, Scheme) else schemes:
        for fact in facts:
            try:
                sentence = scheme.sentence(fact, pool=false_targets[fact.relation_id], seed=seed)
            except Unusable as reason:
                unscored.append(Unscored(fact, scheme.name, str(reason)))
                continue
            written = {"sentence": sentence, "scheme": scheme.name}
            prompts.extend(
                (fact, prompt_of(fact, facts, tokenizer, dose=dose, **written)) for dose in doses
            )
    return prompts, unscored


def make_items(
    prompts: Sequence[tuple[Fact, Prompt]],
    tokenizer: Any,
    *,
    context_length: int,
    vocabulary: int | None = None,
    spans: Sequence[str] = (),
) -> tuple[list[Item], list[Unscored]]:
    """Tokenise prompts, with both targets read in context.

    Args:
        prompts: Facts with their prompts.
        tokenizer: The model's tokenizer.
        context_length: The model's context window, in tokens.
        vocabulary: Number of token ids that the model knows; None if unknown.
        spans: Spans to mark in the symbols, as `hijacklens.probe.spans_of` returns them.

    Returns:
        The items, and the facts that cannot be scored. If the prompt of one dose exceeds the
        context window, the fact is left out at all doses, so that doses compare the same facts.
    """
    texts = dict.fromkeys(
        text
        for fact, prompt in prompts
        for text in (prompt.text, *map(prompt.followed_by, (fact.target_true, fact.target_false)))
    )
    templated = any(prompt.templated for _, prompt in prompts[:1])
    encoded = encode(tokenizer, list(texts), templated=templated)
    ids = dict(zip(texts, encoded, strict=True))
    items: list[Item] = []
    unscored: dict[tuple[int, str], Unscored] = {}
    for fact, prompt in prompts:
        prompt_ids = ids[prompt.text]
        try:
            true, false = (
                continuation(prompt_ids, ids[prompt.followed_by(target)])
                for target in (fact.target_true, fact.target_false)
            )
            for ids_of_text in (prompt_ids, true.target, false.target):
                require_known(ids_of_text, vocabulary)
            # The model predicts the last token of a target but is not given it.
            lengths = [len(side.context + side.target) - 1 for side in (true, false)]
            longest = max(len(prompt_ids), *lengths)
            if longest > context_length:
                raise ValueError(
                    f"the prompt at dose {prompt.dose} has {longest} tokens, more than the "
                    f"model's context window of {context_length}"
                )
        except ValueError as reason:
            key = fact.case_id, prompt.scheme
            unscored.setdefault(key, Unscored(fact, prompt.scheme, str(reason)))
            continue
        located = locate(tokenizer, prompt) if spans else None
        symbols = mark(prompt_ids, [located.positions(s) for s in spans]) if located else prompt_ids
        start = min(len(true.context), len(false.context))
        true_steps, false_steps = (
            steps_in_context(side.after(start), located, spans) for side in (true, false)
        )
        ends = len(true.context) - start, len(false.context) - start
        items.append(Item(fact, prompt, symbols, true_steps, false_steps, ends))
    return [item for item in items if item.key not in unscored], list(unscored.values())


def steps_in_context(
    target: Continuation, prompt: LocatedPrompt | None, spans: Sequence[str]
) -> tuple[Step, ...]:
    """Return the steps of a target, in symbols.

    The target tokens that the model is given continue the query, and the answer is read at them:
    they belong to the spans `query`, `last` and `target`.
    """
    if prompt is None:
        return tuple(target.steps)
    n = len(target.context)
    answer = tuple(range(n, n + len(target.target)))
    target_positions = {"query": answer, "target": answer, "last": (n - 1, *answer)}
    positions = [
        (*(i for i in prompt.positions(span) if i < n), *target_positions.get(span, ()))
        for span in spans
    ]
    symbols = mark(target.context + target.target, positions)
    return tuple((symbols[: len(ids)], token) for ids, token in target.steps)


def require_found(items: Sequence[Item], spans: Sequence[str]) -> None:
    """Raise `InputError` for a `text:` span in no prompt, whose probe would silently do nothing."""
    for bit, span in enumerate(spans):
        mask = 1 << (ID_BITS + bit)
        inside = (symbol & mask for item in items for symbol in item.ids)
        if items and span.startswith(TEXT) and not any(inside):
            raise InputError(
                f"the span {span!r} is in none of the {len(items)} prompts, such as "
                f"{items[-1].prompt.text!r}. Check its spelling."
            )


def requests_of(items: Iterable[Item]) -> dict[TokenIds, set[int]]:
    """Return what the engine has to read for all items, each prefix once."""
    requests: dict[TokenIds, set[int]] = {}
    for item in items:
        for prefix, token in item.reads:
            requests.setdefault(prefix, set()).update(() if token is None else (token,))
    return requests


def prompt_table(items: Iterable[Item]) -> pd.DataFrame:
    """Return the texts of the items: one row per fact and scheme, with the hijacking sentence.

    The prompt at dose k is `" ".join([sentence] * k + [query])`, after the opening of the facts.
    The sentence is empty if only the bare query was scored.
    """
    rows: dict[tuple[int, str], tuple[Any, ...]] = {}
    for item in items:
        fact, prompt = item.fact, item.prompt
        if item.key not in rows or (prompt.dose and not rows[item.key][2]):
            start, end = next(iter(prompt.spans["hijack"]), (0, 0))
            sentence = prompt.text[start:end]
            row = (*item.key, sentence, fact.prompt, fact.target_true, fact.target_false)
            rows[item.key] = row
    return pd.DataFrame(list(rows.values()), columns=list(PROMPT_COLUMNS))


def score_items(
    items: Sequence[Item], readings: Mapping[TokenIds, Reading], *, model: str, tokenizer: Any
) -> tuple[pd.DataFrame, list[Unscored]]:
    """Return the rows of `items.parquet`, and the facts whose scores are not finite."""
    token_texts: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    unscored: dict[tuple[int, str], Unscored] = {}
    for item in items:
        true, false = (
            [readings[prefix].logprobs[token] for prefix, token in steps]
            for steps in (item.true, item.false)
        )
        if not all(map(math.isfinite, true + false)):
            reason = f"the model gave no finite log-probability at dose {item.prompt.dose}"
            unscored.setdefault(item.key, Unscored(item.fact, item.prompt.scheme, reason))
            continue
        reading = readings[item.ids]
        ends = item.prompt_ends
        if reading.top_token not in token_texts:
            token_texts[reading.top_token] = tokenizer.decode([reading.top_token])
        rows.append(
            {
                "model": model,
                "case_id": item.fact.case_id,
                "relation_id": item.fact.relation_id,
                "subject": item.fact.subject,
                "scheme": item.prompt.scheme,
                "dose": item.prompt.dose,
                "first_true": math.fsum(true[: ends[0] + 1]),
                "first_false": math.fsum(false[: ends[1] + 1]),
                "sum_true": math.fsum(true),
                "sum_false": math.fsum(false),
                "n_tokens_true": len(true) - ends[0],
                "n_tokens_false": len(false) - ends[1],
                "top_token": token_texts[reading.top_token],
                "top_logprob": reading.top_logprob,
                "same_first_token": item.true[0] == item.false[0],
            }
        )
    rows = [row for row in rows if (row["case_id"], row["scheme"]) not in unscored]
    return pd.DataFrame(rows, columns=list(ITEM_COLUMNS)), list(unscored.values())
