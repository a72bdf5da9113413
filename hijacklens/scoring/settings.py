"""The settings that results record: the same model, facts and scheme have the same shape in all.

Results with a prompt pair per fact derive their settings from `PairSettings`, those of one fact
from `ProbedSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer

from hijacklens.engine.accounting import Accounting
from hijacklens.facts.fact import FactsRecord
from hijacklens.models.identity import ModelIdentity
from hijacklens.prompts.schemes import SchemeRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingCounts:
    """Where the readings of a run came from."""

    computed: int
    from_store: int
    store: str
    """Path of the store; empty if it was not used."""
    store_off: str
    """Why the store was not used; empty if it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredModel(ModelIdentity):
    """A model that scored facts, and the cost."""

    readings: ReadingCounts
    engine: Annotated[Accounting, PlainSerializer(Accounting.record)]


@dataclass(frozen=True, slots=True, kw_only=True)
class HijackSettings:
    """The settings of `hijacklens.hijack`."""

    models: tuple[ScoredModel, ...]
    facts: FactsRecord
    schemes: tuple[SchemeRecord, ...]
    doses: tuple[int, ...]
    probes: tuple[str, ...]
    """Keys of the probes, in their order."""
    seed: int
    unfinished: Mapping[str, Any] | None = None
    """For a run over several models that was cut short: the models `asked` and `missing`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedSettings:
    """One model under one scheme, with probes."""

    model: ModelIdentity
    scheme: SchemeRecord
    probes: tuple[str, ...] = ()
    """Keys of the probes, in their order."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings(ProbedSettings):
    """Facts, each with a bare and a hijacked prompt."""

    facts: FactsRecord
    dose: int
