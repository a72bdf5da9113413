"""Activation patching: put activations of one run into another, at the corresponding tokens.

    patch_between(model, hl.pairs(model, facts), site="attn_out", layers=range(8, 12))
    patch(model, align(bare, hijacked, span="subject"), site="resid_pre", layers=5)

The source prompt is run once, when the patch is made; the patch is then a probe for its target
prompt, which may differ in length (`hijacklens.prompts.correspondence` defines which tokens
correspond). Tokens without a counterpart, such as those of hijacking sentences, are neither read
nor written, but they remain visible to attention.

`probes.activation_sites` lists the sites. `q` and `k` are taken before rotary positions, so a
patched key takes the position of its target. With learned positions (GPT-2), a patched residual
carries the position of its source. The cost is the source run, and one copy of the activation of
each chosen layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.engine.batches import batches
from hijacklens.errors import InputError
from hijacklens.models.agreement import require_agreement
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedLanguageModel, HookedModel, NamedHook
from hijacklens.probe import HookProbe, hash_of, logits_at, spell
from hijacklens.prompts.correspondence import Correspondence
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds
from hijacklens.scoring.pairs import Direction, Pairs, takes_facts
from hijacklens.sites import Heads, Layers, canonical
from probes.activation_sites import HEAD_AXES, Site, choose_sites, reading, writing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patch:
    """A probe that puts stored activations into its target prompts; made by `patch`.

    It acts on every row of a batch that begins with a target prompt, whether or not a scored
    target follows it, and does not change other rows. So `hijacklens.hijack` can run bare and
    hijacked prompts with it on, and scores all other prompts as they are.
    """

    site: Site
    layers: Layers
    heads: Heads
    targets: Mapping[TokenIds, tuple[tuple[int, int], ...]]
    """Target prompt -> target position and row of `values`, for each patched token."""
    values: Mapping[int, Float[Tensor, "token ... width"]]
    """Layer -> activations [token, d_model], or [token, chosen head, d_head]."""

    @property
    def key(self) -> str:
        """The patched sites, and a hash of the prompts and activations."""
        stored = (item for pair in sorted(self.values.items()) for item in pair)
        options = {"site": self.site, "layers": self.layers, "heads": self.heads}
        values = hash_of(sorted(self.targets.items()), *stored)
        return spell("patch", patch, {**options, "prompts": len(self.targets), "values": values})

    @property
    def spans(self) -> Sequence[str]:
        """None: a patch identifies tokens by their positions in its target prompts."""
        return ()

    @property
    def packs(self) -> bool:
        """False: the effect on a token depends on the complete prompt."""
        return False

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return one hook per layer (four for `resid_mid`); none if no row is a target prompt.

        Raises:
            InputError: The model has no such layer, head or site; in the forward pass, if its
                activations have another width or `resid_mid` is not a sum.
        """
        sites = choose_sites(model, self.site, layers=self.layers, heads=self.heads)
        rows, positions, slots = self._tokens(layout)
        named: list[NamedHook] = []
        for layer, of_layer in sites.by_layer.items():
            if layer not in self.values:  # no tokens correspond
                continue
            if not len(rows):
                continue
            new = self.values[layer][slots]
            if self.site in HEAD_AXES:
                at, heads = (rows[:, None], positions[:, None]), torch.tensor(of_layer)
                named += writing(self.site, layer, *at, new, heads=heads)
            else:
                named += writing(self.site, layer, rows, positions, new)
        return named

    def _tokens(self, layout: Layout) -> Int[Tensor, "3 token"]:
        """Return row, position and slot of every patched token of a layout."""
        tokens, past = layout.tokens, 0
        if layout.past_tokens is not None:
            tokens = torch.cat([layout.past_tokens, tokens], dim=1)
            past = layout.past_tokens.shape[1]
        lengths = sorted({len(ids) for ids in self.targets}, reverse=True)
        patched: list[tuple[int, int, int]] = []
        for row, ids in enumerate(tokens.tolist()):
            starts = (tuple(ids[:length]) for length in lengths if length <= len(ids))
            target = next((self.targets[s] for s in starts if s in self.targets), ())
            patched += [
                (row, position - past, slot)
                for position, slot in target
                if position >= past  # earlier ones were patched when the cache was made
            ]
        return torch.tensor(patched, dtype=torch.long).reshape(-1, 3).T


@exclusively
def patch(
    model: HookedModel,
    correspondences: Correspondence | Sequence[Correspondence],
    *,
    site: Site = "resid_post",
    layers: Layers = None,
    heads: Heads = None,
    batch_tokens: int | None = None,
) -> Patch:
    """Patch activations of source prompts into target prompts, at the corresponding tokens.

    Args:
        model: The model on which the source prompts are run; another checkpoint works too.
        correspondences: For each target prompt its source and tokens, made by
            `hijacklens.prompts.correspondence.align`.
        site: The patched site; see `probes.activation_sites`.
        layers: One layer, several, or None for all.
        heads: Heads of each layer, or pairs (layer, head); None for all. Query heads for `z` and
            `q`, key/value heads for `k` and `v`.
        batch_tokens: Size of a batch in tokens; by default as the device allows.

    Returns:
        A probe for the target prompts; it does not pack.

    Raises:
        InputError: The model has no such site, layer or head, heads are given for a site without
            heads, or one target prompt gets two sources.

    Note:
        The cost is one forward pass over the source prompts. The patch keeps an activation per
        layer, token and chosen head.
    """
    require_agreement(model, operation="patching")
    listed = [correspondences] if isinstance(correspondences, Correspondence) else correspondences
    layers, heads = canonical(layers, heads)
    sites = choose_sites(model, site, layers=layers, heads=heads).by_layer
    starts = list(accumulate((len(each.pairs) for each in listed), initial=0))
    targets = _targets(listed, starts)
    stored: dict[int, Tensor] = {}

    def keep(layer: int, slots: Tensor, values: Tensor) -> None:
        if site in HEAD_AXES:
            values = values[:, list(sites[layer])]
        if layer not in stored:
            stored[layer] = values.new_empty(starts[-1], *values.shape[1:], device="cpu")
        stored[layer][slots] = values.cpu()

    prompts = [each.source for each in listed]
    for batch in batches(model, prompts, limit=batch_tokens):
        tokens = [
            (row, i, starts[member] + n)
            for row, member in enumerate(batch.members)
            for n, (i, _) in enumerate(listed[member].pairs)
        ]
        if not tokens:
            continue
        rows, positions, slots = torch.tensor(tokens).T
        reads = [reading(site, at, rows, positions, partial(keep, at, slots)) for at in sites]
        first = torch.zeros_like(batch.lengths[:1])
        recorder = HookProbe("source run", reads)
        logits_at(model, Layout(batch.symbols, {}), first, first, probes=[recorder])
    return Patch(
        site=site,
        layers=layers,
        heads=heads,
        targets=targets,
        # Copies, since tensors of inference mode cannot be used with gradients.
        values={layer: values.clone() for layer, values in stored.items()},
    )


@takes_facts
def patch_between(
    model: HookedLanguageModel,
    pairs: Pairs,
    *,
    direction: Direction = "denoise",
    span: str = "query",
    site: Site = "resid_post",
    layers: Layers = None,
    heads: Heads = None,
    batch_tokens: int | None = None,
) -> Patch:
    """Patch between the bare and the hijacked prompt of every fact.

    `hl.hijack(model, pairs.facts, doses=[pairs.dose], probes=[patch_between(model, pairs)])` then
    scores the facts with the patch on.

    The `direction` `denoise` puts the clean (bare) run into the hijacked prompt, `noise` the
    hijacked run into the bare one. `span` names the patched tokens, such as `subject`, `last`,
    `query` or `query+bos`. The other arguments are those of `patch`.

    Raises:
        InputError: As for `patch`; or the tokens of a fact's two prompts do not correspond, or a
            target does not start after the prompt, so that scoring would run a prompt that is not
            a target of the patch. The message names the fact.
    """
    correspondences = []
    for pair in pairs:
        try:
            pair.answers()
            correspondences.append(pair.align(direction=direction, span=span))
        except InputError as reason:
            raise InputError(f"fact {pair.fact.case_id} cannot be patched: {reason}") from reason
    return patch(
        model, correspondences, site=site, layers=layers, heads=heads, batch_tokens=batch_tokens
    )


def _targets(
    correspondences: Sequence[Correspondence], starts: Sequence[int]
) -> dict[TokenIds, tuple[tuple[int, int], ...]]:
    """Return target prompt -> target position and slot of each pair; slots number all pairs."""
    sources: dict[TokenIds, Correspondence] = {}
    targets: dict[TokenIds, tuple[tuple[int, int], ...]] = {}
    for each, start in zip(correspondences, starts, strict=False):
        known = sources.setdefault(each.target, each)
        if (known.source, known.pairs) != (each.source, each.pairs):
            raise InputError(
                "one target prompt gets activations from two sources, such as two facts with the "
                "same bare query; a patch has one source for each. Use a separate patch for each."
            )
        targets[each.target] = tuple((j, start + n) for n, (_, j) in enumerate(each.pairs))
    return targets
