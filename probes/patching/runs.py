"""Patching runs: the forward passes of a sweep and their logit differences.

A batch of facts is run on its source prompts, on its target prompts, and on copies of the target
prompts, one copy for each patch:

    row        fact 0   fact 1   fact 0   fact 1   ...
    patch      layer 0  layer 0  layer 1  layer 1

As many copies run at once as fit into a batch. Only the last token of each row is unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batch_size import READ_VALUES
from hijacklens.engine.batches import TokenBatch, batch_size, batches
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, NamedHook, device_of
from hijacklens.probe import HookProbe, logits_at
from hijacklens.prompts.correspondence import Correspondence
from hijacklens.prompts.layout import Layout
from hijacklens.scoring.pairs import SAME_FIRST_TOKEN, Direction, Pair, Pairs
from probes.activation_sites import Site, reading, writing


@dataclass(frozen=True, slots=True)
class Cell:
    """One patch: a layer at a span, or one head of it there."""

    layer: int
    span: str
    head: int | None


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt pair in the direction of a patch."""

    pair: Pair
    answers: tuple[int, int]
    """First token of the true and of the false target."""
    where: Correspondence
    """The source and the target prompt, with all tokens that correspond."""
    inside: Mapping[str, tuple[int, ...]]
    """Span -> indices of the pairs of tokens in it."""


def run(
    model: HookedModel,
    cases: Sequence[Case],
    cells: Sequence[Cell],
    *,
    site: Site,
    batch_tokens: int | None,
    advance: Callable[[int], object],
) -> Float[np.ndarray, "case run"]:
    """Return logit o_ - logit o* of each case: for the source, the target, and every patch.

    Args:
        model: The model.
        cases: The prompt pairs, at least one.
        cells: The patches.
        site: What is patched.
        batch_tokens: Size of a batch in tokens.
        advance: Called with the number of finished patched runs, cases times cells in total.
    """
    layers = tuple(dict.fromkeys(cell.layer for cell in cells))
    device = device_of(model)
    size = batch_size(device, batch_tokens)
    most_rows = max(1, READ_VALUES // int(model.cfg.d_vocab))
    differences = np.zeros((len(cases), 2 + len(cells)))  # source, target, patches
    longest = [max(case.where.source, case.where.target, key=len) for case in cases]
    for batch in batches(longest, device=device, limit=size, most_rows=most_rows):
        members = batch.members
        here = [cases[i] for i in members]
        sources, targets = (
            TokenBatch.of(
                [getattr(case.where, side) for case in here], range(len(here)), device=device
            )
            for side in ("source", "target")
        )
        stored: dict[int, Tensor] = {}
        reads = _reads(model, here, site, layers, stored)
        differences[members, 0] = _differences(model, sources, here, reads)[0]
        differences[members, 1] = _differences(model, targets, here, [])[0]
        rows = min(size // targets.symbols.shape[1], most_rows)
        at_once = max(1, rows // len(here))
        for start in range(0, len(cells), at_once):
            chunk = cells[start : start + at_once]
            writes = _writes(model, here, site, chunk, stored)
            patched = _differences(model, targets, here, writes, copies=len(chunk))
            columns = range(2 + start, 2 + start + len(chunk))
            differences[np.ix_(members, columns)] = patched.T
            advance(len(here) * len(chunk))
    return differences


def make_cases(
    pairs: Pairs, spans: Sequence[str], direction: Direction
) -> tuple[list[Case], Pairs]:
    """Return the pairs that can be patched at all spans, as cases and without the others."""
    cases: list[Case] = []
    reasons: list[str | None] = []
    for pair in pairs:
        try:
            answers = pair.answers()
            if answers[0] == answers[1]:
                raise InputError(SAME_FIRST_TOKEN)
            where = pair.align(direction=direction, span="all")
            inside = {
                span: tuple(
                    where.pairs.index(positions)
                    for positions in pair.align(direction=direction, span=span).pairs
                )
                for span in spans
            }
        except InputError as reason:
            reasons.append(str(reason))
        else:
            reasons.append(None)
            cases.append(Case(pair, answers, where, inside))
    return cases, pairs.without(reasons)


def _differences(
    model: HookedModel,
    batch: TokenBatch,
    cases: Sequence[Case],
    hooks: Sequence[NamedHook],
    *,
    copies: int = 1,
) -> np.ndarray:
    """Return logit o_ - logit o* after each row of a batch, [copy, case], with hooks on."""
    tokens = batch.symbols.repeat(copies, 1)
    rows = torch.arange(len(tokens), device=tokens.device)
    last = batch.lengths.repeat(copies) - 1
    probe = HookProbe("patching", hooks)
    logits = logits_at(model, Layout(tokens, {}), rows, last, probes=[probe]).float()
    answers = torch.tensor([case.answers for case in cases], device=tokens.device)
    true, false = logits.gather(1, answers.repeat(copies, 1)).T
    return (false - true).reshape(copies, len(cases)).cpu().double().numpy()


def _reads(
    model: HookedModel,
    cases: Sequence[Case],
    site: Site,
    layers: Sequence[int],
    stored: dict[int, Tensor],
) -> list[NamedHook]:
    """Return hooks that store, by layer, the activations of all tokens that correspond."""
    at = [(row, i) for row, case in enumerate(cases) for i, _ in case.where.pairs]
    rows, positions = torch.tensor(at).T

    def keep_as(layer: int) -> Any:
        return lambda values: stored.update({layer: values})

    return [reading(model, site, layer, rows, positions, keep_as(layer)) for layer in layers]


def _writes(
    model: HookedModel,
    cases: Sequence[Case],
    site: Site,
    cells: Sequence[Cell],
    stored: Mapping[int, Tensor],
) -> list[NamedHook]:
    """Return hooks that patch cell c in copy c of the cases."""
    starts = np.cumsum([0, *(len(case.where.pairs) for case in cases)])
    hooks: list[NamedHook] = []
    for layer in dict.fromkeys(cell.layer for cell in cells):
        at = [
            (copy * len(cases) + row, case.where.pairs[n][1], int(starts[row]) + n, cell.head or 0)
            for copy, cell in enumerate(cells)
            if cell.layer == layer
            for row, case in enumerate(cases)
            for n in case.inside[cell.span]
        ]
        rows, positions, slots, heads = torch.tensor(at).T
        if cells[0].head is None:
            hooks += writing(model, site, layer, rows, positions, stored[layer][slots])
        else:
            values = stored[layer][slots, heads]
            hooks += writing(model, site, layer, rows, positions, values, heads=heads)
    return hooks
