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
to the sentences. In the first layer the prompts differ only in how the first word is written
(" The", "The") and in positions where these are embedded (GPT-2), and so does a patch of
`resid_pre` there.

Cost: one forward pass of the target prompts for each patch; facts and patches share batches.
Memory: the activations of one batch of source prompts at the site, in all patched layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from hijacklens.errors import InputError, choice, one_of_type
from hijacklens.models.hooked import HookedLanguageModel, HookedModel, require_eval
from hijacklens.models.identity import identify
from hijacklens.progress import bar
from hijacklens.results.result import Provenance
from hijacklens.scoring.pairs import DIRECTIONS, Direction, Pairs, takes_facts
from hijacklens.sites import Heads, Layers, choose
from probes.activation_sites import HEAD_AXES, Site, hook_name
from probes.patching.result import PATCH_COLUMNS, PatchingSettings, PatchingSweep
from probes.patching.runs import Case, Cell, make_cases, run

DEFAULT_SPANS = ("query", "subject", "last")


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
        """Return what the columns of the map count, and the patches.

        Raises:
            InputError: There is no span, or no such layer.
        """
        spans = dict.fromkeys([self.spans] if isinstance(self.spans, str) else self.spans)
        if not spans:
            raise InputError("name at least one span to patch, such as 'query' or 'last'.")
        layers = choose(model, layers=self.layers).by_layer
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
        """Return which heads the columns of the map count, and the patches.

        Raises:
            InputError: The site is not split into heads, or there is no such layer or head.
        """
        if self.site not in HEAD_AXES:
            raise InputError(
                f"{self.site!r} is not split into heads; use one of {', '.join(HEAD_AXES)}."
            )
        axis = HEAD_AXES[self.site]
        sites = choose(model, layers=self.layers, heads=self.heads, axis=axis)
        return axis, [Cell(layer, self.span, head) for layer, head in sites.pairs]


@takes_facts
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
        pairs: The prompt pairs, as `hl.pairs(model, facts)` makes them; their seed also seeds the
            bootstrap.
        patches: `BySpan(...)`, the default, or `ByHead(...)`.
        direction: `denoise` puts the clean (bare) run into the hijacked prompt, `noise` the
            hijacked run into the bare one.
        batch_tokens: Size of a batch in tokens; by default what suits the device.
        quiet: Draw no progress bar.

    Returns:
        The result; `summary()` is its table, `plot()` its heat map, and `settings.axis` says
        which heads its column `head` counts.

    Raises:
        InputError: No span, an unknown site, layer, head or span, a model in training mode, or no
            pair that could be patched.

    Note:
        Costs a forward pass of every prompt for each patch.
    """
    patches = BySpan() if patches is None else patches
    require_eval(model, operation="patching")
    one_of_type("pairs", pairs, Pairs, "hl.pairs(model, facts)")
    choice("direction", direction, DIRECTIONS)
    axis, cells = patches.cells(model)
    layers = list(dict.fromkeys(cell.layer for cell in cells))
    spans = list(dict.fromkeys(cell.span for cell in cells))
    for layer in layers:
        hook_name(model, patches.site, layer)
    identity, facts = identify(model), pairs.facts
    cases, usable = make_cases(pairs, spans, direction)
    usable.require("patched")
    total = len(cases) * len(cells)
    with bar(total=total, unit="patches", label=identity.name, quiet=quiet) as progress:
        differences = run(
            model,
            cases,
            cells,
            site=patches.site,
            batch_tokens=batch_tokens,
            advance=progress.update,
        )
    finite = np.atleast_1d(np.isfinite(differences).all(axis=1))
    reason = "the model gave logits that are not finite"
    usable = usable.without(None if fine else reason for fine in finite)
    usable.require("patched")
    cases = [case for case, fine in zip(cases, finite, strict=True) if fine]
    return PatchingSweep(
        patches=_table(cases, cells, differences[finite], direction),
        skipped=usable.skipped,
        settings=PatchingSettings(
            model=identity,
            facts=facts.record(),
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
            "unmatched": cases[i].where.unmatched,
        }
        for i in order
        for column, cell in enumerate(cells)
    ]
    return pd.DataFrame(rows)[list(PATCH_COLUMNS)].astype({"head": "Int64"})
