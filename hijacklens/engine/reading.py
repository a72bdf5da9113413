"""The engine's input and output: requests, options, readings, and the accounting of their cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from hijacklens.engine.packs import MOST_TOKENS
from hijacklens.engine.plan import Sharing
from hijacklens.engine.ragged import ranges
from hijacklens.engine.trie import Trie
from hijacklens.probe import Probe
from hijacklens.prompts.prefixes import WIDTH, Prefix, prefix_of, symbols_of
from hijacklens.prompts.tokens import TokenIds


class Requests(Mapping[TokenIds, Collection[int]]):
    """Prefix -> the tokens whose log-probability after the prefix is needed, as sorted columns."""

    def __init__(
        self,
        prefixes: Sequence[Prefix],
        tokens: Int[np.ndarray, " token"],
        starts: Int[np.ndarray, " starts"],
    ) -> None:
        """Take sorted prefixes; the tokens of prefix `i` begin at `starts[i]`."""
        self.prefixes = prefixes
        self.tokens = tokens
        self.starts = starts

    @classmethod
    def of(cls, requests: Mapping[TokenIds, Collection[int]]) -> Requests:
        """Return requests as columns."""
        if isinstance(requests, Requests):
            return requests
        rows = sorted((prefix_of(prefix), sorted(set(of))) for prefix, of in requests.items())
        counts = [len(tokens) for _, tokens in rows]
        tokens = [token for _, listed in rows for token in listed]
        return cls(
            [prefix for prefix, _ in rows], np.array(tokens, np.int64), np.cumsum([0, *counts])
        )

    def __len__(self) -> int:
        return len(self.prefixes)

    def __iter__(self) -> Iterator[TokenIds]:
        return map(symbols_of, self.prefixes)

    def __getitem__(self, prefix: TokenIds) -> list[int]:
        i = self.index(prefix)
        return self.tokens[self.starts[i] : self.starts[i + 1]].tolist()

    def index(self, prefix: TokenIds) -> int:
        """Return the index of a prefix; raise `KeyError` if it is not requested."""
        key = prefix_of(prefix)
        i = bisect_left(self.prefixes, key)
        if self.prefixes[i : i + 1] != [key]:
            raise KeyError(prefix)
        return i

    @property
    def lengths(self) -> Int[np.ndarray, " prefix"]:
        """The number of symbols of each prefix."""
        return np.fromiter(map(len, self.prefixes), np.int64, len(self)) // WIDTH

    @cached_property
    def trie(self) -> Trie:
        """The tree of the prefixes."""
        return Trie.of(self.prefixes)

    def where(
        self, rows: Int[np.ndarray, " row"]
    ) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " row"]]:
        """Return the indices in `tokens` of some prefixes, and how many tokens each has."""
        counts = np.diff(self.starts)[rows]
        return ranges(self.starts[rows], counts), counts

    def take(self, rows: Int[np.ndarray, " row"]) -> Requests:
        """Return the requests of the prefixes with these indices, which ascend."""
        if len(rows) == len(self):
            return self
        at, counts = self.where(rows)
        prefixes = [self.prefixes[i] for i in rows.tolist()]
        return Requests(prefixes, self.tokens[at], np.append(0, np.cumsum(counts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How requests are read."""

    probes: Sequence[Probe] = ()
    """They act on every row, in their order. If one of them does not pack, every prefix has a
    separate row, and the rows of a batch have equal length."""
    spans: Sequence[str] = ()
    """The spans that the bits of the symbols mark, in order of the bits."""
    sharing: Sharing = "auto"
    """How prompts share computed prefixes (`hijacklens.engine.plan`); by default the cheapest.
    Where sharing could give wrong numbers, `plain` is used instead."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; a longer row runs alone. By default what suits the
    device and its free memory."""
    pack_tokens: int = MOST_TOKENS
    """Maximum number of tokens in a row that holds several prompts."""
    temperature: float = 0.0
    """Above 0, the top token of a reading is drawn from the softmax at this temperature."""
    draw: tuple[int, int] = (0, 0)
    """Seed and number of the draw; with the prefix they fix it, whatever the batch."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model predicts after one prefix."""

    logprobs: Mapping[int, float]
    """Token id -> log-probability, in nats."""
    top_token: int
    top_logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """What a run computed, and what it would have cost without sharing."""

    sharing: str
    """`plain`, `packed` or `cached` (`hijacklens.engine.plan`); `none` if nothing was requested."""
    why: str
    """The reason for that sharing."""
    forward_tokens: int
    """Tokens that were computed, without padding."""
    padded_tokens: int
    """The same with padding."""
    naive_tokens: int
    """Tokens of all prompts, each computed by itself, with the target tokens they are given."""
    trie_tokens: int
    """Distinct nodes of the trie of all prompts: the fewest tokens that any run can compute."""
    passes: int
    """Forward passes."""
    batch_tokens: int
    """Size of a batch in tokens, at the end of the run."""
    shrunk: int
    """How often memory ran out and batches were made smaller."""
    seconds: float
    """Wall time from the plan to the last reading."""
    peak_memory: int
    """Peak bytes, of torch on a GPU or of this process on a CPU, since it started."""

    @classmethod
    def total(cls, parts: Sequence[Accounting], how: str, seconds: float) -> Accounting:
        """Combine the parts of a run on workers; `how` it was spread follows the reason `why`."""
        main = max(parts, key=lambda part: part.forward_tokens, default=None)
        summed = ("forward_tokens", "padded_tokens", "naive_tokens", "trie_tokens", "passes")
        return cls(
            sharing=main.sharing if main else "none",
            why=f"{main.why}; {how}" if main else "nothing was requested",
            **{name: sum(getattr(part, name) for part in parts) for name in (*summed, "shrunk")},
            batch_tokens=min((part.batch_tokens for part in parts), default=0),
            seconds=round(seconds, 3),
            peak_memory=max((part.peak_memory for part in parts), default=0),
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed per second, without padding."""
        return self.forward_tokens / self.seconds if self.seconds else 0.0

    def record(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return {**asdict(self), "tokens_per_second": round(self.tokens_per_second, 1)}

    def summary(self) -> str:
        """Describe the run in one line for people."""
        naive = f"{self.naive_tokens:,}"
        if not self.forward_tokens:
            return f"nothing had to be computed ({naive} tokens with every prompt by itself)"
        small = f", batches shrunk {self.shrunk} times" if self.shrunk else ""
        return (
            f"{self.forward_tokens:,} tokens computed; every prompt by itself has {naive}, with "
            f"shared beginnings {self.trie_tokens:,} at best; engine: {self.sharing} ({self.why}); "
            f"{self.tokens_per_second:,.0f} tokens/s, peak memory "
            f"{self.peak_memory / 2**20:,.0f} MiB{small}"
        )


class Readings(Mapping[TokenIds, Reading]):
    """The readings of requests, as columns in their order."""

    accounting: Accounting
    """The cost of a run."""

    def __init__(
        self,
        requests: Requests,
        logprobs: Float[np.ndarray, " token"] | None = None,
        tops: Float[np.ndarray, "prefix 2"] | None = None,
    ) -> None:
        """Take the columns; by default nothing is read yet, and the likeliest tokens are -1.

        Args:
            requests: The requests.
            logprobs: The log-probabilities of `requests.tokens`, in nats.
            tops: The likeliest token of each prefix and its log-probability.
        """
        self.requests = requests
        self.logprobs = np.full(len(requests.tokens), np.nan) if logprobs is None else logprobs
        self.tops = np.full((len(requests), 2), -1.0) if tops is None else tops

    @classmethod
    def of(cls, readings: Mapping[TokenIds, Reading]) -> Readings:
        """Return readings as columns."""
        if isinstance(readings, Readings):
            return readings
        requests = Requests.of({prefix: of.logprobs for prefix, of in readings.items()})
        rows = [readings[prefix] for prefix in requests]
        logprobs = [row.logprobs[token] for row in rows for token in sorted(row.logprobs)]
        tops = [(row.top_token, row.top_logprob) for row in rows]
        return cls(requests, np.array(logprobs, float), np.array(tops, float).reshape(-1, 2))

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[TokenIds]:
        return iter(self.requests)

    def __getitem__(self, prefix: TokenIds) -> Reading:
        i = self.requests.index(prefix)
        own = slice(*self.requests.starts[i : i + 2].tolist())
        values = dict(
            zip(self.requests.tokens[own].tolist(), self.logprobs[own].tolist(), strict=True)
        )
        token, logprob = self.tops[i].tolist()
        return Reading(values, int(token), logprob)

    def take(self, rows: Int[np.ndarray, " row"]) -> Readings:
        """Return the readings of the prefixes with these indices, which ascend."""
        at, _ = self.requests.where(rows)
        return Readings(self.requests.take(rows), self.logprobs[at], self.tops[rows])

    def put(self, part: Readings) -> None:
        """Take over the readings of some of the requests."""
        row_of = {prefix: i for i, prefix in enumerate(self.requests.prefixes)}
        rows = np.array([row_of[prefix] for prefix in part.requests.prefixes], np.int64)
        self.logprobs[self.requests.where(rows)[0]] = part.logprobs
        self.tops[rows] = part.tops


Finished: TypeAlias = Callable[[Readings, float], object]
"""Called after each batch or part with its readings and the fraction of the work that it was."""


def ignore(readings: Readings, fraction: float) -> None:
    """Do nothing with finished readings: the default of `Finished` callbacks."""
