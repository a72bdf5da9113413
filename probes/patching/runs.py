"""Patching runs: the forward passes of a sweep, and the logit difference that each one gives.

A batch of facts is run on its source prompts, on its target prompts, and on copies of the target
prompts, one copy for each patch:

    row        fact 0   fact 1   fact 0   fact 1   ...
    patch      layer 0  layer 0  layer 1  layer 1

As many copies run at once as a batch has room for, so few facts take as little time per patch as
many. Only the last token of each row is unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batches import Batch, batch_size, batches
from hijacklens.engine.engine import READ_VALUES
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, NamedHook, device_of
from hijacklens.probe import HookProbe, logits_at
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds
from hijacklens.scoring.items import Unscored
from hijacklens.scoring.pairs import Direction, PromptPair
from probes.activations.places import Site, reading, writing


@dataclass(frozen=True, slots=True)
class Cell:
    """One patch: a layer at a span, or one head of it there."""

    layer: int
    span: str
    head: int | None


@dataclass(frozen=True, slots=True)
class Case:
    """A fact's source and target prompt, with the tokens that correspond."""

    pair: PromptPair
    source: TokenIds
    target: TokenIds
    answers: tuple[int, int]
    """First token of the true and of the false target."""
    places: tuple[tuple[int, int], ...]
    """Source and target position of all tokens that correspond."""
    inside: Mapping[str, tuple[int, ...]]
    """Span -> which of `places` stand in it."""
    unmatched: int


def run(
    model: HookedModel,
    cases: Sequence[Case],
    cells: Sequence[Cell],
    *,
    site: Site,
    batch_tokens: int | None,
    advance: Callable[[int], object],
) -> Float[np.ndarray, "case run"]:
    """Logit o_ - logit o* of each case: of the source, of the target, and of every patch.

    Args:
        model: The model.
        cases: The facts, at least one.
        cells: The patches.
        site: What is patched.
        batch_tokens: Size of a batch in tokens.
        advance: Called with the number of patched runs that were made, cases times cells in all.
    """
    layers = tuple(dict.fromkeys(cell.layer for cell in cells))
    device = device_of(model)
    size = batch_size(device, batch_tokens)
    most_rows = max(1, READ_VALUES // int(model.cfg.d_vocab))
    differences = np.zeros((len(cases), 2 + len(cells)))  # source, target, patches
    longest = [max(case.source, case.target, key=len) for case in cases]
    for batch in batches(longest, device=device, limit=size, most_rows=most_rows):
        members = batch.members
        here = [cases[i] for i in members]
        sources = Batch.of([case.source for case in here], range(len(here)), device=device)
        targets = Batch.of([case.target for case in here], range(len(here)), device=device)
        stored: dict[int, Tensor] = {}
        reads = _reads(model, here, site, layers, stored)
        differences[members, 0] = _differences(model, sources, here, reads)[0]
        differences[members, 1] = _differences(model, targets, here, [])[0]
        rows = min(size // targets.symbols.shape[1], most_rows)
        at_once = max(1, rows // len(here))
        for start in range(0, len(cells), at_once):
            chunk = cells[start : start + at_once]
            writes = _writes(model, here, site, chunk, stored)
            found = _differences(model, targets, here, writes, copies=len(chunk))
            columns = range(2 + start, 2 + start + len(chunk))
            differences[np.ix_(members, columns)] = found.T
            advance(len(here) * len(chunk))
    return differences


def make_cases(
    pairs: Iterable[PromptPair], spans: Sequence[str], direction: Direction
) -> tuple[list[Case], list[Unscored]]:
    """The facts that can be patched at all spans, and the others with the reason."""
    cases: list[Case] = []
    left_out: list[Unscored] = []
    for pair in pairs:
        try:
            answers = pair.answers()
            if answers[0] == answers[1]:
                raise InputError("both targets start with the same token")
            whole = pair.align(direction=direction, span="all")
            inside = {
                span: tuple(
                    whole.pairs.index(place)
                    for place in pair.align(direction=direction, span=span).pairs
                )
                for span in spans
            }
        except InputError as reason:
            left_out.append(Unscored(pair.fact, pair.items[1].prompt.scheme, str(reason)))
            continue
        cases.append(
            Case(pair, whole.source, whole.target, answers, whole.pairs, inside, whole.unmatched)
        )
    return cases, left_out


def _differences(
    model: HookedModel,
    batch: Batch,
    cases: Sequence[Case],
    hooks: Sequence[NamedHook],
    *,
    copies: int = 1,
) -> np.ndarray:
    """Logit o_ - logit o* behind each row of a batch, [copy, case], with hooks on."""
    tokens = batch.symbols.repeat(copies, 1)
    rows = torch.arange(len(tokens), device=tokens.device)
    last = batch.lengths.repeat(copies) - 1
    probe = HookProbe("patching", hooks)
    logits = logits_at(model, Layout(tokens, {}), rows, last, probes=[probe]).float()
    answers = torch.tensor([case.answers for case in cases], device=tokens.device)
    chosen = logits.gather(1, answers.repeat(copies, 1))
    return (chosen[:, 1] - chosen[:, 0]).reshape(copies, len(cases)).cpu().double().numpy()


def _reads(
    model: HookedModel,
    cases: Sequence[Case],
    site: Site,
    layers: Sequence[int],
    stored: dict[int, Tensor],
) -> list[NamedHook]:
    """Hooks that store, by layer, the activations of all tokens that correspond, case by case."""
    places = [(row, i) for row, case in enumerate(cases) for i, _ in case.places]
    rows, positions = torch.tensor(places).T

    def keep_as(layer: int) -> Any:
        return lambda values: stored.update({layer: values})

    return [reading(model, site, at, rows, positions, keep_as(at)) for at in layers]


def _writes(
    model: HookedModel,
    cases: Sequence[Case],
    site: Site,
    cells: Sequence[Cell],
    stored: Mapping[int, Tensor],
) -> list[NamedHook]:
    """Hooks that make copy c of the cases the patch of cell c."""
    starts = np.cumsum([0, *(len(case.places) for case in cases)])
    hooks: list[NamedHook] = []
    for layer in dict.fromkeys(cell.layer for cell in cells):
        at = [
            (copy * len(cases) + row, case.places[n][1], int(starts[row]) + n, cell.head or 0)
            for copy, cell in enumerate(cells)
            if cell.layer == layer
            for row, case in enumerate(cases)
            for n in case.inside[cell.span]
        ]
        rows, positions, slots, heads = torch.tensor(at).T
        values = stored[layer]
        if cells[0].head is None:
            hooks += writing(model, site, layer, rows, positions, values[slots])
        else:
            chosen = values[slots, heads]
            hooks += writing(model, site, layer, rows, positions, chosen, heads=heads)
    return hooks
