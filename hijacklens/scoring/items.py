"""Items: one fact under one scheme at one dose, from its text to the two scores.

Fact --scheme--> Prompt --tokens--> what is to be read --engine--> one row of items
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from hijacklens.engine.reading import Reading
from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.prompts.layout import ID_BITS, mark
from hijacklens.prompts.prompt import Prompt, make_prompt
from hijacklens.prompts.schemes import Scheme, Unusable
from hijacklens.prompts.spans import TEXT
from hijacklens.prompts.tokens import (
    Continuation,
    LocatedPrompt,
    TokenIds,
    continuation,
    encode,
    locate,
)

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


Step: TypeAlias = tuple[TokenIds, int]
"""The symbols that stand before a token of a target, and that token."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt of a fact in symbols (see `hijacklens.prompts.layout`), with both targets.

    Without probes a symbol is a token id; with probes it also says in which of their spans the
    token stands.
    """

    fact: Fact
    prompt: Prompt
    ids: TokenIds
    true: tuple[Step, ...]
    false: tuple[Step, ...]

    @property
    def reads(self) -> Iterable[tuple[TokenIds, int | None]]:
        """Prefixes and the token wanted behind each; None where only the top one is."""
        yield self.ids, None
        yield from self.true
        yield from self.false


@dataclass(frozen=True, slots=True)
class Unscored:
    """A fact that a scheme, tokenizer or model could not serve at some dose, and why."""

    fact: Fact
    scheme: str
    reason: str


def skipped_table(
    rows: Iterable[Sequence[Any]], columns: Sequence[str] = SKIPPED_COLUMNS
) -> pd.DataFrame:
    """The table of what could not be scored; a record without a readable case id has none."""
    kinds: dict[str, Any] = {**dict.fromkeys(columns, str), "case_id": "Int64"}
    return pd.DataFrame(rows, columns=list(columns)).astype(kinds)


def read_skipped(path: Path, **options: Any) -> pd.DataFrame:
    """A `skipped.csv` as it was written.

    Only an empty cell is missing, and only a case id can be: a subject may be called "NA".
    """
    return pd.read_csv(
        path,
        keep_default_na=False,
        na_values={"case_id": [""]},
        dtype={**dict.fromkeys(SKIPPED_COLUMNS, str), "case_id": "Int64"},
        **options,
    )


def make_prompts(
    facts: FactSet, scheme: Scheme, doses: Sequence[int], *, seed: int
) -> tuple[list[tuple[Fact, Prompt]], list[Unscored]]:
    """The prompts of all facts at all doses, and the facts the scheme has no sentence for."""
    pools: dict[str, list[str]] = {}
    for fact in facts:
        pools.setdefault(fact.relation_id, []).append(fact.target_false)
    prompts: list[tuple[Fact, Prompt]] = []
    unscored: list[Unscored] = []
    for fact in facts:
        try:
            sentence = scheme.sentence(fact, pool=pools[fact.relation_id], seed=seed)
        except Unusable as reason:
            unscored.append(Unscored(fact, scheme.name, str(reason)))
            continue
        prompts.extend(
            (fact, make_prompt(fact, sentence=sentence, dose=dose, scheme=scheme.name))
            for dose in doses
        )
    return prompts, unscored


def make_items(
    prompts: Sequence[tuple[Fact, Prompt]],
    tokenizer: Any,
    *,
    context_length: int,
    spans: Sequence[str] = (),
) -> tuple[list[Item], list[Unscored]]:
    """Tokenise prompts and read both targets in context.

    Args:
        prompts: Facts with their prompts.
        tokenizer: The model's tokenizer.
        context_length: The most tokens that the model can be given.
        spans: Spans to mark in the symbols, as `hijacklens.probe.spans_of` gives them.

    A fact is scored at all doses of a scheme or at none, so that doses compare the same facts: if
    the prompt of one dose is longer than the context window, the fact is listed with that reason.
    """
    texts = list(
        dict.fromkeys(
            text
            for fact, prompt in prompts
            for text in (
                prompt.text,
                f"{prompt.text} {fact.target_true}",
                f"{prompt.text} {fact.target_false}",
            )
        )
    )
    ids = dict(zip(texts, encode(tokenizer, texts), strict=True))
    items: list[Item] = []
    unscored: dict[tuple[int, str], Unscored] = {}
    for fact, prompt in prompts:
        whole = ids[prompt.text]
        try:
            true, false = (
                continuation(whole, ids[f"{prompt.text} {target}"])
                for target in (fact.target_true, fact.target_false)
            )
            # The last token of a target is read, not run.
            longest = max(len(side.context) + len(side.target) - 1 for side in (true, false))
            longest = max(longest, len(whole))
            if longest > context_length:
                raise ValueError(
                    f"the prompt at dose {prompt.dose} has {longest} tokens, more than the "
                    f"model's context window of {context_length}"
                )
        except ValueError as reason:
            unscored.setdefault(
                (fact.case_id, prompt.scheme), Unscored(fact, prompt.scheme, str(reason))
            )
            continue
        located = locate(tokenizer, prompt) if spans else None
        items.append(
            Item(
                fact,
                prompt,
                whole if located is None else mark(whole, [located.positions(s) for s in spans]),
                steps_in_context(true, located, spans),
                steps_in_context(false, located, spans),
            )
        )
    kept = [item for item in items if (item.fact.case_id, item.prompt.scheme) not in unscored]
    return kept, list(unscored.values())


def steps_in_context(
    target: Continuation, prompt: LocatedPrompt | None, spans: Sequence[str]
) -> tuple[Step, ...]:
    """The steps of a target, in symbols.

    The tokens of a target that the model is given continue the query, and the answer is read at
    them too: they stand in `query`, `last` and `target`.
    """
    if prompt is None:
        return tuple(target.steps)
    n = len(target.context)
    answer = tuple(range(n, n + len(target.target)))
    more = {"query": answer, "target": answer, "last": (n - 1, *answer)}
    places = [
        (*(place for place in prompt.positions(span) if place < n), *more.get(span, ()))
        for span in spans
    ]
    symbols = mark(target.context + target.target, places)
    return tuple((symbols[: len(ids)], token) for ids, token in target.steps)


def require_found(items: Sequence[Item], spans: Sequence[str]) -> None:
    """Refuse a span by text that no prompt has: its probe would silently do nothing.

    Raises:
        InputError: There is such a span.
    """
    for bit, span in enumerate(spans):
        held = 1 << (ID_BITS + bit)
        asked = span.startswith(TEXT) and bool(items)
        if asked and not any(symbol & held for item in items for symbol in item.ids):
            raise InputError(
                f"the span {span!r} is in none of the {len(items)} prompts, such as "
                f"{items[-1].prompt.text!r}. Check its spelling."
            )


def wanted(items: Iterable[Item]) -> dict[TokenIds, set[int]]:
    """What the engine has to read for all items, each prefix once."""
    asked: dict[TokenIds, set[int]] = {}
    for item in items:
        for prefix, token in item.reads:
            asked.setdefault(prefix, set()).update(() if token is None else (token,))
    return asked


def prompt_table(items: Iterable[Item]) -> pd.DataFrame:
    """The texts behind the items: a row per fact and scheme, with the sentence that is repeated.

    The prompt at dose k is `" ".join([sentence] * k + [query])`. The sentence is empty where only
    the bare query was asked.
    """
    rows: dict[tuple[int, str], tuple[Any, ...]] = {}
    for item in items:
        fact, prompt = item.fact, item.prompt
        key = (fact.case_id, prompt.scheme)
        if key not in rows or (prompt.dose and not rows[key][2]):
            start, end = next(iter(prompt.spans["hijack"]), (0, 0))
            sentence = prompt.text[start:end]
            rows[key] = (*key, sentence, fact.prompt, fact.target_true, fact.target_false)
    return pd.DataFrame(list(rows.values()), columns=list(PROMPT_COLUMNS))


def score_items(
    items: Sequence[Item], readings: Mapping[TokenIds, Reading], *, model: str, tokenizer: Any
) -> tuple[pd.DataFrame, list[Unscored]]:
    """The rows of `items.parquet`; facts whose scores are not finite are listed apart."""
    names: dict[int, str] = {}
    rows: list[dict[str, Any]] = []
    unscored: dict[tuple[int, str], Unscored] = {}
    for item in items:
        sides = {
            name: [readings[prefix].logprobs[token] for prefix, token in steps]
            for name, steps in (("true", item.true), ("false", item.false))
        }
        here = readings[item.ids]
        if not all(math.isfinite(value) for values in sides.values() for value in values):
            reason = f"the model gave no finite log-probability at dose {item.prompt.dose}"
            key = (item.fact.case_id, item.prompt.scheme)
            unscored.setdefault(key, Unscored(item.fact, item.prompt.scheme, reason))
            continue
        if here.top_token not in names:
            names[here.top_token] = tokenizer.decode([here.top_token])
        rows.append(
            {
                "model": model,
                "case_id": item.fact.case_id,
                "relation_id": item.fact.relation_id,
                "subject": item.fact.subject,
                "scheme": item.prompt.scheme,
                "dose": item.prompt.dose,
                "first_true": sides["true"][0],
                "first_false": sides["false"][0],
                "sum_true": math.fsum(sides["true"]),
                "sum_false": math.fsum(sides["false"]),
                "n_tokens_true": len(sides["true"]),
                "n_tokens_false": len(sides["false"]),
                "top_token": names[here.top_token],
                "top_logprob": here.top_logprob,
                "same_first_token": item.true[0] == item.false[0],
            }
        )
    kept = [row for row in rows if (row["case_id"], row["scheme"]) not in unscored]
    return pd.DataFrame(kept, columns=list(ITEM_COLUMNS)), list(unscored.values())
