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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.accounting import Accounting
from hijacklens.engine.batch_size import READ_VALUES, BatchSize, is_out_of_memory, peak_bytes
from hijacklens.engine.forward import Pass
from hijacklens.engine.key_values import Pool
from hijacklens.engine.packs import MOST_TOKENS
from hijacklens.engine.plan import BATCH_TOKENS, Plan, Way, make_plan, separate_plan
from hijacklens.engine.reading import Reading, Readings, Wanted
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
    "Wanted",
    "next_token_logprobs",
    "read",
]


def read(
    model: HookedModel,
    wanted: Wanted,
    *,
    probes: Sequence[Probe] = (),
    spans: Sequence[str] = (),
    way: Way = "auto",
    batch_tokens: int | None = None,
    pack_tokens: int = MOST_TOKENS,
    advance: Callable[[float], object] = lambda share: None,
    keep: Callable[[Mapping[TokenIds, Reading]], object] = lambda readings: None,
) -> Readings:
    """Read next-token log-probabilities behind every prefix that is asked for.

    Args:
        model: A hooked causal model; with hooks on it that are no probes it is run the plain way,
            as they may go by positions.
        wanted: Prefix -> tokens; every prefix has at least one symbol.
        probes: Act on every row, in their order. With a probe that does not pack, every prefix
            has a row to itself and the rows of a batch are of one length.
        spans: The spans that the bits of the symbols stand for.
        way: How prompts share what they have in common (`hijacklens.engine.plan`); by default
            the cheapest. Where a way cannot be right, the plain one is taken.
        batch_tokens: Size of a batch in tokens, padding included; a longer row runs alone. By
            default what suits the device and its free memory.
        pack_tokens: Tokens of a row that holds several prompts, at most.
        advance: Called after each batch with the share of the work that it was.
        keep: Called after each batch with the readings that are new.

    Returns:
        The reading of every prefix, and the accounting.

    Raises:
        InputError: An empty prefix, a batch or pack size below 1, an unknown way, a model in
            training mode, or a single prompt that does not fit into memory.

    Note:
        Costs one forward pass over the tokens of `accounting.forward_tokens`. Peak memory beside
        the model's: the activations of `batch_tokens` tokens, `READ_VALUES` logits, and the keys
        and values of a trunk (an eighth of the free memory at most). When memory runs out,
        batches get smaller and the run goes on.
    """
    require_eval(model, operation="scoring")
    if () in wanted:
        raise InputError("cannot read behind an empty prefix: a model needs at least one token.")
    for name, size in (("batch", batch_tokens), ("pack", pack_tokens)):
        if size is not None and size < 1:
            raise InputError(f"{name} size must be at least 1 token, not {size}.")
    start = time.perf_counter()
    size = BatchSize(model, batch_tokens)
    plan, windows = _prepare(model, wanted, probes, spans, way, pack_tokens, size)
    # Of an architecture that is not known, the hooked model was tried.
    plain = unhooked(model) if support_of(model).known and not probes else None
    run = Pass(model, probes, spans, windows, plain)
    work = _Work(run, wanted, size, advance, keep, plan)
    one_length = not all(probe.packs for probe in probes)
    for unit in plan.units:
        trunk = [level.trie for level in unit.levels[:-1]]
        pool = Pool(trunk[-1]) if trunk else None
        for number, level in enumerate(unit.levels):
            for batch in size.batches(level, one_length=one_length, fill=windows is not None):
                rows = [[write_out(level.trie, pack) for pack in row] for row in batch]
                work.do(rows, pool, kept=number < len(trunk))
    return Readings(
        work.found,
        Accounting(
            way=plan.way if wanted else "none",
            why=plan.why if wanted else "nothing was asked for",
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
    wanted: Wanted,
    probes: Sequence[Probe],
    spans: Sequence[str],
    way: Way,
    pack_tokens: int,
    size: BatchSize,
) -> tuple[Plan, Mapping[str, int | None] | None]:
    """The plan of a run, and the attention masks of its packs; None where it needs none."""
    lonely = [probe.key for probe in probes if not probe.packs]
    if lonely:
        return separate_plan(wanted, why=f"the probe {lonely[0]} does not pack"), None

    def planned(way: Way, why: str = "") -> Plan:
        return make_plan(
            wanted,
            size.costs,
            way=way,
            why=why,
            batch_tokens=size.tokens,
            pack_tokens=pack_tokens,
            pack_reads=size.reads,
            trunk_tokens=size.trunk_tokens,
        )

    if not wanted:
        return planned("plain"), None
    support = support_of(model)
    refused = "hooks on it are no probes" if unnamed_hooks(model) else support.refused
    refused = "" if way == "plain" else refused
    plan = planned("plain", refused) if refused else planned(way)
    if plan.way == "plain":
        return plan, None
    if support.known and not probes:
        return plan, support.windows
    problem = disagreement(
        model,
        plan.units[0].levels[-1].trie,
        support,
        cached=plan.way == "cached",
        probes=probes,
        spans=spans,
    )
    return (planned("plain", problem), None) if problem else (plan, support.windows)


@dataclass(slots=True)
class _Work:
    """What has been done of a run."""

    run: Pass
    wanted: Wanted
    size: BatchSize
    advance: Callable[[float], object]
    keep: Callable[[Mapping[TokenIds, Reading]], object]
    plan: Plan
    found: dict[TokenIds, Reading] = field(default_factory=dict)
    forward_tokens: int = 0
    padded_tokens: int = 0
    passes: int = 0
    share: float = 0.0

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
        self.found.update(readings)
        self.keep(readings)
        # Rows taken apart compute more than was planned.
        step = min(tokens / max(self.plan.forward_tokens, 1), 1 - self.share)
        self.share += step
        self.advance(step)

    def _attempt(
        self, rows: Sequence[Row], pool: Pool | None, kept: bool
    ) -> dict[TokenIds, Reading] | None:
        """The readings of rows, or None if memory ran out."""
        try:
            logits = self.run.logits(rows, pool, keep=kept).float()
            branches = [branch for row in rows for branch in row]
            prefixes = [prefix for branch in branches for _, prefix in branch.reads]
            return _readings(logits, prefixes, self.wanted)
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
    logits: Float[Tensor, "read vocab"], prefixes: Sequence[TokenIds], wanted: Wanted
) -> dict[TokenIds, Reading]:
    if not prefixes:
        return {}
    norm = logits.logsumexp(-1)
    top = logits.max(-1)
    pairs = [(i, token) for i, prefix in enumerate(prefixes) for token in wanted[prefix]]
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
