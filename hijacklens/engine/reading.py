"""Requests, options and readings: the engine's input and output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hijacklens.engine.accounting import Accounting
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
