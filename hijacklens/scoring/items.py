"""Items: one fact under one scheme at one dose, from its text to the two scores.

Fact --scheme--> Prompt --tokens--> requests --engine--> readings --> one row of items.parquet
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Int

from hijacklens.engine.reading import Readings, Requests
from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, Skipped
from hijacklens.garbage import no_collection
from hijacklens.prompts.layout import ID_BITS, TOKEN_MASK, mark
from hijacklens.prompts.prefixes import WIDTH, Prefix, prefix_of, symbols_of
from hijacklens.prompts.prompt import Prompt
from hijacklens.prompts.spans import TEXT
from hijacklens.prompts.tokens import (
    Continuation,
    LocatedPrompt,
    TokenIds,
    WordByWord,
    locate,
    require_known,
    split_at,
)
from hijacklens.prompts.wordings import Prompts, Unscored, Wording
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
SKIPPED_COLUMNS = ("model", "case_id", "relation_id", "subject", "scheme", "reason")
_SKIPPED_TYPES: dict[str, Any] = {**dict.fromkeys(SKIPPED_COLUMNS, str), "case_id": "Int64"}
SkippedTable: TypeAlias = Annotated[pd.DataFrame, Stored("skipped.csv", dtypes=_SKIPPED_TYPES)]
"""The field of a result that lists what could not be scored, with the reason."""
Step: TypeAlias = tuple[TokenIds, int]
"""The symbols before a token of a target, and that token."""
Row: TypeAlias = tuple[Prefix, Sequence[Prefix], tuple[int, int]]
"""A prompt, and the prompt with each target, and the number of symbols before each target."""
ANSWER_SPANS = ("query", "target", "last")
"""The spans of an answer: its tokens continue the query, and the next token is read at them."""
AT_ONCE = 5_000
"""Prompts that are tokenised together."""


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


class Items(Sequence[Item]):
    """The items of prompts, in columns; an `Item` is made when looked up.

    The prefixes that items read are numbered in the order in which they first occur.
    """

    def __init__(self, doses: Sequence[int]) -> None:
        """Begin without items."""
        self.prompts = Prompts([], doses)
        self.naive_tokens = 0
        """Tokens of all items, each computed by itself, with the target tokens they are given."""
        self._ids: dict[Prefix, int] = {}
        self._of_prompt: list[int] = []  # of each item: the number of its prefix
        self._steps: list[int] = []  # of each item: steps of the true and of the false target
        self._ends: list[tuple[int, int]] = []  # of each item: its `prompt_ends`
        self._of_step: list[int] = []  # of each step: the number of its prefix
        self._symbols: list[Prefix] = []  # of each step: the symbol that follows it

    def add(self, wording: Wording, rows: Iterable[Row]) -> None:
        """Add the items of a wording, one for each dose."""
        self.prompts.wordings.append(wording)  # type: ignore[attr-defined]
        ids = self._ids
        for prompt, targets, starts in rows:
            self._of_prompt.append(ids.setdefault(prompt, len(ids)))
            longest = {prompt}
            start = min(starts)
            for target in targets:
                step = prompt
                for n in range(WIDTH * start, len(target), WIDTH):
                    step = target[:n]
                    self._of_step.append(ids.setdefault(step, len(ids)))
                    self._symbols.append(target[n : n + WIDTH])
                longest.add(step)
                self._steps.append(len(target) // WIDTH - start)
            self._ends.append((starts[0] - start, starts[1] - start))
            for one, following in pairwise([*sorted(longest), b""]):
                if not following.startswith(one):
                    self.naive_tokens += len(one) // WIDTH

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        i = range(len(self))[index]
        first, middle, last = self._starts[2 * i : 2 * i + 3].tolist()
        before = [symbols_of(self._prefixes[read]) for read in self._of_step[first:last]]
        steps = tuple(zip(before, self._tokens[first:last].tolist(), strict=True))
        ids = symbols_of(self._prefixes[self._of_prompt[i]])
        middle -= first
        return Item(*self.prompts[i], ids, steps[:middle], steps[middle:], self._ends[i])

    @cached_property
    def _prefixes(self) -> list[Prefix]:
        return list(self._ids)

    @cached_property
    def _tokens(self) -> Int[np.ndarray, " step"]:
        """The token that follows each step."""
        symbols = np.frombuffer(b"".join(self._symbols), ">i8")
        return symbols.astype(np.int64) & TOKEN_MASK

    @cached_property
    def _starts(self) -> Int[np.ndarray, " starts"]:
        """The first step of every target."""
        return np.cumsum([0, *self._steps])

    @cached_property
    def _requested(self) -> tuple[Requests, Int[np.ndarray, " item"], Int[np.ndarray, " step"]]:
        """The requests, and the indices of the prompts in their prefixes, of steps in tokens."""
        order = np.array(sorted(range(len(self._ids)), key=self._prefixes.__getitem__), np.int64)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        keys = (rank[self._of_step] << ID_BITS) | self._tokens
        pairs, of_step = np.unique(keys, return_inverse=True)
        starts = np.searchsorted(pairs, np.arange(len(order) + 1) << ID_BITS)
        prefixes = [self._prefixes[i] for i in order.tolist()]
        return Requests(prefixes, pairs & TOKEN_MASK, starts), rank[self._of_prompt], of_step

    @property
    def requests(self) -> Requests:
        """What the engine has to read for all items, each prefix once."""
        return self._requested[0]

    def score(
        self, readings: Readings, *, model: str, tokenizer: Any
    ) -> tuple[pd.DataFrame, list[Unscored]]:
        """Return the rows of `items.parquet`, and the facts whose scores are not finite.

        Args:
            readings: The readings of `requests`.
            model: The name of the model.
            tokenizer: Writes out the likeliest next tokens.
        """
        if not len(self):
            return pd.DataFrame(columns=list(ITEM_COLUMNS)), []
        _, of_prompt, of_step = self._requested
        logprobs, starts = readings.logprobs[of_step], self._starts[:-1].reshape(-1, 2)
        sums = np.add.reduceat(logprobs, starts.ravel()).reshape(-1, 2)
        firsts, ends = logprobs[starts], np.array(self._ends)
        for i, side in np.argwhere(ends):
            firsts[i, side] = logprobs[starts[i, side] :][: ends[i, side] + 1].sum()
        counts = np.array(self._steps).reshape(-1, 2) - ends
        same = of_step[starts[:, 0]] == of_step[starts[:, 1]]
        tops, which = np.unique(readings.tops[of_prompt, 0].astype(int), return_inverse=True)
        texts = np.array([tokenizer.decode([token]) for token in tops.tolist()], dtype=object)
        wordings, doses = self.prompts.wordings, self.prompts.doses
        columns = [(w.fact.case_id, w.fact.relation_id, w.fact.subject, w.scheme) for w in wordings]
        names = ITEM_COLUMNS[1:5]
        table = pd.DataFrame(columns, columns=list(names)).loc[
            np.repeat(np.arange(len(wordings)), len(doses))
        ]
        table = table.reset_index(drop=True).assign(
            model=model,
            dose=np.tile(doses, len(wordings)),
            first_true=firsts[:, 0],
            first_false=firsts[:, 1],
            sum_true=sums[:, 0],
            sum_false=sums[:, 1],
            n_tokens_true=counts[:, 0],
            n_tokens_false=counts[:, 1],
            top_token=texts[which],
            top_logprob=readings.tops[of_prompt, 1],
            same_first_token=same,
        )
        finite = np.isfinite(sums).all(axis=1).reshape(-1, len(doses))
        unscored = [
            Unscored(
                wordings[i].fact,
                wordings[i].scheme,
                "the model gave no finite log-probability at dose "
                f"{doses[int(finite[i].argmin())]}",
            )
            for i in np.flatnonzero(~finite.all(axis=1)).tolist()
        ]
        kept = np.repeat(finite.all(axis=1), len(doses))
        return table.loc[kept, list(ITEM_COLUMNS)].reset_index(drop=True), unscored


@no_collection()
def make_items(
    prompts: Prompts,
    tokenizer: Any,
    *,
    context_length: int,
    vocabulary: int | None = None,
    spans: Sequence[str] = (),
    tokenised: Callable[[int], object] = lambda count: None,
) -> tuple[Items, list[Unscored]]:
    """Tokenise prompts and targets in context.

    Args:
        prompts: As `make_prompts` returns them.
        tokenizer: A Hugging Face tokenizer.
        context_length: The model's context window, in tokens.
        vocabulary: Number of token ids that the model knows; None if unknown.
        spans: Spans to mark in the symbols, as `hijacklens.probe.spans_of` returns them.
        tokenised: Called with a number of prompts when these are done.

    Returns:
        The items, and the facts that cannot be scored. If the prompt of one dose exceeds the
        context window, the fact is left out at all doses, so that doses compare the same facts.
    """
    templated = any(wording.facts.chat for wording in prompts.wordings[:1])
    words = WordByWord(tokenizer, templated=templated)
    items, unscored = Items(prompts.doses), []
    doses, size = prompts.doses, max(1, AT_ONCE // len(prompts.doses))
    for first in range(0, len(prompts.wordings), size):
        part = prompts.wordings[first : first + size]
        ids = words.encode([texts for wording in part for texts in wording.texts(doses)])
        # One look at all ids, so that single texts are checked only if one of them is too large.
        largest = np.frombuffer(b"".join(ids), ">i8").max(initial=0)
        exceeded = vocabulary if vocabulary is not None and largest >= vocabulary else None
        for i, wording in enumerate(part):
            rows = [ids[j : j + 3] for j in range(3 * len(doses) * i, 3 * len(doses) * (i + 1), 3)]
            try:
                starts = [
                    _starts(row, dose, context_length, exceeded)
                    for row, dose in zip(rows, doses, strict=True)
                ]
            except ValueError as reason:
                unscored.append(Unscored(wording.fact, wording.scheme, str(reason)))
                continue
            found: list[Row] = []
            for (prompt, *targets), both, dose in zip(rows, starts, doses, strict=True):
                if spans:
                    located = locate(tokenizer, wording.prompt(dose))
                    marked = [located.positions(span) for span in spans]
                    prompt = prefix_of(mark(symbols_of(prompt), marked))
                    targets = [
                        prefix_of(_marked(symbols_of(x), min(both), located, spans))
                        for x in targets
                    ]
                found.append((prompt, targets, both))
            items.add(wording, found)
        tokenised(len(part) * len(doses))
    return items, unscored


def _starts(
    ids: Sequence[Prefix], dose: int, context_length: int, vocabulary: int | None
) -> tuple[int, int]:
    """Return the number of tokens before each target; raise `ValueError` if it cannot be scored."""
    prompt, true, false = ids
    starts = split_at(prompt, true), split_at(prompt, false)
    for text in ids if vocabulary is not None else ():
        require_known(symbols_of(text), vocabulary)
    # The model predicts the last token of a target but is not given it.
    longest = max(len(prompt), len(true) - WIDTH, len(false) - WIDTH) // WIDTH
    if longest > context_length:
        raise ValueError(
            f"the prompt at dose {dose} has {longest} tokens, more than the model's context "
            f"window of {context_length}"
        )
    return starts


def steps_in_context(
    target: Continuation, prompt: LocatedPrompt | None, spans: Sequence[str]
) -> tuple[Step, ...]:
    """Return the steps of a target, in symbols, which mark spans of a prompt if there is one."""
    if prompt is None:
        return tuple(target.steps)
    symbols = _marked(target.context + target.target, len(target.context), prompt, spans)
    return tuple((symbols[: len(ids)], token) for ids, token in target.steps)


def _marked(ids: TokenIds, start: int, prompt: LocatedPrompt, spans: Sequence[str]) -> TokenIds:
    """Return the symbols of a prompt with a target that begins at `start`."""
    answer = tuple(range(start, len(ids)))
    of_target = {**dict.fromkeys(ANSWER_SPANS, answer), "last": (start - 1, *answer)}
    positions = [
        (*(i for i in prompt.positions(span) if i < start), *of_target.get(span, ()))
        for span in spans
    ]
    return mark(ids, positions)


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
