"""Workers: the engine on many GPUs and machines, each with a replica of the model.

    requests --cut_parts--> parts --to idle workers--> readings --> this process
                                                                    (one store, one result)

A worker is a Ray actor that loads the model by itself. Idle workers take the next part, the most
expensive first. When a worker dies (killed, out of memory, its machine gone), another one takes its
place and its part is read again; finished parts are kept. `ray.util.ActorPool` cannot do this: it
does not report which actor and which part an error belongs to. Every replica reports a fingerprint
with a checksum of all weights, which must equal that of the first replica.

    engine = RayEngine(workers=2)
    hijack(model, facts, execution=Execution(engine=engine))    # a model that is loaded here, too
    hijack(ModelLoader("gpt2"), facts, execution=Execution(engine=engine))  # only in the workers
    with engine.replicas(ModelLoader("gpt2")) as replicas:      # kept for several runs
        hijack(replicas.loader, facts, execution=Execution(engine=replicas))
"""

from __future__ import annotations

import pickle
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

from hijacklens.engine.packs import BATCH_TOKENS
from hijacklens.engine.reading import (
    Accounting,
    Finished,
    Reading,
    Readings,
    ReadOptions,
    Requests,
    ignore,
)
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedLanguageModel, unnamed_hooks
from hijacklens.models.identity import ModelIdentity, identify
from hijacklens.probe import Probe
from hijacklens.prompts.tokens import TokenIds
from hijacklens.store.fingerprint import Fingerprint, fingerprint_of
from hijacklens.workers.cluster import Allocation, allocate, connected
from hijacklens.workers.parts import Part, count_parts, cut_parts
from hijacklens.workers.replica import Description, ModelLoader, Replica

START_SECONDS = 1_800.0
"""How long to wait for the first replica."""

PATIENCE_SECONDS = 60.0
"""How long to wait before the waiting is explained."""


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
            if gpus is None and loader.device == "cpu":
                gpus = 0
            elif gpus is None and loader.devices > 1:
                gpus = loader.devices
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
class _Task:
    """What a worker is doing: reading a part of a run, or loading the model."""

    worker: Any
    part: Part | None = None
    options: ReadOptions | None = None


@dataclass(frozen=True, slots=True)
class _Death:
    """The reason why a worker died, in place of its answer."""

    reason: str


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
        if allocation.gpus == 0:
            loader = replace(loader, device=loader.device or "cpu")
        elif allocation.gpus > 1:
            loader = replace(loader, device=None, devices=int(allocation.gpus))
        self._placed = loader
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
        self._first: Description | None = None
        self._deaths_at_start = 0
        for _ in range(allocation.workers):
            self._hire()

    def start(self, expected: Fingerprint | None = None) -> None:
        """Wait for the first replica.

        Raises:
            InputError: The model cannot be loaded or is not the expected one, or no worker starts.
        """
        deadline = time.monotonic() + START_SECONDS
        if not self._ray.wait(list(self._running), timeout=PATIENCE_SECONDS)[0]:
            free, total = self._ray.available_resources(), self._ray.cluster_resources()
            room = ", ".join(
                f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s free"
                for kind in ("CPU", "GPU")
            )
            warnings.warn(
                f"no worker has loaded the model in {PATIENCE_SECONDS:.0f} seconds ({room} in the "
                f"cluster; a worker takes {self.allocation.cpus:g} and {self.allocation.gpus:g}). "
                f"Waiting for at most {START_SECONDS / 60:.0f} minutes.",
                stacklevel=2,
            )
        while not self._idle:
            self._next_answer(max(0.0, deadline - time.monotonic()))
        assert self._first is not None
        if expected is not None:
            _require_same(expected, self._first, "here")
        self.identity = self._first.identity
        self.tokenizer = self._first.tokenizer

    def stop(self) -> None:
        """End the processes."""
        for worker in self.workers:
            self._ray.kill(worker)
        self.workers.clear()
        self._running.clear()
        self._idle.clear()

    def check(self, model: HookedLanguageModel | ModelLoader) -> None:
        """Refuse a model other than the one in the workers.

        Raises:
            InputError: It is another model.
        """
        assert self._first is not None
        if not isinstance(model, ModelLoader):
            _require_same(_local_fingerprint(model), self._first, "here")
        elif model.sent() != self.loader:
            raise InputError(f"the workers have the model of {self.loader}, not that of {model}.")

    def fingerprint(self, probes: Sequence[Probe], spans: Sequence[str]) -> Fingerprint:
        """Return the fingerprint of the model with probes on."""
        assert self._first is not None
        keys = tuple(probe.key for probe in probes)
        return replace(self._first.fingerprint, probes=keys, spans=tuple(spans))

    def read(
        self,
        requests: Requests,
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
        size = options.batch_tokens or BATCH_TOKENS.get(self.identity.device.split(":")[0], 1_024)
        count = count_parts(requests, workers=self.allocation.workers, batch_tokens=max(1, size))
        shared = options.sharing != "plain" and all(probe.packs for probe in options.probes)
        waiting = deque(cut_parts(requests, count, shared=shared))
        total = sum(part.cost for part in waiting)
        sent = self._send(options)
        readings: dict[TokenIds, Reading] = {}
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
            if isinstance(answer, _Death):
                deaths[id(task.part)] += 1
                if deaths[id(task.part)] >= self._attempts:
                    raise InputError(
                        f"{self._attempts} workers died one after the other of the same "
                        f"{len(task.part.requests)} prompts; the last: {answer.reason} What other "
                        "workers finished is in the store, unless that was off, and the same call "
                        "resumes from there. If memory was short, use smaller batches or fewer "
                        "workers."
                    )
                waiting.append(task.part)
                continue
            unfinished -= 1
            readings.update(answer)
            accounts.append(answer.accounting)
            finished(answer, task.part.cost / total)
        how = f"{len(accounts)} parts on {self.allocation.workers} Ray workers"
        if self.replaced > replaced:
            how += f", {self.replaced - replaced} of them replaced"
        seconds = time.perf_counter() - start
        return Readings(readings, Accounting.total(accounts, how, seconds))

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
        worker = self._actor.remote(self._placed, self.allocation.threads)
        self.workers.append(worker)
        self._running[worker.describe.remote()] = _Task(worker)

    def _next_answer(self, timeout: float | None = None) -> tuple[_Task, Any]:
        """Wait for the next answer; its worker is then idle, or has been replaced."""
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

    def _replace(self, task: _Task, error: Exception) -> _Death:
        """Start another worker in place of one that died."""
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
        return _Death(reason)


def _local_fingerprint(model: HookedLanguageModel) -> Fingerprint:
    """Return the fingerprint of a model in this process.

    Raises:
        InputError: Hooks are on it that the workers would not have.
    """
    if unnamed_hooks(model):
        raise InputError(
            "hooks that are not probes are on the model, and workers do not have them. Remove "
            "them, or pass probes=[HookProbe(name, hooks)]."
        )
    return fingerprint_of(model, identify(model))


def _require_same(fingerprint: Fingerprint, first: Description, where: str) -> None:
    """Refuse a model that differs from the first replica in anything that a reading depends on."""
    if fingerprint.key == first.fingerprint.key:
        return
    names = ("architecture", "parameters", "arithmetic", "weights", "configuration", "tokenizer")
    different = [
        field.name
        for field in fields(Fingerprint)
        if field.name in names
        and getattr(fingerprint, field.name) != getattr(first.fingerprint, field.name)
    ]
    raise InputError(
        f"the model {fingerprint.model!r} {where} is not the one in the workers ({first.node}): "
        f"they differ in {', '.join(different)}. If it was changed after loading, save it with "
        "save_pretrained and load that folder; if folders differ between machines, copy it again."
    )
