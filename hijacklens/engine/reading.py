"""The engine's input and output: requests, options, readings, and the accounting of their cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from hijacklens.engine.packs import MOST_TOKENS
from hijacklens.engine.plan import Sharing
from hijacklens.probe import Probe
from hijacklens.prompts.tokens import TokenIds

Requests: TypeAlias = Mapping[TokenIds, Collection[int]]
"""Prefix -> the tokens whose log-probability after the prefix is needed."""


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


class Readings(dict[TokenIds, Reading]):
    """The readings of a run by prefix, with the accounting of their cost."""

    def __init__(self, readings: Mapping[TokenIds, Reading], accounting: Accounting) -> None:
        """Combine readings with their accounting."""
        super().__init__(readings)
        self.accounting = accounting


Finished: TypeAlias = Callable[[Mapping[TokenIds, Reading], float], object]
"""Called after each batch or part with its readings and the fraction of the work that it was."""


def ignore(readings: Mapping[TokenIds, Reading], fraction: float) -> None:
    """Do nothing with finished readings: the default of `Finished` callbacks."""
