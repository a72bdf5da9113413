"""Patching sweeps: which activations carry the shift, layer by layer, at which tokens and heads.

For every prompt pair the bare and the hijacked prompt are run, and then the target prompt once for
each patch: a layer at the tokens of a span, or one head of a layer. Tokens without a counterpart,
such as those of the hijacking sentences, are never patched (`hijacklens.prompts.correspondence`).

    result = sweep(model, pairs, BySpan(site="attn_out"))
    result.summary()          # the fraction of the shift that each patch undoes, with intervals
    result.plot()
    sweep(model, pairs, ByHead(site="z"), direction="noise")

Spans may overlap: `query` includes `subject` and `last`. Effects of patches in several layers do
not add up, and patches of `resid_pre` and `resid_post` contain each other: after the stream is
patched at all tokens of the query, later layers continue from clean values there, but still attend
to the sentences. Corresponding tokens are equal, so a patch of `resid_pre` in the first layer
changes nothing unless positions are embedded (GPT-2). The first word of a query that is written
differently after a sentence ("The", " The"), or opens its prompt, is not patched. Facts whose
subject has such a token are skipped for the span `subject`; an opening before all prompts
(`facts.with_opening("Well.")`) keeps them.

Cost: one forward pass of the target prompts for each patch. A batch of facts is run on its source
prompts, on its target prompts, and on as many copies of these as fit, one for each patch.
Memory: the activations of one batch of source prompts at the site, in all patched layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batch_size import read_values
from hijacklens.engine.batches import TokenBatch, batch_size, batches, needs_one_length
from hijacklens.errors import InputError, choice, one_of_type
from hijacklens.models.agreement import require_agreement
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedLanguageModel, HookedModel, NamedHook, device_of
from hijacklens.models.identity import identify
from hijacklens.probe import HookProbe, logits_at
from hijacklens.progress import bar
from hijacklens.prompts.correspondence import Correspondence
from hijacklens.prompts.layout import Layout
from hijacklens.results.result import Provenance
from hijacklens.scoring.pairs import (
    DIRECTIONS,
    SAME_FIRST_TOKEN,
    Direction,
    Pair,
    Pairs,
    takes_facts,
)
from hijacklens.sites import Heads, Layers
from probes.activation_sites import HEAD_AXES, Site, choose_sites, reading, writing
from probes.patching.result import PATCH_COLUMNS, PatchingSettings, PatchingSweep

DEFAULT_SPANS = ("query", "subject", "last")


@dataclass(frozen=True, slots=True)
class Cell:
    """One patch: a layer at a span, or one head of it there."""

    layer: int
    span: str
    head: int | None


@dataclass(frozen=True, slots=True)
class _Case:
    """A prompt pair in the direction of a patch."""

    pair: Pair
    answers: tuple[int, int]
    """First token of the true and of the false target."""
    where: Correspondence
    """The source and the target prompt, with all tokens that correspond."""
    inside: Mapping[str, tuple[int, ...]]
    """Span -> indices of the pairs of tokens in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BySpan:
    """Patch every layer at every span, one at a time."""

    site: Site = "resid_pre"
    """What is patched; see `probes.activation_sites`. All heads of `z`, `q`, `k` and `v`."""
    spans: Sequence[str] = DEFAULT_SPANS
    """The tokens that are patched; each span has tokens in the query, or is `bos`."""
    layers: Layers = None
    """One layer, several, or None for all."""

    def cells(self, model: HookedModel) -> tuple[str, list[Cell]]:
        """Return what the columns of the map count, and the patches."""
        spans = dict.fromkeys([self.spans] if isinstance(self.spans, str) else self.spans)
        if not spans:
            raise InputError("name at least one span to patch, such as 'query' or 'last'.")
        layers = choose_sites(model, self.site, layers=self.layers).by_layer
        return "span", [Cell(layer, span, None) for layer in layers for span in spans]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByHead:
    """Patch every head of every layer, one at a time, at the tokens of one span."""

    site: Site = "z"
    """`z` (what a head writes) or `q`, by query heads; `k` or `v`, by key/value heads."""
    span: str = "query"
    """The tokens that are patched; by default all that correspond except a BOS."""
    layers: Layers = None
    """One layer, several, or None for all."""
    heads: Heads = None
    """Heads of each layer, or pairs (layer, head); None for all."""

    def cells(self, model: HookedModel) -> tuple[str, list[Cell]]:
        """Return which heads the columns of the map count, and the patches."""
        if self.site not in HEAD_AXES:
            raise InputError(
                f"{self.site!r} is not split into heads; use one of {', '.join(HEAD_AXES)}."
            )
        sites = choose_sites(model, self.site, layers=self.layers, heads=self.heads)
        return HEAD_AXES[self.site], [Cell(layer, self.span, head) for layer, head in sites.pairs]


@takes_facts
@exclusively
def sweep(
    model: HookedLanguageModel,
    pairs: Pairs,
    patches: BySpan | ByHead | None = None,
    *,
    direction: Direction = "denoise",
    batch_tokens: int | None = None,
    quiet: bool = False,
) -> PatchingSweep:
    """Patch one site after another in every prompt pair.

    Args:
        model: A hooked language model.
        pairs: The prompt pairs, as `hl.pairs(model, facts)` makes them.
        patches: `BySpan(...)`, the default, or `ByHead(...)`.
        direction: `denoise` puts the clean (bare) run into the hijacked prompt, `noise` the
            hijacked run into the bare one.
        batch_tokens: Size of a batch in tokens; by default what suits the device.
        quiet: Draw no progress bar.

    Raises:
        InputError: No span, an unknown site, layer, head or span, a site that is not split into
            heads, a model in training mode, or no pair that could be patched.
    """
    patches = BySpan() if patches is None else patches
    require_agreement(model, operation="patching")
    one_of_type("pairs", pairs, Pairs, "hl.pairs(model, facts)")
    choice("direction", direction, DIRECTIONS)
    axis, cells = patches.cells(model)
    layers = list(dict.fromkeys(cell.layer for cell in cells))
    spans = list(dict.fromkeys(cell.span for cell in cells))
    cases, usable = _make_cases(pairs, spans, direction)
    usable.require("patched")
    total = len(cases) * len(cells)
    with bar(total=total, unit="patches", label=pairs.model, quiet=quiet) as progress:
        differences = run(model, cases, cells, patches.site, batch_tokens, progress.update)
    finite = [bool(np.isfinite(row).all()) for row in differences]
    reason = "the model gave logits that are not finite"
    usable = usable.without(None if fine else reason for fine in finite)
    usable.require("patched")
    rows = [(case, differences[i]) for i, case in enumerate(cases) if finite[i]]
    return PatchingSweep(
        patches=_table(rows, cells, direction),
        skipped=usable.skipped,
        settings=PatchingSettings(
            model=identify(model),
            facts=pairs.facts.record(),
            scheme=pairs.scheme.record(),
            dose=pairs.dose,
            direction=direction,
            site=patches.site,
            axis=axis,
            layers=tuple(layers),
            spans=tuple(spans),
            seed=pairs.seed,
        ),
        provenance=Provenance.now(seed=pairs.seed),
    )


def sweep_spans(model: HookedLanguageModel, facts: Any, **options: Any) -> PatchingSweep:
    """Call `sweep` with `BySpan` by its old name and arguments; for one release."""
    return _sweep_by(BySpan, model, facts, options)


def sweep_heads(model: HookedLanguageModel, facts: Any, **options: Any) -> PatchingSweep:
    """Call `sweep` with `ByHead` by its old name and arguments; for one release."""
    return _sweep_by(ByHead, model, facts, options)


def _sweep_by(kind: Any, model: Any, facts: Any, options: dict[str, Any]) -> PatchingSweep:
    names = [field.name for field in fields(kind) if field.name in options]
    patches = kind(**{name: options.pop(name) for name in names})
    return sweep(model, facts, patches, **options)


def _table(
    cases: Sequence[tuple[_Case, np.ndarray]], cells: Sequence[Cell], direction: Direction
) -> pd.DataFrame:
    ends = ("clean", "hijacked") if direction == "denoise" else ("hijacked", "clean")
    rows = [
        {
            "case_id": case.pair.fact.case_id,
            "relation_id": case.pair.fact.relation_id,
            "subject": case.pair.fact.subject,
            **asdict(cell),
            **dict(zip(ends, differences, strict=False)),
            "patched": patched,
            "unmatched": case.where.unmatched,
        }
        for case, differences in sorted(cases, key=lambda each: each[0].pair.fact.case_id)
        for cell, patched in zip(cells, differences[2:], strict=True)
    ]
    return pd.DataFrame(rows)[list(PATCH_COLUMNS)].astype({"head": "Int64"})


def _make_cases(
    pairs: Pairs, spans: Sequence[str], direction: Direction
) -> tuple[list[_Case], Pairs]:
    """Return the pairs that can be patched at all spans, as cases and without the others."""
    cases: list[_Case] = []
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
            cases.append(_Case(pair, answers, where, inside))
    return cases, pairs.without(reasons)


def run(
    model: HookedModel,
    cases: Sequence[_Case],
    cells: Sequence[Cell],
    site: Site,
    batch_tokens: int | None,
    advance: Callable[[int], object],
) -> Float[np.ndarray, "case run"]:
    """Return logit o_ - logit o* of each case: for the source, the target, and every patch."""
    layers = tuple(dict.fromkeys(cell.layer for cell in cells))
    device = device_of(model)
    size = batch_size(device, batch_tokens)
    most_rows = max(1, read_values(device) // int(model.cfg.d_vocab))
    differences = np.zeros((len(cases), 2 + len(cells)))  # source, target, patches
    longest = [max(case.where.source, case.where.target, key=len) for case in cases]
    # A source may differ in length from the next one although the longer prompts do not.
    together = 1 if needs_one_length(model) else most_rows
    for batch in batches(model, longest, limit=size, most_rows=together):
        members = batch.members
        here = [cases[i] for i in members]
        sources, targets = (
            TokenBatch.of(prompts, range(len(here)), device=device)
            for prompts in zip(
                *((case.where.source, case.where.target) for case in here), strict=True
            )
        )
        stored: dict[int, Tensor] = {}  # layer -> activations of all tokens that correspond
        at = [(row, i) for row, case in enumerate(here) for i, _ in case.where.pairs]
        rows, positions = torch.tensor(at).T
        reads = [reading(site, i, rows, positions, partial(stored.__setitem__, i)) for i in layers]
        differences[members, 0] = _differences(model, sources, here, reads)[0]
        differences[members, 1] = _differences(model, targets, here, [])[0]
        at_once = max(1, min(size // targets.symbols.shape[1], most_rows) // len(here))
        for start in range(0, len(cells), at_once):
            chunk = cells[start : start + at_once]
            writes = _writes(model, here, site, chunk, stored)
            patched = _differences(model, targets, here, writes, copies=len(chunk))
            columns = range(2 + start, 2 + start + len(chunk))
            differences[np.ix_(members, columns)] = patched.T
            advance(len(here) * len(chunk))
    return differences


def _differences(
    model: HookedModel,
    batch: TokenBatch,
    cases: Sequence[_Case],
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


def _writes(
    model: HookedModel,
    cases: Sequence[_Case],
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
        whole = cells[0].head is None
        values = stored[layer][slots] if whole else stored[layer][slots, heads]
        of_heads = None if whole else heads
        hooks += writing(site, layer, rows, positions, values, heads=of_heads)
    return hooks
