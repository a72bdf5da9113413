"""The engine: log-probabilities of chosen next tokens after chosen prefixes, in few forward passes.

What is asked for is a mapping from prefixes to tokens whose log-probability is read behind them.
A prefix is made of symbols (`hijacklens.layout`): token ids, which with probes on also say in
which spans they stand. A prefix that begins another one is read on the way, so only the longest
ones become rows:

    row       Do not think of Guam . The Eiffel Tower is in ▁New ▁York
    read at                                              ^     ^

Rows are sorted by length and padded on the right, where a causal model cannot see the padding;
only the positions that are read reach the unembedding, so nothing of size batch x pos x vocabulary
is ever made. The softmax is taken in float32.

Contract 1: a reading equals the one of a plain Hugging Face forward pass of that single prefix
(float32: within 1e-4 nats), whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.hooked import HookedModel, device_of, require_eval
from hijacklens.layout import Layout
from hijacklens.probe import Probe, logits_at
from hijacklens.tokens import TokenIds

Wanted: TypeAlias = Mapping[TokenIds, Collection[int]]
"""Prefix -> the tokens whose log-probability behind it is wanted."""

BATCH_TOKENS = {"cpu": 1_024, "cuda": 32_768}
"""Default size of a batch, in tokens with padding, by type of device."""
READ_VALUES = 2**26
"""At most so many logits (reads x vocabulary) at once: a quarter of a GiB in float32."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model says behind one prefix."""

    logprobs: Mapping[int, float]
    """Token id -> log-probability, in nats."""
    top_token: int
    top_logprob: float


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence to run, with the prefixes of it that are read."""

    ids: TokenIds
    reads: tuple[TokenIds, ...]


def read(
    model: HookedModel,
    wanted: Wanted,
    *,
    probes: Sequence[Probe] = (),
    spans: Sequence[str] = (),
    batch_tokens: int | None = None,
    advance: Callable[[float], object] = lambda share: None,
) -> dict[TokenIds, Reading]:
    """Read next-token log-probabilities behind every prefix that is asked for.

    Args:
        model: A hooked causal model; hooks that are on it act on every row.
        wanted: Prefix -> tokens; every prefix has at least one symbol.
        probes: Act on every row, in their order. With a probe that does not pack, every prefix
            has a row to itself and the rows of a batch are of one length.
        spans: The spans that the bits of the symbols stand for.
        batch_tokens: Size of a batch in tokens, padding included; a longer row runs alone.
        advance: Called after each batch with the share of the work that it was.

    Returns:
        The reading of every prefix.

    Raises:
        InputError: An empty prefix, a batch size below 1, or a model in training mode.

    Note:
        Costs one forward pass over the distinct rows. Peak memory beside the model's: the
        activations of `batch_tokens` tokens and `READ_VALUES` logits.
    """
    require_eval(model, operation="scoring")
    if () in wanted:
        raise InputError("cannot read behind an empty prefix: a model needs at least one token.")
    device = device_of(model)
    usual = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    limit = usual if batch_tokens is None else batch_tokens
    if limit < 1:
        raise InputError(f"batch size must be at least 1 token, not {limit}.")
    packs = all(probe.packs for probe in probes)
    found = _rows(wanted) if packs else (_Row(prefix, (prefix,)) for prefix in wanted)
    rows = sorted(found, key=lambda row: len(row.ids), reverse=True)
    total = sum(len(row.ids) for row in rows)
    readings: dict[TokenIds, Reading] = {}
    most_reads = max(1, READ_VALUES // model.cfg.d_vocab)
    for batch in _batches(rows, limit, most_reads=most_reads, one_length=not packs):
        readings.update(_run(model, batch, wanted, device, probes, spans))
        advance(sum(len(row.ids) for row in batch) / total)
    return readings


def next_token_logprobs(model: HookedModel, ids: TokenIds) -> Float[Tensor, " vocab"]:
    """Log-probabilities (nats, float32) of every next token behind one prefix."""
    require_eval(model, operation="reading the next token")
    device = device_of(model)
    tokens = torch.tensor([ids], device=device)
    row, position = torch.tensor([0], device=device), torch.tensor([len(ids) - 1], device=device)
    return logits_at(model, Layout(tokens, {}), row, position)[0].float().log_softmax(-1)


def _rows(wanted: Wanted) -> Iterator[_Row]:
    """The prefixes that begin no other one, each with those that begin it.

    In lexicographic order a sequence directly follows its own prefixes, so one pass finds them.
    """
    open_prefixes: list[TokenIds] = []  # each begins the next
    for prefix in sorted(wanted):
        if open_prefixes and prefix[: len(open_prefixes[-1])] != open_prefixes[-1]:
            yield _Row(open_prefixes[-1], tuple(open_prefixes))
            # Prefixes shared with the row just closed have been read with it.
            open_prefixes = []
        open_prefixes.append(prefix)
    if open_prefixes:
        yield _Row(open_prefixes[-1], tuple(open_prefixes))


def _batches(
    rows: list[_Row], limit: int, *, most_reads: int, one_length: bool
) -> Iterator[list[_Row]]:
    """Cut rows, longest first, into batches of at most `limit` padded tokens."""
    batch: list[_Row] = []
    reads = 0
    for row in rows:
        width = len(batch[0].ids) if batch else len(row.ids)
        full = (len(batch) + 1) * width > limit or reads + len(row.reads) > most_reads
        if batch and (full or (one_length and len(row.ids) < width)):
            yield batch
            batch, reads = [], 0
        batch.append(row)
        reads += len(row.reads)
    if batch:
        yield batch


def _run(
    model: HookedModel,
    batch: list[_Row],
    wanted: Wanted,
    device: torch.device,
    probes: Sequence[Probe],
    spans: Sequence[str],
) -> dict[TokenIds, Reading]:
    width = max(len(row.ids) for row in batch)
    # Any id serves as padding: no read position can attend to what stands on its right.
    symbols = torch.tensor(
        [row.ids + (0,) * (width - len(row.ids)) for row in batch], device=device
    )
    prefixes = [prefix for row in batch for prefix in row.reads]
    at_row = torch.tensor([i for i, row in enumerate(batch) for _ in row.reads], device=device)
    at_position = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
    layout = Layout.of_symbols(symbols, spans)
    logits = logits_at(model, layout, at_row, at_position, probes=probes).float()
    norm = logits.logsumexp(-1)
    top = logits.max(-1)
    pairs = [(i, token) for i, prefix in enumerate(prefixes) for token in wanted[prefix]]
    at_read, of_token = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).T
    chosen = logits[at_read, of_token] - norm[at_read]
    found: list[dict[int, float]] = [{} for _ in prefixes]
    for (i, token), value in zip(pairs, chosen.tolist(), strict=True):
        found[i][token] = value
    tops = zip(top.indices.tolist(), (top.values - norm).tolist(), strict=True)
    return {
        prefix: Reading(logprobs, token, logprob)
        for prefix, logprobs, (token, logprob) in zip(prefixes, found, tops, strict=True)
    }
