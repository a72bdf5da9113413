"""TODO."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from hijacklens.engine.accounting import Accounting
from hijacklens.prompts.tokens import TokenIds

Wanted: TypeAlias = Mapping[TokenIds, Collection[int]]
"""Prefix -> the tokens whose log-probability behind it is wanted."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model says behind one prefix."""

    logprobs: Mapping[int, float]
    """Token id -> log-probability, in nats."""
    top_token: int
    top_logprob: float


class Readings(dict[TokenIds, Reading]):
    """The readings of a run by their prefixes, and what it took."""

    def __init__(self, found: Mapping[TokenIds, Reading], accounting: Accounting) -> None:
        """Take readings with their accounting."""
        super().__init__(found)
        self.accounting = accounting
