"""Workers: the engine on many GPUs and machines, each with a replica of the model.

    prefixes --cut_parts--> parts --handed out by cost--> replicas --readings--> this process
                                                                       (one store, one result)

A worker is a Ray actor that loads the model by itself. Parts are handed out as workers get free.
When a worker dies (killed, out of memory, its machine gone) another one takes its place, and the
part it was at is read again; what was finished is kept. Every replica says which model it has, by
a checksum of all weights, and has to have the first one's.

    engine = RayEngine(workers=2)
    hijack(model, facts, engine=engine)                     # a model that is loaded here, too
    hijack(ModelLoader("gpt2"), facts, engine=engine)       # or only where it is run
    with engine.replicas(ModelLoader("gpt2")) as replicas:  # or kept for several runs
        hijack(replicas.loader, facts, engine=replicas)
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

import numpy as np

from hijacklens.engine.accounting import Accounting
from hijacklens.engine.packs import BATCH_TOKENS
from hijacklens.engine.reading import (
    Finished,
    Reading,
    Readings,
    ReadOptions,
    Requests,
    ignore,
)
from hijacklens.engine.trie import Trie
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedLanguageModel, unnamed_hooks
from hijacklens.models.identity import ModelIdentity, identify
from hijacklens.probe import Probe
from hijacklens.prompts.tokens import TokenIds
from hijacklens.store.fingerprint import Fingerprint, fingerprint_of
from hijacklens.workers.cluster import Share, connected, share_out
from hijacklens.workers.replica import Description, ModelLoader, Replica

SLACK = 0.25
"""How far from its place a cut may be moved, in lengths of a part."""

PER_WORKER = 4
"""Parts for each worker, at least, so that none waits long for the last one."""

MOST_BATCHES = 16
"""Batches in a part, at most: what is lost with a worker."""


@dataclass(frozen=True, slots=True)
class Part:
    """A share of the work."""

    requests: Requests
    """Prefix -> the tokens whose log-probability behind it is requests."""
    cost: int
    """Tokens that it computes."""


def cut_parts(requests: Requests, count: int, *, shared: bool = True) -> list[Part]:
    """Cut what is requests into parts of about one cost, the most expensive first.

    Args:
        requests: As `hijacklens.engine.engine.read` takes it.
        count: How many parts; there are fewer if there is less to cut.
        shared: Whether prompts share what they have in common; with a probe that does not pack,
            every prefix is computed by itself.

    Note:
        Costs a sort of the prefixes: 1 s for the whole CounterFact at doses 0 to 5.
    """
    if not requests:
        return []
    trie = Trie.of(requests)
    overlap = np.array(trie.shared)
    if shared:
        costs = np.fromiter(map(len, trie.leaves), np.int64) - overlap
    else:
        costs = np.array([sum(map(len, reads)) for reads in trie.reads])
    ends = np.cumsum(costs)
    cuts = _cuts(overlap, ends, count)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(trie.leaves)], strict=True):
        prefixes = [prefix for reads in trie.reads[start:stop] for prefix in reads]
        again = int(overlap[start]) if shared else 0
        cost = int(costs[start:stop].sum()) + again
        parts.append(Part({prefix: requests[prefix] for prefix in prefixes}, cost))
    return sorted(parts, key=lambda part: -part.cost)


def count_parts(requests: Requests, *, workers: int, batch_tokens: int) -> int:
    """How many parts suit so many workers: enough to balance, none of less than a batch."""
    tokens = Trie.of(requests).nodes
    few, many = max(workers, tokens // batch_tokens), tokens // (MOST_BATCHES * batch_tokens) + 1
    return min(few, max(PER_WORKER * workers, many))


def _cuts(overlap: np.ndarray, ends: np.ndarray, count: int) -> list[int]:
    """The first leaf of every part but the first."""
    length = ends[-1] / max(count, 1)
    cuts: list[int] = []
    for place in length * np.arange(1, count):
        low, high = (
            int(np.searchsorted(ends, place + side * SLACK * length, side="left")) + 1
            for side in (-1, 1)
        )
        low, high = max(low, cuts[-1] + 1 if cuts else 1), min(high + 1, len(ends))
        if low < high:
            far = np.abs(ends[low - 1 : high - 1] - place)
            cuts.append(low + int(np.lexsort((far, overlap[low:high]))[0]))
    return cuts


START_SECONDS = 1_800.0
"""How long to wait for the first replica."""

PATIENCE_SECONDS = 60.0
"""After how long a wait for it is explained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayEngine:
    """Where a model is run: replicas on the workers of a Ray cluster."""

    workers: int | None = None
    """How many; by default one per GPU, or where there is none one per four cores."""
    address: str | None = None
    """Of a cluster to join (`auto`, `10.0.0.1:6379`); by default workers run on this machine."""
    gpus_per_worker: float | int | None = None
    """By default one where there are any; a replica of several GPUs is spread over them."""
    cpus_per_worker: float | int | None = None
    """By default one beside a GPU, or an even share of the cores."""
    attempts: int = 3
    """How many workers may die of one part, or of loading the model, before the run ends."""

    @contextmanager
    def replicas(self, model: HookedLanguageModel | ModelLoader) -> Iterator[Replicas]:
        """Run the body with replicas of a model; their processes end with it.

        Args:
            model: How the model is loaded; or one that is loaded here from a name or folder, whose
                weights the replicas' are compared with.

        Raises:
            InputError: Ray is not there, there is no room for the workers, the model cannot be
                loaded there, or is not the one that is here.

        Note:
            Costs loading the model in every worker, all at once, and a pass over its weights. The
            body starts when the first worker is ready.
        """
        loader = model if isinstance(model, ModelLoader) else ModelLoader.of(model)
        expected = None if isinstance(model, ModelLoader) else _here(model)
        with connected(self.address) as ray:
            gpus = self.gpus_per_worker
            if gpus is None and loader.device == "cpu":
                gpus = 0
            if gpus is None and loader.devices > 1:
                gpus = loader.devices
            share = share_out(
                ray.nodes(), workers=self.workers, cpus=self.cpus_per_worker, gpus=gpus
            )
            replicas = Replicas(ray, loader.sent(), share, attempts=self.attempts)
            try:
                replicas.start(expected)
                yield replicas
            finally:
                replicas.stop()


@dataclass(frozen=True, slots=True)
class _Task:
    """What a worker is at."""

    worker: Any
    part: Part | None = None
    """None while it loads the model."""
    options: ReadOptions | None = None


@dataclass(frozen=True, slots=True)
class _Death:
    """The end of a worker, where an answer was awaited."""

    reason: str


class Replicas:
    """Workers with a model each; `RayEngine.replicas` makes them."""

    identity: ModelIdentity
    """Of the model that all have."""
    tokenizer: Any

    def __init__(self, ray: Any, loader: ModelLoader, share: Share, *, attempts: int) -> None:
        """Start the processes."""
        self.loader = loader
        self.share = share
        self._placed = loader
        if share.gpus == 0:
            self._placed = replace(loader, device=loader.device or "cpu")
        elif share.gpus > 1:
            self._placed = replace(loader, device=None, devices=int(share.gpus))
        self._ray = ray
        self._attempts = attempts
        self._make = ray.remote(Replica).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0, max_task_retries=0
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
        self._workers: list[Any] = []
        self._first: Description | None = None
        self._lost_at_start = 0
        self.replaced = 0
        for _ in range(share.workers):
            self._hire()

    def start(self, expected: Fingerprint | None = None) -> None:
        """Wait for the first replica.

        Raises:
            InputError: The model cannot be loaded, is another one than expected, or no worker
                comes up.
        """
        until = time.monotonic() + START_SECONDS
        if not self._ray.wait(list(self._running), timeout=PATIENCE_SECONDS)[0]:
            free, all_of_it = self._ray.available_resources(), self._ray.cluster_resources()
            room = ", ".join(
                f"{free.get(kind, 0):g} of {all_of_it.get(kind, 0):g} {kind}s free"
                for kind in ("CPU", "GPU")
            )
            warnings.warn(
                f"no worker has loaded the model in {PATIENCE_SECONDS:.0f} seconds ({room} in the "
                f"cluster; a worker takes {self.share.cpus:g} and {self.share.gpus:g}). Waiting "
                f"for {START_SECONDS / 60:.0f} minutes at most.",
                stacklevel=2,
            )
        while not self._idle:
            self._advance(max(0.0, until - time.monotonic()))
        assert self._first is not None
        if expected is not None:
            _same(expected, self._first.fingerprint, "here", f"in the workers ({self._first.node})")
        self.identity = self._first.identity
        self.tokenizer = self._first.tokenizer

    def stop(self) -> None:
        """End the processes."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers.clear()
        self._running.clear()
        self._idle.clear()

    def check(self, model: HookedLanguageModel | ModelLoader) -> None:
        """Refuse another model than the one that the workers have.

        Raises:
            InputError: It is another one.
        """
        assert self._first is not None
        if not isinstance(model, ModelLoader):
            _same(
                _here(model),
                self._first.fingerprint,
                "here",
                f"in the workers ({self._first.node})",
            )
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
        are summed over all workers, peak memory is that of the largest worker, and seconds are
        wall time in this process.

        Raises:
            InputError: As `read`; a probe that cannot be sent to another process; or a part during
                which several workers died. Finished parts are kept.
        """
        begun = time.perf_counter()
        size = options.batch_tokens or BATCH_TOKENS.get(self.identity.device.split(":")[0], 1_024)
        count = count_parts(requests, workers=self.share.workers, batch_tokens=max(1, size))
        shared = options.sharing != "plain" and all(probe.packs for probe in options.probes)
        waiting = deque(cut_parts(requests, count, shared=shared))
        total = sum(part.cost for part in waiting)
        sent = self._send(options)
        readings: dict[TokenIds, Reading] = {}
        accounts: list[Accounting] = []
        deaths: Counter[int] = Counter()
        replaced, at_work = self.replaced, 0
        while waiting or at_work:
            while waiting and self._idle:
                worker, part = self._idle.pop(), waiting.popleft()
                self._running[worker.read.remote(sent, part.requests)] = _Task(
                    worker, part, options
                )
                at_work += 1
            task, answer = self._advance()
            if task.part is None or task.options is not options:
                continue
            at_work -= 1
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
            readings.update(answer)
            accounts.append(answer.accounting)
            finished(answer, task.part.cost / total)
        how = f"{len(accounts)} parts on {self.share.workers} Ray workers"
        if self.replaced > replaced:
            how += f", {self.replaced - replaced} of them replaced"
        return Readings(readings, _together(accounts, how, time.perf_counter() - begun))

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
        worker = self._make.remote(self._placed, self.share.threads)
        self._workers.append(worker)
        self._running[worker.describe.remote()] = _Task(worker)

    def _advance(self, timeout: float | None = None) -> tuple[_Task, Any]:
        """Wait for the next answer; its worker is idle then, or has been replaced."""
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
            first = self._first = self._first or answer
            _same(first.fingerprint, answer.fingerprint, f"on {first.node}", f"on {answer.node}")
            self._lost_at_start = 0
        self._idle.append(task.worker)
        return task, answer

    def _replace(self, task: _Task, error: Exception) -> _Death:
        """Put another worker in the place of one that died."""
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        self._ray.kill(task.worker)  # it may live on where only its answer was lost
        self._workers.remove(task.worker)
        if task.part is None:
            self._lost_at_start += 1
            if self._lost_at_start >= self._attempts * self.share.workers:
                raise InputError(
                    f"{self._lost_at_start} workers died one after the other as they loaded the "
                    f"model {self.loader.source!r}; the last: {reason} If memory was short, use "
                    "fewer workers or a smaller dtype."
                ) from error
        self.replaced += 1
        self._hire()
        return _Death(reason)


def _here(model: HookedLanguageModel) -> Fingerprint:
    """The source that a model in this process is.

    Raises:
        InputError: Hooks are on it, which workers would not have.
    """
    if unnamed_hooks(model):
        raise InputError(
            "hooks are on the model that did not come as probes, and workers do not have them. "
            "Take them off, or pass probes=[HookProbe(name, hooks)]."
        )
    return fingerprint_of(model, identify(model))


def _same(one: Fingerprint, other: Fingerprint, here: str, there: str) -> None:
    """Refuse two models that differ in anything that a reading depends on."""
    if one.key == other.key:
        return
    names = ("architecture", "parameters", "arithmetic", "weights", "configuration", "tokenizer")
    differ = [
        field.name
        for field in fields(Fingerprint)
        if field.name in names and getattr(one, field.name) != getattr(other, field.name)
    ]
    raise InputError(
        f"the model {one.model!r} {there} is not the one {here}: they differ in "
        f"{', '.join(differ)}. If it was changed after it was loaded, save it with "
        "save_pretrained and load that folder; if folders differ between machines, copy it anew."
    )


def _together(accounts: Sequence[Accounting], how: str, seconds: float) -> Accounting:
    """The accounting of all parts."""

    def total(name: str) -> int:
        return sum(getattr(account, name) for account in accounts)

    main = max(accounts, key=lambda account: account.forward_tokens, default=None)
    return Accounting(
        sharing=main.sharing if main else "none",
        why=f"{main.why}; {how}" if main else "nothing was requested",
        forward_tokens=total("forward_tokens"),
        padded_tokens=total("padded_tokens"),
        naive_tokens=total("naive_tokens"),
        trie_tokens=total("trie_tokens"),
        passes=total("passes"),
        batch_tokens=min((account.batch_tokens for account in accounts), default=0),
        shrunk=total("shrunk"),
        seconds=round(seconds, 3),
        peak_memory=max((account.peak_memory for account in accounts), default=0),
    )
