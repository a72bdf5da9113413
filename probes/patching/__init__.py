"""Patching sweeps: which activations carry the shift, layer by layer, at which tokens and heads.

For every fact the bare and the hijacked prompt are run, and then the target prompt once for each
patch: a layer at the tokens of a span, or one head of a layer. Tokens without a counterpart, such
as those of the hijacking sentences, are never patched (`hijacklens.prompts.correspondence`).

    result = sweep_spans(model, facts, scheme="do-not-think", dose=1, site="attn_out")
    result.summary()          # the share of the shift that each patch undoes, with intervals
    result.plot()
    sweep_heads(model, facts, site="z", direction="noise")

Spans may overlap: `query` has `subject` and `last` in it. Patches of several layers do not add up,
and those of `resid_pre` and `resid_post` contain each other: after a patch of the stream at all
tokens of the query, later layers go on from clean values there, but still see the sentences. In the
first layer the two prompts differ by how the first word is written (" The", "The") and, where they
are embedded (GPT-2), by positions; what a patch of `resid_pre` does there is due to that alone.

Cost: one forward pass of the target prompts for each patch. Facts and patches share batches, so
few facts take as little time per patch as many. Memory: the activations of one batch of source
prompts at the site, in all chosen layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from hijacklens.errors import InputError, unknown
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import HookedLanguageModel, require_eval
from hijacklens.models.identity import ModelIdentity, identify
from hijacklens.progress import bar
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.results.provenance import Provenance
from hijacklens.scoring.items import Unscored, skipped_table
from hijacklens.scoring.pairs import DIRECTIONS, Direction, prompt_pairs
from hijacklens.sites import Heads, Layers, choose
from probes.activations.places import HEAD_AXES, Site, hook_name
from probes.patching.result import PATCH_COLUMNS, PatchingSweep
from probes.patching.runs import Case, Cell, make_cases, run

DEFAULT_SPANS = ("query", "subject", "last")


def sweep_spans(
    model: HookedLanguageModel,
    facts: FactSet,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    site: Site = "resid_pre",
    spans: Sequence[str] = DEFAULT_SPANS,
    layers: Layers = None,
    direction: Direction = "denoise",
    seed: int = 0,
    batch_tokens: int | None = None,
    quiet: bool = False,
) -> PatchingSweep:
    """Patch every layer at every span, one at a time.

    Args:
        model: A hooked language model.
        facts: The facts, e.g. `atlas()` or `counterfact(...).sample(200)`.
        scheme: The name of a registered scheme, or a scheme.
        dose: How many sentences stand before the query of the hijacked prompt, at least 1.
        site: What is patched; see `probes.activations.places`. All heads of `z`, `q`, `k` and `v`.
        spans: The tokens that are patched; each span has tokens in the query, or is `bos`.
        layers: One layer, several, or None for all.
        direction: `denoise` puts the clean (bare) run into the hijacked prompt, `noise` the
            hijacked run into the bare one.
        seed: Seeds what the scheme draws, and the bootstrap.
        batch_tokens: Size of a batch in tokens; by default what suits the device.
        quiet: Draw no progress bar.

    Returns:
        The result; `summary()` is its table, `plot()` its heat map.

    Raises:
        InputError: No facts, no span, an unknown scheme, site, layer or span, a dose below 1, a
            model in training mode, or not one fact that could be patched.

    Note:
        Costs a forward pass of every prompt for each layer and span.
    """
    named = tuple(dict.fromkeys([spans] if isinstance(spans, str) else spans))
    if not named:
        raise InputError("name at least one span to patch, such as 'query' or 'last'.")
    chosen = choose(model, layers=layers).by_layer
    cells = [Cell(layer, span, None) for layer in chosen for span in named]
    return _sweep(
        model,
        facts,
        cells,
        site=site,
        axis="span",
        scheme=get_scheme(scheme),
        dose=dose,
        direction=direction,
        seed=seed,
        batch_tokens=batch_tokens,
        quiet=quiet,
    )


def sweep_heads(
    model: HookedLanguageModel,
    facts: FactSet,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    site: Site = "z",
    span: str = "query",
    layers: Layers = None,
    heads: Heads = None,
    direction: Direction = "denoise",
    seed: int = 0,
    batch_tokens: int | None = None,
    quiet: bool = False,
) -> PatchingSweep:
    """Patch every head of every layer, one at a time, at the tokens of one span.

    Args:
        model: A hooked language model.
        facts: The facts.
        scheme: The name of a registered scheme, or a scheme.
        dose: How many sentences stand before the query of the hijacked prompt, at least 1.
        site: `z` (what a head writes) or `q`, by query heads; `k` or `v`, by key/value heads.
        span: The tokens that are patched: by default all that correspond but a BOS.
        layers: One layer, several, or None for all.
        heads: Heads of each layer, or pairs (layer, head); None for all.
        direction: As for `sweep_spans`.
        seed: Seeds what the scheme draws, and the bootstrap.
        batch_tokens: Size of a batch in tokens; by default what suits the device.
        quiet: Draw no progress bar.

    Returns:
        The result; `settings["axis"]` says which heads its column `head` counts.

    Raises:
        InputError: As `sweep_spans`; or the site is not split into heads.

    Note:
        Costs a forward pass of every prompt for each head.
    """
    if site not in HEAD_AXES:
        raise InputError(f"{site!r} is not split into heads; use one of {', '.join(HEAD_AXES)}.")
    axis = HEAD_AXES[site]
    chosen = choose(model, layers=layers, heads=heads, axis=axis)
    return _sweep(
        model,
        facts,
        [Cell(layer, span, head) for layer, head in chosen.pairs],
        site=site,
        axis=axis,
        scheme=get_scheme(scheme),
        dose=dose,
        direction=direction,
        seed=seed,
        batch_tokens=batch_tokens,
        quiet=quiet,
    )


def _sweep(
    model: HookedLanguageModel,
    facts: FactSet,
    cells: Sequence[Cell],
    *,
    site: Site,
    axis: str,
    scheme: Scheme,
    dose: int,
    direction: Direction,
    seed: int,
    batch_tokens: int | None,
    quiet: bool,
) -> PatchingSweep:
    require_eval(model, operation="patching")
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    layers = tuple(dict.fromkeys(cell.layer for cell in cells))
    spans = tuple(dict.fromkeys(cell.span for cell in cells))
    for layer in layers:
        hook_name(model, site, layer)
    identity = identify(model)
    pairs, unscored = prompt_pairs(model, facts, scheme=scheme, dose=dose, seed=seed)
    cases, left_out = make_cases(pairs, spans, direction)
    unscored += left_out
    differences = np.zeros((0, 2 + len(cells)))
    if cases:
        total = len(cases) * len(cells)
        with bar(total=total, unit="patches", label=identity.name, quiet=quiet) as progress:
            differences = run(
                model,
                cases,
                cells,
                site=site,
                batch_tokens=batch_tokens,
                advance=progress.update,
            )
    finite = np.atleast_1d(np.isfinite(differences).all(axis=1))
    unscored += [
        Unscored(case.pair.fact, scheme.name, "the model gave logits that are not finite")
        for case, fine in zip(cases, finite, strict=True)
        if not fine
    ]
    if not finite.any():
        raise InputError(
            f"none of the {len(facts)} facts could be patched; the first reason: "
            f"{unscored[0].reason}"
        )
    kept = [case for case, fine in zip(cases, finite, strict=True) if fine]
    return PatchingSweep(
        patches=_table(kept, cells, differences[finite], direction),
        skipped=_skipped(facts, unscored, identity),
        settings={
            "models": [asdict(identity)],
            "facts": {
                "name": facts.name,
                "n": len(facts),
                "hash": facts.content_hash(),
                "note": facts.note,
            },
            "scheme": asdict(scheme),
            "dose": dose,
            "direction": direction,
            "site": site,
            "axis": axis,
            "layers": list(layers),
            "spans": list(spans),
            "seed": seed,
        },
        provenance=Provenance.now(seed=seed),
    )


def _table(
    cases: Sequence[Case], cells: Sequence[Cell], differences: np.ndarray, direction: Direction
) -> pd.DataFrame:
    ends = ("clean", "hijacked") if direction == "denoise" else ("hijacked", "clean")
    order = sorted(range(len(cases)), key=lambda i: cases[i].pair.fact.case_id)
    rows = [
        {
            "case_id": (fact := cases[i].pair.fact).case_id,
            "relation_id": fact.relation_id,
            "subject": fact.subject,
            **asdict(cell),
            ends[0]: differences[i, 0],
            ends[1]: differences[i, 1],
            "patched": differences[i, 2 + column],
            "unmatched": cases[i].unmatched,
        }
        for i in order
        for column, cell in enumerate(cells)
    ]
    return pd.DataFrame(rows)[list(PATCH_COLUMNS)].astype({"head": "Int64"})


def _skipped(facts: FactSet, unscored: Sequence[Unscored], identity: ModelIdentity) -> pd.DataFrame:
    unread = [
        (identity.name, row.case_id, row.relation_id, row.subject, "all", row.reason)
        for row in facts.skipped
    ]
    left_out = [
        (
            identity.name,
            row.fact.case_id,
            row.fact.relation_id,
            row.fact.subject,
            row.scheme,
            row.reason,
        )
        for row in unscored
    ]
    return skipped_table([*unread, *left_out])
