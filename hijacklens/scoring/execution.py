"""How a run is computed: on which engine, with which store, in which batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hijacklens.engine.engine import read
from hijacklens.engine.plan import SHARINGS, Sharing
from hijacklens.engine.reading import Finished, Readings, ReadOptions, Requests, ignore
from hijacklens.errors import InputError, choice, strict, whole_number
from hijacklens.models.agreement import comparing_once
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.models.identity import ModelIdentity, identify
from hijacklens.probe import Probe
from hijacklens.store.contents import Store, chosen_store
from hijacklens.store.fingerprint import Fingerprint, fingerprint_of
from hijacklens.store.store import OpenStore, open_store
from hijacklens.workers.replica import ModelLoader
from hijacklens.workers.workers import RayEngine, Replicas


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How scores are computed; in float32 no setting changes a score by more than 1e-4 nats.

    Raises:
        InputError: An unknown sharing or engine, a batch size below 1, or a store other than a
            `Store`, a path or a truth value.

    >>> Execution(sharing="packed", store=False)
    Execution(sharing='packed', engine='local', store=False, batch_tokens=None)
    """

    sharing: Sharing = "auto"
    """How prompts share computed prefixes: `plain`, `packed`, `cached`, or `auto`, which takes the
    cheapest of the three (`hijacklens.engine.plan`)."""
    engine: str | RayEngine | Replicas | LocalModel = "local"
    """`"local"` runs the model in this process, a `RayEngine` on workers that each load the model;
    `Replicas` are workers that are already running (`hijacklens.workers.workers`), and a
    `LocalModel` is a model whose weights are known (`held`)."""
    store: Store | str | Path | bool = True
    """Where finished readings are kept and looked up, so that an interrupted run resumes and
    nothing is computed twice: True for the file in the cache folder, False for no store, or a path
    or a `Store`."""
    batch_tokens: int | None = None
    """Tokens in a batch, padding included; by default what suits the device and its free RAM."""

    def __post_init__(self) -> None:
        choice("sharing", self.sharing, SHARINGS)
        if not isinstance(self.engine, (RayEngine, Replicas, LocalModel)):
            choice("engine", self.engine, ["local"], "Or pass a RayEngine(...).")
        chosen_store(self.store)
        if self.batch_tokens is not None:
            size = whole_number("batch_tokens", self.batch_tokens, least=1)
            object.__setattr__(self, "batch_tokens", size)

    @contextmanager
    def running(self, model: HookedLanguageModel | ModelLoader) -> Iterator[LocalModel | Replicas]:
        """Run the body with the model ready on its engine.

        Nothing may change the weights in the body: they are hashed, and the hooked model is
        compared with its plain modules, only once.

        Raises:
            InputError: The model cannot be loaded, there is no room for the workers, or running
                workers have another model.
        """
        if isinstance(self.engine, RayEngine):
            with self.engine.replicas(model) as replicas:
                yield replicas
        elif isinstance(self.engine, Replicas):
            self.engine.check(model)
            yield self.engine
        elif isinstance(self.engine, LocalModel):
            if model is not self.engine.model:
                raise InputError(f"this execution is held for {self.engine.identity.name}.")
            yield self.engine
        else:
            loaded = model.load() if isinstance(model, ModelLoader) else model
            identity = identify(loaded)
            with comparing_once(loaded):
                yield LocalModel(loaded, identity)

    @contextmanager
    def held(self, model: HookedLanguageModel) -> Iterator[Execution]:
        """Let several runs of a model share its engine, which starts once, and its hashed weights.

        Nothing may change the weights meanwhile.

        Raises:
            InputError: As `running`.
        """
        with self.running(model) as run:
            yield replace(self, engine=run)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model in this process, with the members that a run needs of `Replicas`."""

    model: HookedLanguageModel
    identity: ModelIdentity

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    def fingerprint(self, probes: Sequence[Probe], spans: Sequence[str]) -> Fingerprint:
        """Return the fingerprint with probes on."""
        return fingerprint_of(self.model, self.identity, probes=probes, spans=spans)

    def read(self, requests: Requests, options: ReadOptions, finished: Finished) -> Readings:
        """Read log-probabilities (`hijacklens.engine.engine.read`)."""
        return read(self.model, requests, options, finished)


def read_stored(
    run: LocalModel | Replicas,
    requests: Requests,
    options: ReadOptions,
    store: Store | str | Path | bool,
    advance: Callable[[float], object] = lambda fraction: None,
) -> tuple[Readings, Readings, OpenStore]:
    """Return all readings, those of them that the store lacked, and the store, which keeps them.

    `advance` is called with the fraction of the requests that a step has finished.
    """
    readings = Readings(requests)
    with open_store(store, lambda: run.fingerprint(options.probes, options.spans)) as kept:
        readings.put(kept.find_checked(requests, lambda few: run.read(few, options, ignore)))
        missing = requests.take(np.flatnonzero(readings.tops[:, 0] < 0))
        part = len(missing) / max(1, len(requests))
        advance(1 - part)

        def finished(found: Readings, fraction: float) -> None:
            kept.keep(found)
            advance(fraction * part)

        computed = run.read(missing, options, finished)
    readings.put(computed)
    return readings, computed, kept
