"""The engine: log-probabilities of requested next tokens after given prefixes, in few tokens.

A prefix is a sequence of symbols (`hijacklens.prompts.layout`): token ids, which with probes on
also say which spans contain them. What prefixes share is computed as few times as pays
(`hijacklens.engine.plan`). Where sharing could give wrong numbers, every prefix that no other
prefix continues has a separate row; `Accounting` says what was done and why.

Only the positions that are read reach the unembedding, so nothing of size batch x pos x vocabulary
is ever stored. The softmax is taken in float32. Where no probe acts, in some layers or in all, the
plain modules under the hooked model run on the same rows (`hijacklens.models.unhooked`).

Contract 1: a reading equals the one of a plain Hugging Face forward pass of that single prefix
(float32: within 1e-4 nats), whatever the sharing, the batch and the padding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float
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
from hijacklens.engine.support import cost_of_test, disagreement, support_of
from hijacklens.engine.work import Work
from hijacklens.errors import InputError
from hijacklens.models.agreement import agreement_of
from hijacklens.models.device_memory import peak_bytes
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedModel, device_of, unnamed_hooks
from hijacklens.probe import Probe
from hijacklens.prompts.tokens import TokenIds


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
        model: A hooked causal model. If hooks that are not probes are on it, every prefix has a
            separate row and the rows of a batch have equal length, since such hooks may depend on
            positions in the row.
        requests: Prefix -> tokens (`Requests` or a dict); every prefix has at least one symbol.
        options: The probes, the spans they look up, the sharing and the batch size.
        finished: Called after each batch with its readings and the fraction of the work done.

    Returns:
        The reading of every prefix, and the accounting. Without requests, the model is not looked
        at.

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
    if not requests:
        readings = Readings(requests)
        readings.accounting = Accounting.total([], "", 0.0)
        return readings
    run = Pass.of(model, options.probes, options.spans, operation="scoring")
    run.require_agreement_on(requests.prefixes)
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
        if not part:
            continue
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
    work = Work(run, Readings(requests), options, size, finished, plan.forward_tokens)
    one_length = bool(reason_apart(run))
    for unit in plan.units:
        pool = None if unit.trunk is None else Pool(unit.trunk.trie)
        for level in unit.levels:
            work.do(level, pool, keep=level is unit.trunk, one_length=one_length)
    work.fetch()
    work.readings.accounting = Accounting(
        sharing=plan.sharing,
        why=plan.why,
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


def reason_apart(run: Pass) -> str:
    """Return why no prompts may share a row or a batch with longer ones, if so."""
    alone = [f"the probe {probe.key} does not pack" for probe in run.probes if not probe.packs]
    if unnamed_hooks(run.model):  # they may act on the last position of a row
        alone.append("hooks that are not probes are on it")
    agreement = agreement_of(run.model)
    if agreement.switch is None and agreement.alone:
        alone.append(agreement.alone)
    return alone[0] if alone else ""


def _prepare(
    run: Pass, requests: Requests, options: ReadOptions, size: BatchSize
) -> tuple[Plan, Mapping[str, int | None] | None]:
    """Return the plan of a run, and the attention masks of its packs, if it needs any."""
    if why := reason_apart(run):
        return separate_plan(requests.prefixes, why=why), None

    def plan_for(sharing: Sharing, why: str = "") -> Plan:
        limits = size.limits(options.pack_tokens)
        return make_plan(requests.trie, size.costs, limits, sharing=sharing, why=why)

    support = support_of(run.model)
    if support.refused and options.sharing != "plain":
        return plan_for("plain", support.refused), None
    plan = plan_for(options.sharing)
    if plan.sharing == "plain":
        return plan, None
    if run.probes and options.sharing == "auto":  # then each run tests its sharing
        apart = plan_for("plain", plan.why)
        cost = plan.cost(size.costs, size.tokens) + cost_of_test(requests.trie, size.costs)
        if apart.cost(size.costs, size.tokens) < cost:
            return apart, None
    trie, cached = plan.units[0].leaves.trie, plan.sharing == "cached"
    if problem := disagreement(run, trie, support, cached=cached):
        return plan_for("plain", problem), None
    return plan, support.windows
