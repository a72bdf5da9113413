"""Activation patching: activations of one run put into another, token by corresponding token.

    patch_between(model, facts, scheme="do-not-think", dose=1, site="attn_out", layers=range(8, 12))
    patch(model, align(bare, hijacked, span="subject"), site="resid_pre", layers=5)

The source prompt is run once, when the patch is made; the patch then is a probe for its target
prompts. The two may differ in length: `hijacklens.prompts.correspondence` says which tokens
correspond. Tokens without a counterpart, such as those of hijacking sentences, are neither read nor
written. They still are attended to: a patch of the query's tokens does not hide the sentences.

What can be patched is listed in `probes.activations.places`: the residual stream, what attention
and MLP add to it, and per head z, q, k and v. `q` and `k` are taken before rotary positions, so a
patched key is turned to the place where it is put. Where positions are embedded (GPT-2), a patched
residual carries the position it was computed at.

Cost: the source run, and one copy of the activation of each chosen layer.

>>> from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
>>> from hijacklens.probe import probed
>>> model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=16))
>>> clean, other = (0, 1, 2), (3, 4, 5, 6)
>>> last = patch(model, Correspondence(clean, other, ((2, 3),)), site="attn_out")
>>> with probed(model, [last], Layout(torch.tensor([other]), {})):
...     patched = model(torch.tensor([other]))
>>> torch.equal(patched[0, 3], model(torch.tensor([clean]))[0, 2])
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batches import Batch, batches
from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import (
    HookedLanguageModel,
    HookedModel,
    NamedHook,
    device_of,
    require_eval,
)
from hijacklens.probe import HookProbe, hash_of, logits_at, spell
from hijacklens.prompts.correspondence import Correspondence
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.schemes import Scheme
from hijacklens.prompts.tokens import TokenIds
from hijacklens.scoring.pairs import Direction, pairs
from hijacklens.sites import Heads, Layers, choose, kept
from probes.activations.places import HEAD_AXES, Site, check_heads, reading, writing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patch:
    """A probe that puts stored activations into its target prompts; `patch` makes one.

    It acts on every row of a batch that begins with one of them, a scored target behind it or
    not, and leaves all others alone: so `hijacklens.hijack` may run bare and hijacked prompts
    with it on, and those it was not made for are scored as they are.
    """

    site: Site
    layers: Layers
    heads: Heads
    targets: Mapping[TokenIds, tuple[tuple[int, int], ...]]
    """Target prompt -> target position and row of `values`, for each token that is patched."""
    values: Mapping[int, Float[Tensor, "place ... width"]]
    """Layer -> activations [place, d_model], or [place, chosen head, d_head]."""

    @property
    def key(self) -> str:
        """The patched sites, and a hash of the prompts and activations."""
        stored = (item for pair in sorted(self.values.items()) for item in pair)
        return spell(
            "patch",
            patch,
            {
                "site": self.site,
                "layers": self.layers,
                "heads": self.heads,
                "prompts": len(self.targets),
                "values": hash_of(sorted(self.targets.items()), *stored),
            },
        )

    @property
    def spans(self) -> Sequence[str]:
        """None: a patch knows its tokens by their positions in the prompts it was made for."""
        return ()

    @property
    def packs(self) -> bool:
        """False: what it does to a token depends on the whole prompt."""
        return False

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """One hook per layer (two for `resid_mid`); none where no row is a target prompt.

        Raises:
            InputError: The model has no such layer, head or site, or activations of another width.
        """
        axis = HEAD_AXES.get(self.site, "head")
        chosen = choose(model, layers=self.layers, heads=self.heads, axis=axis).by_layer
        rows, positions, slots = self._places(layout)
        named: list[NamedHook] = []
        for layer, of_layer in chosen.items():
            if layer not in self.values:  # no tokens correspond
                continue
            stored = self.values[layer]
            self._check(model, stored)
            if not rows:
                continue
            values = stored[torch.tensor(slots)]
            at_row, at_position = torch.tensor(rows), torch.tensor(positions)
            heads = None
            if self.site in HEAD_AXES:
                heads = torch.tensor(of_layer).repeat(len(rows))
                at_row, at_position = (
                    place.repeat_interleave(len(of_layer)) for place in (at_row, at_position)
                )
                values = values.flatten(0, 1)
            named += writing(model, self.site, layer, at_row, at_position, values, heads=heads)
        return named

    def _check(self, model: HookedModel, stored: Tensor) -> None:
        width = int(model.cfg.d_head if self.site in HEAD_AXES else model.cfg.d_model)
        if self.site in ("q", "k"):
            width = int(getattr(model.cfg, "d_attn", width))  # the one-layer model's d_a
        if stored.shape[-1] != width:
            raise InputError(
                f"the patch holds activations of width {stored.shape[-1]}, and {self.site} of this "
                f"model has {width}: they come from another model."
            )

    def _places(self, layout: Layout) -> tuple[list[int], list[int], list[int]]:
        """Row, position and slot of every patched token of a layout."""
        tokens = layout.tokens
        past = 0
        if layout.past_tokens is not None:
            tokens = torch.cat([layout.past_tokens, tokens], dim=1)
            past = layout.past_tokens.shape[1]
        lengths = sorted({len(ids) for ids in self.targets}, reverse=True)
        rows: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for row, ids in enumerate(tokens.tolist()):
            starts = (tuple(ids[:length]) for length in lengths if length <= len(ids))
            places = next((self.targets[s] for s in starts if s in self.targets), ())
            for position, slot in places:
                if position >= past:  # earlier ones were patched when the cache was made
                    rows.append(row)
                    positions.append(position - past)
                    slots.append(slot)
        return rows, positions, slots


def patch(
    model: HookedModel,
    correspondences: Correspondence | Sequence[Correspondence],
    *,
    site: Site = "resid_post",
    layers: Layers = None,
    heads: Heads = None,
    batch_tokens: int | None = None,
) -> Patch:
    """A patch from source prompts into target prompts, at the tokens that correspond.

    Args:
        model: The model that the source prompts are run on; another checkpoint of it will do.
        correspondences: For each target prompt its source and the tokens, as
            `hijacklens.prompts.correspondence.align` gives them.
        site: What is patched; see `probes.activations.places`.
        layers: One layer, several, or None for all.
        heads: Heads of each layer, or pairs (layer, head); None for all. Query heads for `z` and
            `q`, key/value heads for `k` and `v`.
        batch_tokens: Size of a batch in tokens; by default what suits the device.

    Returns:
        A probe for the target prompts; it does not pack.

    Raises:
        InputError: The model has no such site, layer or head, heads are given for a site that has
            none, or one target prompt gets two sources.

    Note:
        Costs one forward pass over the source prompts; keeps an activation per layer, token and
        chosen head.
    """
    require_eval(model, operation="patching")
    check_heads(site, heads)
    listed = [correspondences] if isinstance(correspondences, Correspondence) else correspondences
    layers, heads = kept(layers), kept(heads)
    chosen = choose(model, layers=layers, heads=heads, axis=HEAD_AXES.get(site, "head")).by_layer
    targets = _targets(listed)
    stored: dict[int, Tensor] = {}
    for part in _sources(listed, device_of(model), batch_tokens):
        batch, rows, positions, slots = part

        def keep(layer: int, slots: Tensor) -> Callable[[Tensor], None]:
            def function(values: Tensor) -> None:
                if site in HEAD_AXES:
                    values = values[:, list(chosen[layer])]
                if layer not in stored:
                    total = sum(len(each.pairs) for each in listed)
                    stored[layer] = values.new_empty(total, *values.shape[1:], device="cpu")
                stored[layer][slots] = values.cpu()

            return function

        named = [reading(model, site, at, rows, positions, keep(at, slots)) for at in chosen]
        recorder = HookProbe("source run", named)
        one = torch.zeros_like(batch.lengths[:1])  # logits have to be read somewhere
        logits_at(model, Layout(batch.symbols, {}), one, one, probes=[recorder])
    return Patch(
        site=site,
        layers=layers,
        heads=heads,
        targets=targets,
        # Copies, since tensors made under inference mode cannot take part in gradients.
        values={layer: values.clone() for layer, values in stored.items()},
    )


def patch_between(
    model: HookedLanguageModel,
    facts: FactSet,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    direction: Direction = "denoise",
    span: str = "query",
    site: Site = "resid_post",
    layers: Layers = None,
    heads: Heads = None,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Patch:
    """A patch between the bare and the hijacked prompt of every fact.

    `hijacklens.hijack(model, facts, doses=[dose], probes=[patch_between(model, facts, dose=dose)])`
    then scores the facts with it on.

    Args:
        model: A hooked language model.
        facts: The facts; schemes that draw other targets draw them among these.
        scheme: The name of a registered scheme, or a scheme.
        dose: How many sentences stand before the query of the hijacked prompt.
        direction: `denoise` puts the clean (bare) run into the hijacked prompt, `noise` the
            hijacked run into the bare one.
        span: The tokens that are patched, such as `subject`, `last`, `query` or `query+bos`.
        site: What is patched; see `probes.activations.places`.
        layers: As for `patch`.
        heads: As for `patch`.
        seed: Seeds what the scheme draws.
        batch_tokens: Size of a batch in tokens; by default what suits the device.

    Raises:
        InputError: As for `patch`; or the tokens of a fact's two prompts do not correspond, or a
            target does not start behind a prompt, so that scoring would run a prompt that the
            patch does not know. The message names the fact.
    """
    found = []
    for pair in pairs(model, facts, scheme=scheme, dose=dose, seed=seed):
        try:
            pair.answers()
            found.append(pair.align(direction=direction, span=span))
        except InputError as reason:
            raise InputError(f"fact {pair.fact.case_id} cannot be patched: {reason}") from reason
    return patch(model, found, site=site, layers=layers, heads=heads, batch_tokens=batch_tokens)


def _targets(
    correspondences: Sequence[Correspondence],
) -> dict[TokenIds, tuple[tuple[int, int], ...]]:
    """Target prompt -> target position and slot of each pair; slots count through all pairs."""
    sources: dict[TokenIds, Correspondence] = {}
    targets: dict[TokenIds, tuple[tuple[int, int], ...]] = {}
    slot = 0
    for each in correspondences:
        known = sources.setdefault(each.target, each)
        if (known.source, known.pairs) != (each.source, each.pairs):
            raise InputError(
                "one target prompt gets activations from two sources, such as two facts with the "
                "same bare query; a patch holds one for each. Patch them one after the other."
            )
        targets[each.target] = tuple((j, slot + n) for n, (_, j) in enumerate(each.pairs))
        slot += len(each.pairs)
    return targets


def _sources(
    correspondences: Sequence[Correspondence], device: torch.device, batch_tokens: int | None
) -> Iterable[tuple[Batch, Tensor, Tensor, Tensor]]:
    """Source prompts in batches, with row, position and slot of the tokens to read."""
    counts = [len(each.pairs) for each in correspondences]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    rows = [each.source for each in correspondences]
    for batch in batches(rows, device=device, limit=batch_tokens):
        at = [
            (row, i, starts[member] + n)
            for row, member in enumerate(batch.members)
            for n, (i, _) in enumerate(correspondences[member].pairs)
        ]
        if at:
            places = torch.tensor(at, dtype=torch.long)
            yield batch, places[:, 0], places[:, 1], places[:, 2]
