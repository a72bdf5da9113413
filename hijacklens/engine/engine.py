"""The engine: log-probabilities of requested next tokens after given prefixes, in few tokens.

A prefix is a sequence of symbols (`hijacklens.prompts.layout`): token ids, which with probes on
also say which spans contain them. What prefixes share is computed as few times as pays
(`hijacklens.engine.plan`). Where sharing could give wrong numbers, every prefix that no other
prefix continues has a separate row; `Accounting` says what was done and why.

Only the positions that are read reach the unembedding, so nothing of size batch x pos x vocabulary
is ever stored. The softmax is taken in float32. Without probes, the plain modules under the hooked
model run on the same rows (`hijacklens.models.unhooked`).

Contract 1: a reading equals the one of a plain Hugging Face forward pass of that single prefix
(float32: within 1e-4 nats), whatever the sharing, the batch and the padding.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.engine.batch_size import BatchSize
from hijacklens.engine.forward import Pass
from hijacklens.engine.key_values import Pool
from hijacklens.engine.plan import Plan, Sharing, make_plan, separate_plan
from hijacklens.engine.reading import (
    Accounting,
    Finished,
    Readings,
    ReadOptions,
    Requests,
    ignore,
)
from hijacklens.engine.rows import Row, apart, to_device, write_out
from hijacklens.engine.support import disagreement, support_of
from hijacklens.engine.trie import Prefix
from hijacklens.errors import InputError
from hijacklens.models.device_memory import is_out_of_memory, peak_bytes
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedModel, device_of, unnamed_hooks
from hijacklens.models.verification import agreement_of
from hijacklens.probe import Probe
from hijacklens.prompts.tokens import TokenIds

CACHED_ROWS = 4
"""Rows of logits that fit into the cache of a CPU core."""


@exclusively
def read(
    model: HookedModel,
    requests: Mapping[TokenIds, Collection[int]],
    options: ReadOptions = ReadOptions(),
    finished: Finished = ignore,
) -> Readings:
    """Read next-token log-probabilities after every requested prefix.

    Other threads that read from the model wait until this call returns.

    Args:
        model: A hooked causal model. If hooks that are not probes are on it, it runs with `plain`
            sharing, since such hooks may depend on positions in the row.
        requests: Prefix -> tokens (`Requests` or a dict); every prefix has at least one symbol.
        options: The probes, the spans they look up, the sharing and the batch size.
        finished: Called after each batch with its readings and the fraction of the work done.

    Returns:
        The reading of every prefix, and the accounting.

    Raises:
        InputError: An empty prefix, a batch or pack size below 1, an unknown sharing, a model in
            training mode, or a single prompt that does not fit into memory.

    Note:
        Costs one forward pass over the tokens of `accounting.forward_tokens`. Peak memory besides
        the model's: the activations of `batch_tokens` tokens, 2^26 logits, and the keys and values
        of a trunk (at most an eighth of the free memory). When memory runs out, batches get
        smaller and the run continues.
    """
    requests = Requests.of(requests)
    if b"" in requests.prefixes[:1]:
        raise InputError("cannot read after an empty prefix: a model needs at least one token.")
    for name, limit in (("batch", options.batch_tokens), ("pack", options.pack_tokens)):
        if limit is not None and limit < 1:
            raise InputError(f"{name} size must be at least 1 token, not {limit}.")
    run = Pass.of(model, options.probes, options.spans, operation="scoring")
    switch = agreement_of(model).switch
    longer = requests.lengths > (math.inf if switch is None else switch)
    if not longer.any():
        return _read(run, requests, options, finished)
    # Rotary frequencies depend on the longest prompt of a pass; a shorter trunk has other keys.
    start = time.perf_counter()
    packed = replace(options, sharing="plain" if options.sharing == "plain" else "packed")
    readings = Readings(requests)
    accounts = []
    for chosen, part_options in ((~longer, options), (longer, packed)):
        part = requests.take(np.flatnonzero(chosen))
        fraction = len(part) / len(requests)

        def partly(finished_part: Readings, of_part: float) -> None:
            finished(finished_part, of_part * fraction)  # noqa: B023 (called in this round)

        part_readings = _read(run, part, part_options, partly)
        readings.put(part_readings)
        accounts.append(part_readings.accounting)
    how = f"prompts of more than {switch} tokens separately"
    readings.accounting = Accounting.total(accounts, how, time.perf_counter() - start)
    return readings


def _read(run: Pass, requests: Requests, options: ReadOptions, finished: Finished) -> Readings:
    """Read requests whose numbers do not depend on the longest of them."""
    start = time.perf_counter()
    model = run.model
    size = BatchSize(model, options.batch_tokens)
    plan, windows = _prepare(run, requests, options, size)
    run = replace(run, windows=windows)
    work = _Work(run, Readings(requests), options, size, finished, plan.forward_tokens)
    one_length = bool(_apart(run))
    for unit in plan.units:
        pool = None if unit.trunk is None else Pool(unit.trunk.trie)
        for level in unit.levels:
            for batch in size.batches(level, one_length=one_length, fill=windows is not None):
                rows = [[write_out(level.trie, pack) for pack in row] for row in batch]
                work.do(rows, pool, keep=level is unit.trunk)
    work.fetch()
    work.readings.accounting = Accounting(
        sharing=plan.sharing if requests else "none",
        why=plan.why if requests else "nothing was requested",
        forward_tokens=work.forward_tokens,
        padded_tokens=work.padded_tokens,
        naive_tokens=plan.naive_tokens,
        trie_tokens=plan.trie_tokens,
        passes=work.passes,
        batch_tokens=size.tokens,
        shrunk=size.shrunk,
        seconds=round(time.perf_counter() - start, 3),
        peak_memory=peak_bytes(device_of(model)),
    )
    return work.readings


def next_token_logprobs(
    model: HookedModel, ids: TokenIds, *, probes: Sequence[Probe] = (), spans: Sequence[str] = ()
) -> Float[Tensor, " vocab"]:
    """Return log-probabilities (nats, float32) of every next token after one prefix.

    With probes, `ids` are symbols whose bits mark `spans` (`hijacklens.prompts.layout`).
    """
    return Pass.of(model, probes, spans, operation="reading the next token").after(ids)


def _apart(run: Pass) -> str:
    """Return why no prompts may share a row or a batch with longer ones, if so."""
    alone = [f"the probe {probe.key} does not pack" for probe in run.probes if not probe.packs]
    agreement = agreement_of(run.model)
    if agreement.switch is None and agreement.alone:
        alone.append(agreement.alone)
    return alone[0] if alone else ""


def _prepare(
    run: Pass, requests: Requests, options: ReadOptions, size: BatchSize
) -> tuple[Plan, Mapping[str, int | None] | None]:
    """Return the plan of a run, and the attention masks of its packs, if it needs any."""
    if why := _apart(run):
        return separate_plan(requests.prefixes, why=why), None

    def plan_for(sharing: Sharing, why: str = "") -> Plan:
        limits = size.limits(options.pack_tokens)
        return make_plan(requests.prefixes, size.costs, limits, sharing=sharing, why=why)

    if not requests:
        return plan_for("plain"), None
    support = support_of(run.model)
    hooks = "hooks that are not probes are on it" if unnamed_hooks(run.model) else ""
    if (refused := hooks or support.refused) and options.sharing != "plain":
        return plan_for("plain", refused), None
    plan = plan_for(options.sharing)
    if plan.sharing == "plain":
        return plan, None
    trie, cached = plan.units[0].leaves.trie, plan.sharing == "cached"
    if problem := disagreement(run, trie, support, cached=cached):
        return plan_for("plain", problem), None
    return plan, support.windows


@dataclass(slots=True)
class _Work:
    """The finished part of a run.

    On a GPU the numbers of a batch are fetched after the next batch was started, so that the GPU
    computes while this process keeps readings and prepares rows.
    """

    run: Pass
    readings: Readings
    options: ReadOptions
    size: BatchSize
    finished: Finished
    planned_tokens: int
    forward_tokens: int = 0
    padded_tokens: int = 0
    passes: int = 0
    fraction: float = 0.0
    started: tuple[Tensor, list[int], float] | None = None
    """The numbers of the last batch, the ids of its prefixes, and its fraction of the work."""

    def do(self, rows: Sequence[Row], pool: Pool | None, *, keep: bool) -> None:
        """Run rows in one forward pass, or in several smaller ones if memory runs out."""
        lengths = [sum(len(branch.symbols) for branch in row) for row in rows]
        padded = len(rows) * max(lengths)
        ids = [read for row in rows for branch in row for _, read in branch.reads]
        numbers = self._attempt(rows, pool, keep, ids)
        if numbers is None:
            # The error is gone by now, and with it the tensors in its traceback.
            self.size.shrink(padded)
            for part in _smaller(rows):
                self.do(part, pool, keep=keep)
            return
        tokens = sum(lengths)
        self.forward_tokens += tokens
        self.padded_tokens += padded
        self.passes += 1
        # Rows that had to be split compute more than was planned.
        fraction = min(tokens / max(self.planned_tokens, 1), 1 - self.fraction)
        self.fraction += fraction
        self.fetch()
        self.started = numbers, ids, fraction
        if numbers.device.type == "cpu":
            self.fetch()

    def fetch(self) -> None:
        """Take over the numbers of the batch that was started last."""
        if self.started is None:
            return
        (numbers, ids, fraction), self.started = self.started, None
        rows = np.array(ids, dtype=np.int64)
        at, _ = self.readings.requests.where(rows)
        values = numbers.cpu().numpy()
        self.readings.logprobs[at] = values[: len(at)]
        self.readings.tops[rows] = values[len(at) :].reshape(2, -1).T
        self.finished(self.readings.take(np.sort(rows)), fraction)

    def _attempt(
        self, rows: Sequence[Row], pool: Pool | None, keep: bool, ids: Sequence[int]
    ) -> Float[Tensor, " number"] | None:
        """Return the numbers that are read in rows, or None if memory ran out."""
        try:
            logits = self.run.logits(rows, pool, keep=keep).float()
            requests = self.readings.requests
            at, counts = requests.where(np.array(ids, dtype=np.int64))
            of_row = np.repeat(np.arange(len(ids)), counts)
            prefixes = [requests.prefixes[i] for i in ids]
            drawn = _drawn(logits, prefixes, self.options) if self.options.temperature else None
            return _numbers(logits, np.stack([of_row, requests.tokens[at]]), drawn)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None


def _smaller(rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
    """Split a batch that was too large; a single leaf cannot be split."""
    middle, branches = len(rows) // 2, rows[0]
    if middle:
        return rows[:middle], rows[middle:]
    if len(branches) > 1:
        return [[[branch]] for branch in branches]
    if len(branches[0].leaves) > 1:
        return [[[leaf]] for leaf in apart(branches[0])]
    raise InputError(
        f"not enough memory for a single prompt of {len(branches[0].symbols)} tokens. Use a "
        "smaller dtype or another device, or free memory."
    )


def _numbers(
    logits: Float[Tensor, "read vocab"],
    requested: Int[np.ndarray, "2 token"],
    drawn: Int[Tensor, " read"] | None = None,
) -> Float[Tensor, " number"]:
    """Return the log-probabilities of tokens, then the likeliest tokens and theirs, in one tensor.

    Args:
        logits: In float32, which holds every token id.
        requested: Rows and tokens.
        drawn: The tokens to return in place of the likeliest.
    """
    on_cpu = logits.device.type == "cpu"
    # torch.max and torch.logsumexp take three times as long on a CPU, where rows that fit into its
    # cache are read once.
    top = torch.from_numpy(logits.numpy().argmax(-1)) if on_cpu else logits.argmax(-1)
    largest = logits.gather(1, top[:, None])
    parts = [x.split(CACHED_ROWS if on_cpu else max(1, len(x))) for x in (logits, largest)]
    sums = [(part - most).exp_().sum(-1) for part, most in zip(*parts, strict=True)]
    norm = torch.cat(sums).log() + largest[:, 0]
    at_read, of_token = to_device(requested, logits.device)
    logprobs = logits[at_read, of_token] - norm[at_read]
    if drawn is not None:
        top, largest = drawn, logits.gather(1, drawn[:, None])
    return torch.cat([logprobs, top.float(), largest[:, 0] - norm])


def _drawn(
    logits: Float[Tensor, "read vocab"], prefixes: Sequence[Prefix], options: ReadOptions
) -> Int[Tensor, " read"]:
    """Draw a next token after each prefix, by the maximum of logits with Gumbel noise.

    The noise is made on the CPU, so that a draw is the same on every device.
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for i, (row, prefix) in enumerate(zip(logits, prefixes, strict=True)):
        key = hashlib.sha256(repr(options.draw).encode() + prefix).digest()
        source = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        exponential = torch.empty(len(row)).exponential_(generator=source)
        noise = -exponential.log().to(row.device)
        tokens[i] = (row / options.temperature + noise).argmax()
    return tokens
