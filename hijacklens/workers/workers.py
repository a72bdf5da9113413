"""Workers: the engine on many GPUs and machines, each with a replica of the model.

    requests --cut_parts--> parts --to idle workers--> readings --> this process
                                                                    (one store, one result)

A worker is a Ray actor that loads the model by itself. Idle workers take the next part, the most
expensive first. When a worker dies (killed, out of memory, its machine gone), another one takes its
place and its part is read again; finished parts are kept. `ray.util.ActorPool` cannot do this: it
does not report which actor and which part an error belongs to. Every replica reports a fingerprint
with a hash of all weights, which must equal that of the first replica.

    engine = RayEngine(workers=2)
    hijack(model, facts, execution=Execution(engine=engine))    # a model that is loaded here, too
    hijack(ModelLoader("gpt2"), facts, execution=Execution(engine=engine))  # only in the workers
    with engine.replicas(ModelLoader("gpt2")) as replicas:      # kept for several runs
        hijack(replicas.loader, facts, execution=Execution(engine=replicas))
"""

from __future__ import annotations

import pickle
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from hijacklens.engine.packs import BATCH_TOKENS
from hijacklens.engine.reading import (
    Accounting,
    Finished,
    Readings,
    ReadOptions,
    Requests,
    ignore,
)
from hijacklens.errors import InputError, warn
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.models.identity import ModelIdentity, identify
from hijacklens.probe import Probe
from hijacklens.prompts.tokens import TokenIds
from hijacklens.store.fingerprint import KEYED, Fingerprint, fingerprint_of
from hijacklens.workers.cluster import Allocation, allocate, connected
from hijacklens.workers.replica import Description, ModelLoader, Replica

START_SECONDS = 1_800.0
"""How long to wait for the first replica."""

PATIENCE_SECONDS = 60.0
"""How long to wait before the waiting is explained."""


SLACK = 0.25
"""How far a cut may be moved to where prompts share less, as a fraction of the length of a part."""
PER_WORKER = 4
"""Minimum number of parts per worker, so that no worker waits long for the last one."""
MOST_BATCHES = 16
"""Maximum number of batches in a part, all of which are lost if its worker dies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayEngine:
    """An engine that runs replicas of a model on the workers of a Ray cluster."""

    workers: int | None = None
    """Number of workers; by default one per GPU, or one per four cores without GPUs."""
    address: str | None = None
    """Address of a cluster to join (`auto`, `10.0.0.1:6379`); by default this machine only."""
    gpus_per_worker: float | int | None = None
    """By default one if there are any; a replica with several GPUs is spread over them."""
    cpus_per_worker: float | int | None = None
    """By default one for a worker with a GPU, otherwise an equal part of the cores."""
    attempts: int = 3
    """How many workers may die during one part, or while loading the model, before the run ends."""

    @contextmanager
    def replicas(self, model: HookedLanguageModel | ModelLoader) -> Iterator[Replicas]:
        """Run the body with replicas of a model; their processes end with it.

        Args:
            model: How the model is loaded; or a model loaded here from a name or folder, whose
                weights the replicas must have.

        Raises:
            InputError: Ray is not installed, there is no room for the workers, or the model cannot
                be loaded there or is another one than here.

        Note:
            Costs loading the model in every worker, all at once, and a pass over its weights. The
            body starts when the first worker is ready.
        """
        loader = model if isinstance(model, ModelLoader) else ModelLoader.of(model)
        expected = None if isinstance(model, ModelLoader) else _local_fingerprint(model)
        with connected(self.address) as ray:
            gpus = self.gpus_per_worker
            if gpus is None and (loader.device == "cpu" or loader.devices > 1):
                gpus = 0 if loader.device == "cpu" else loader.devices
            allocation = allocate(
                ray.nodes(), workers=self.workers, cpus=self.cpus_per_worker, gpus=gpus
            )
            replicas = Replicas(ray, loader.sent(), allocation, attempts=self.attempts)
            try:
                replicas.start(expected)
                yield replicas
            finally:
                replicas.stop()


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the work."""

    requests: Requests
    cost: int
    """Tokens that it computes."""


@dataclass(frozen=True, slots=True)
class _Task:
    """What a worker is doing: reading a part of a run, or loading the model."""

    worker: Any
    part: Part | None = None
    options: ReadOptions | None = None


class Replicas:
    """Running workers with a replica each; `RayEngine.replicas` starts them."""

    identity: ModelIdentity
    """The identity of the model in all workers."""
    tokenizer: Any

    def __init__(
        self, ray: Any, loader: ModelLoader, allocation: Allocation, *, attempts: int
    ) -> None:
        """Start the processes."""
        self.loader = loader
        self.allocation = allocation
        self.workers: list[Any] = []
        self.replaced = 0
        self._ray = ray
        self._attempts = attempts
        self._placed = loader
        if allocation.gpus == 0:
            self._placed = replace(loader, device=loader.device or "cpu")
        elif allocation.gpus > 1:
            self._placed = replace(loader, device=None, devices=int(allocation.gpus))
        self._actor = ray.remote(Replica).options(
            num_cpus=allocation.cpus, num_gpus=allocation.gpus, max_restarts=0, max_task_retries=0
        )
        errors = ray.exceptions
        self._deadly = (
            errors.RayActorError,
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
            errors.NodeDiedError,
            errors.ObjectLostError,
        )
        self._running: dict[Any, _Task] = {}
        self._idle: list[Any] = []
        self._first: Any = None  # the description of the replica that was ready first
        self._deaths_at_start = 0
        for _ in range(allocation.workers):
            self._hire()

    def start(self, expected: Fingerprint | None = None) -> None:
        """Wait for the first replica; raise `InputError` if none starts or it is another model."""
        deadline = time.monotonic() + START_SECONDS
        if not self._ray.wait(list(self._running), timeout=PATIENCE_SECONDS)[0]:
            free, total = self._ray.available_resources(), self._ray.cluster_resources()
            room = ", ".join(
                f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s free"
                for kind in ("CPU", "GPU")
            )
            warn(
                f"no worker has loaded the model in {PATIENCE_SECONDS:.0f} seconds ({room} in the "
                f"cluster; a worker takes {self.allocation.cpus:g} and {self.allocation.gpus:g}). "
                f"Waiting for at most {START_SECONDS / 60:.0f} minutes.",
            )
        while not self._idle:
            self._next_answer(max(0.0, deadline - time.monotonic()))
        if expected is not None:
            _require_same(expected, self._first, "here")
        self.identity, self.tokenizer = self._first.identity, self._first.tokenizer

    def stop(self) -> None:
        """End the processes."""
        for worker in self.workers:
            self._ray.kill(worker)
        self.workers.clear()
        self._running.clear()
        self._idle.clear()

    def check(self, model: HookedLanguageModel | ModelLoader) -> None:
        """Raise `InputError` for a model other than the one in the workers."""
        if not isinstance(model, ModelLoader):
            _require_same(_local_fingerprint(model), self._first, "here")
        elif model.sent() != self.loader:
            raise InputError(f"the workers have the model of {self.loader}, not that of {model}.")

    def fingerprint(self, probes: Sequence[Probe], spans: Sequence[str]) -> Fingerprint:
        """Return the fingerprint of the model with probes on."""
        keys = tuple(probe.key for probe in probes)
        return replace(self._first.fingerprint, probes=keys, spans=tuple(spans))

    def read(
        self,
        requests: Mapping[TokenIds, Collection[int]],
        options: ReadOptions = ReadOptions(),
        finished: Finished = ignore,
    ) -> Readings:
        """Read next-token log-probabilities, as `hijacklens.engine.engine.read` does.

        `finished` is called in this process after each part. In the accounting, tokens and passes
        are summed over all workers, peak memory is the largest of any worker, and seconds are
        wall time in this process.

        Raises:
            InputError: As `read`; a probe that cannot be sent to another process; or a part during
                which several workers died. Finished parts are kept.
        """
        start = time.perf_counter()
        requests = Requests.of(requests)
        size = options.batch_tokens or BATCH_TOKENS.get(self.identity.device.split(":")[0], 1_024)
        count = count_parts(requests, workers=self.allocation.workers, batch_tokens=max(1, size))
        shared = options.sharing != "plain" and all(probe.packs for probe in options.probes)
        waiting = deque(cut_parts(requests, count, shared=shared))
        total = sum(part.cost for part in waiting)
        sent = self._send(options)
        readings = Readings(requests)
        accounts: list[Accounting] = []
        deaths: Counter[int] = Counter()
        replaced, unfinished = self.replaced, len(waiting)
        while unfinished:
            while waiting and self._idle:
                worker, part = self._idle.pop(), waiting.popleft()
                answer = worker.read.remote(sent, part.requests)
                self._running[answer] = _Task(worker, part, options)
            task, answer = self._next_answer()
            if task.part is None or task.options is not options:
                continue  # a worker has loaded the model, or ended a part of an interrupted run
            if isinstance(answer, str):
                deaths[id(task.part)] += 1
                if deaths[id(task.part)] >= self._attempts:
                    raise InputError(
                        f"{self._attempts} workers died one after the other of the same "
                        f"{len(task.part.requests)} prompts; the last: {answer} What other "
                        "workers finished is in the store, unless that was off, and the same call "
                        "resumes from there. If memory was short, use smaller batches or fewer "
                        "workers."
                    )
                waiting.append(task.part)
                continue
            unfinished -= 1
            readings.put(answer)
            accounts.append(answer.accounting)
            finished(answer, task.part.cost / total)
        how = f"{len(accounts)} parts on {self.allocation.workers} Ray workers"
        if self.replaced > replaced:
            how += f", {self.replaced - replaced} of them replaced"
        seconds = time.perf_counter() - start
        readings.accounting = Accounting.total(accounts, how, seconds)
        return readings

    def _send(self, options: ReadOptions) -> Any:
        try:
            return self._ray.put(options)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            keys = ", ".join(probe.key for probe in options.probes)
            raise InputError(
                f"the probes {keys} cannot be sent to workers ({error}). Use the engine local, or "
                "probes that hold only data, such as those of the package probes."
            ) from error

    def _hire(self) -> None:
        worker = self._actor.remote(self._placed, max(1, int(self.allocation.cpus)))
        self.workers.append(worker)
        self._running[worker.describe.remote()] = _Task(worker)

    def _next_answer(self, timeout: float | None = None) -> tuple[_Task, Any]:
        """Wait for the next answer, or the reason why a worker died and was replaced."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        if not ready:
            raise InputError(
                f"no worker has loaded the model in {START_SECONDS / 60:.0f} minutes. The cluster "
                "may be busy: ask for fewer workers, or wait until it is free."
            )
        task = self._running.pop(ready[0])
        try:
            answer = self._ray.get(ready[0])
        except self._deadly as error:
            return task, self._replace(task, error)
        except self._ray.exceptions.RayTaskError as error:
            self._idle.append(task.worker)
            raise error.cause from error
        if isinstance(answer, Description):
            self._first = self._first or answer
            _require_same(answer.fingerprint, self._first, f"on {answer.node}")
            self._deaths_at_start = 0
        self._idle.append(task.worker)
        return task, answer

    def _replace(self, task: _Task, error: Exception) -> str:
        """Start another worker in place of one that died; return why it died."""
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        self._ray.kill(task.worker)  # if only its answer was lost, it is still alive
        self.workers.remove(task.worker)
        if task.part is None:
            self._deaths_at_start += 1
            if self._deaths_at_start >= self._attempts * self.allocation.workers:
                raise InputError(
                    f"{self._deaths_at_start} workers died one after the other as they loaded the "
                    f"model {self.loader.source!r}; the last: {reason} If memory was short, use "
                    "fewer workers or a smaller dtype."
                ) from error
        self.replaced += 1
        self._hire()
        return reason


def _local_fingerprint(model: HookedLanguageModel) -> Fingerprint:
    """Return the fingerprint of a model in this process; refuse what workers may lack."""
    fingerprint = fingerprint_of(model, identify(model))
    if fingerprint.unkeyed:
        raise InputError(
            f"workers load the model by themselves and may lack {fingerprint.unkeyed[0]}. Remove "
            "it; or for hooks, pass probes=[HookProbe(name, hooks)]."
        )
    return fingerprint


def _require_same(fingerprint: Fingerprint, first: Description, where: str) -> None:
    """Refuse a model that differs from the first replica in anything that a reading depends on."""
    if fingerprint.key == first.fingerprint.key:
        return
    here, there = asdict(fingerprint), asdict(first.fingerprint)
    different = [name for name in KEYED if here[name] != there[name]]
    raise InputError(
        f"the model {fingerprint.model!r} {where} is not the one in the workers ({first.node}): "
        f"they differ in {', '.join(different)}. If it was changed after loading, save it with "
        "save_pretrained and load that folder; if folders differ between machines, copy it again."
    )


def cut_parts(requests: Requests, count: int, *, shared: bool = True) -> list[Part]:
    """Cut requests into at most `count` parts of similar cost, the most expensive first.

    Unless prompts share computed prefixes, every prefix is computed by itself. Costs the tree of
    the prefixes: half a second for the complete CounterFact at doses 0 to 5.
    """
    if not requests:
        return []
    trie = requests.trie
    overlap, first_read = trie.shared, trie.first_read
    alone = np.add.reduceat(trie.reads[:, 0], first_read[:-1])
    costs = trie.lengths - overlap if shared else alone
    cuts = _cuts(overlap, np.cumsum(costs), count)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(trie.leaves)], strict=True):
        rows = np.arange(first_read[start], first_read[stop])
        computed_again = overlap[start] if shared else 0
        cost = int(costs[start:stop].sum() + computed_again)
        parts.append(Part(requests.take(rows), cost))
    return sorted(parts, key=lambda part: -part.cost)


def count_parts(requests: Requests, *, workers: int, batch_tokens: int) -> int:
    """Return a number of parts that balances the workers without parts smaller than a batch."""
    tokens = requests.trie.nodes
    few, many = max(workers, tokens // batch_tokens), tokens // (MOST_BATCHES * batch_tokens) + 1
    return min(few, max(PER_WORKER * workers, many))


def _cuts(
    overlap: Int[np.ndarray, " leaf"], ends: Int[np.ndarray, " leaf"], count: int
) -> list[int]:
    """Return the first leaf of every part but the first."""
    length = ends[-1] / max(count, 1)
    cuts: list[int] = []
    for target in length * np.arange(1, count):
        low, high = np.searchsorted(ends, target + length * np.array([-SLACK, SLACK])) + 1
        low, high = max(int(low), cuts[-1] + 1 if cuts else 1), min(int(high) + 1, len(ends))
        if low < high:
            distance = np.abs(ends[low - 1 : high - 1] - target)
            cuts.append(low + int(np.lexsort((distance, overlap[low:high]))[0]))
    return cuts
