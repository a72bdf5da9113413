"""The engine: log-probabilities of chosen next tokens after chosen prefixes, in few tokens.

What is asked for is a mapping from prefixes to tokens whose log-probability is read behind them.
A prefix is made of symbols (`hijacklens.prompts.layout`): token ids, which with probes on also say
in which spans they stand. Prefixes form a tree (`hijacklens.engine.trie`), and what they share is
computed as few times as pays (`hijacklens.engine.plan`): neighbouring branches run together in one
row under a tree attention mask, on keys and values of a trunk that are computed once. Where that
cannot be right, every prefix that begins no other one has a row to itself; `Accounting` says what
was done and why.

Only the positions that are read reach the unembedding, so nothing of size batch x pos x vocabulary
is ever made. The softmax is taken in float32.

Without probes there is nothing to hook, and the plain model under the hooked one is run on the same
rows (`hijacklens.engine.unhooked`), if it computes with the same weights.

Contract 1: a reading equals the one of a plain Hugging Face forward pass of that single prefix
(float32: within 1e-4 nats), whatever the way, the batch and the padding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.accounting import Accounting
from hijacklens.engine.batch_size import READ_VALUES, BatchSize, is_out_of_memory, peak_bytes
from hijacklens.engine.forward import Pass
from hijacklens.engine.key_values import Pool
from hijacklens.engine.plan import BATCH_TOKENS, Plan, Sharing, make_plan, separate_plan
from hijacklens.engine.reading import (
    Finished,
    Reading,
    Readings,
    ReadOptions,
    Requests,
    ignore,
)
from hijacklens.engine.rows import Row, apart, write_out
from hijacklens.engine.support import disagreement, support_of
from hijacklens.engine.unhooked import unhooked
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, device_of, require_eval, unnamed_hooks
from hijacklens.probe import Probe, logits_at
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds

__all__ = [
    "BATCH_TOKENS",
    "READ_VALUES",
    "Reading",
    "Readings",
    "Requests",
    "next_token_logprobs",
    "read",
]


def read(
    model: HookedModel,
    requests: Requests,
    options: ReadOptions = ReadOptions(),
    finished: Finished = ignore,
) -> Readings:
    """Read next-token log-probabilities after every requested prefix.

    Args:
        model: A hooked causal model. If hooks that are not probes are on it, it is run with
            `plain` sharing, since such hooks may depend on positions in the row.
        requests: Prefix -> tokens; every prefix has at least one symbol.
        options: The probes, the spans they look up, the sharing and the batch size.
        finished: Called after each batch with its readings and the fraction of the work done.

    Returns:
        The reading of every prefix, and the accounting.

    Raises:
        InputError: An empty prefix, a batch or pack size below 1, an unknown sharing, a model in
            training mode, or a single prompt that does not fit into memory.

    Note:
        Costs one forward pass over the tokens of `accounting.forward_tokens`. Peak memory besides
        the model's: the activations of `batch_tokens` tokens, `READ_VALUES` logits, and the keys
        and values of a trunk (at most an eighth of the free memory). When memory runs out, batches
        get smaller and the run continues.
    """
    require_eval(model, operation="scoring")
    if () in requests:
        raise InputError("cannot read after an empty prefix: a model needs at least one token.")
    for name, limit in (("batch", options.batch_tokens), ("pack", options.pack_tokens)):
        if limit is not None and limit < 1:
            raise InputError(f"{name} size must be at least 1 token, not {limit}.")
    start = time.perf_counter()
    size = BatchSize(model, options.batch_tokens)
    plan, windows = _prepare(model, requests, options, size)
    # An unknown architecture is tried with its hooks on, so it is run with them.
    plain = unhooked(model) if support_of(model).known and not options.probes else None
    run = Pass(model, options.probes, options.spans, windows, plain)
    work = _Work(run, requests, size, finished, plan)
    one_length = not all(probe.packs for probe in options.probes)
    for unit in plan.units:
        trunk = [level.trie for level in unit.levels[:-1]]
        pool = Pool(trunk[-1]) if trunk else None
        for number, level in enumerate(unit.levels):
            for batch in size.batches(level, one_length=one_length, fill=windows is not None):
                rows = [[write_out(level.trie, pack) for pack in row] for row in batch]
                work.do(rows, pool, kept=number < len(trunk))
    return Readings(
        work.readings,
        Accounting(
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
        ),
    )


def next_token_logprobs(
    model: HookedModel, ids: TokenIds, *, probes: Sequence[Probe] = (), spans: Sequence[str] = ()
) -> Float[Tensor, " vocab"]:
    """Log-probabilities (nats, float32) of every next token behind one prefix.

    With probes, `ids` are symbols whose bits stand for `spans` (`hijacklens.prompts.layout`).
    """
    require_eval(model, operation="reading the next token")
    device = device_of(model)
    tokens = torch.tensor([ids], device=device)
    row, position = torch.tensor([0], device=device), torch.tensor([len(ids) - 1], device=device)
    layout = Layout.of_symbols(tokens, spans)
    return logits_at(model, layout, row, position, probes=probes)[0].float().log_softmax(-1)


def _prepare(
    model: HookedModel,
    requests: Requests,
    options: ReadOptions,
    size: BatchSize,
) -> tuple[Plan, Mapping[str, int | None] | None]:
    """The plan of a run, and the attention masks of its packs; None where it needs none."""
    lonely = [probe.key for probe in options.probes if not probe.packs]
    if lonely:
        return separate_plan(requests, why=f"the probe {lonely[0]} does not pack"), None

    def planned(sharing: Sharing, why: str = "") -> Plan:
        return make_plan(
            requests,
            size.costs,
            sharing=sharing,
            why=why,
            batch_tokens=size.tokens,
            pack_tokens=options.pack_tokens,
            pack_reads=size.reads,
            trunk_tokens=size.trunk_tokens,
        )

    if not requests:
        return planned("plain"), None
    support = support_of(model)
    refused = "hooks on it are no probes" if unnamed_hooks(model) else support.refused
    refused = "" if options.sharing == "plain" else refused
    plan = planned("plain", refused) if refused else planned(options.sharing)
    if plan.sharing == "plain":
        return plan, None
    if support.known and not options.probes:
        return plan, support.windows
    problem = disagreement(
        model,
        plan.units[0].levels[-1].trie,
        support,
        cached=plan.sharing == "cached",
        probes=options.probes,
        spans=options.spans,
    )
    return (planned("plain", problem), None) if problem else (plan, support.windows)


@dataclass(slots=True)
class _Work:
    """What has been done of a run."""

    run: Pass
    requests: Requests
    size: BatchSize
    finished: Finished
    plan: Plan
    readings: dict[TokenIds, Reading] = field(default_factory=dict)
    forward_tokens: int = 0
    padded_tokens: int = 0
    passes: int = 0
    fraction: float = 0.0

    def do(self, rows: Sequence[Row], pool: Pool | None, *, kept: bool) -> None:
        """Run rows in one forward pass, or in several smaller ones if memory runs out."""
        lengths = [sum(len(branch.symbols) for branch in row) for row in rows]
        padded = len(rows) * max(lengths)
        readings = self._attempt(rows, pool, kept)
        if readings is None:
            # Here the error is gone, and with it what it held.
            self.size.shrink(padded)
            smaller = list(_smaller(rows))
            if not smaller:
                raise InputError(
                    f"not enough memory for a single prompt of {padded} tokens. Use a smaller "
                    "dtype or another device, or free memory."
                )
            for part in smaller:
                self.do(part, pool, kept=kept)
            return
        tokens = sum(lengths)
        self.forward_tokens += tokens
        self.padded_tokens += padded
        self.passes += 1
        self.readings.update(readings)
        # Rows that had to be split compute more than was planned.
        step = min(tokens / max(self.plan.forward_tokens, 1), 1 - self.fraction)
        self.fraction += step
        self.finished(readings, step)

    def _attempt(
        self, rows: Sequence[Row], pool: Pool | None, kept: bool
    ) -> dict[TokenIds, Reading] | None:
        """The readings of rows, or None if memory ran out."""
        try:
            logits = self.run.logits(rows, pool, keep=kept).float()
            branches = [branch for row in rows for branch in row]
            prefixes = [prefix for branch in branches for _, prefix in branch.reads]
            return _readings(logits, prefixes, self.requests)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None


def _smaller(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Batches that hold the same as one that was too large; none for a single leaf."""
    middle = len(rows) // 2
    if middle:
        yield from (rows[:middle], rows[middle:])
    elif len(rows[0]) > 1:
        yield from ([[branch]] for branch in rows[0])
    elif len(rows[0][0].leaves) > 1:
        yield from ([[leaf]] for leaf in apart(rows[0][0]))


def _readings(
    logits: Float[Tensor, "read vocab"], prefixes: Sequence[TokenIds], requests: Requests
) -> dict[TokenIds, Reading]:
    if not prefixes:
        return {}
    norm = logits.logsumexp(-1)
    top = logits.max(-1)
    pairs = [(i, token) for i, prefix in enumerate(prefixes) for token in requests[prefix]]
    places = torch.tensor(pairs, dtype=torch.long, device=logits.device).reshape(-1, 2)
    at_read, of_token = places.T
    chosen = logits[at_read, of_token] - norm[at_read]
    found: list[dict[int, float]] = [{} for _ in prefixes]
    for (i, token), value in zip(pairs, chosen.tolist(), strict=True):
        found[i][token] = value
    tops = zip(top.indices.tolist(), (top.values - norm).tolist(), strict=True)
    return {
        prefix: Reading(logprobs, token, logprob)
        for prefix, logprobs, (token, logprob) in zip(prefixes, found, tops, strict=True)
    }
