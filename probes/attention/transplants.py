"""Attention transplanted from another run, prompt by prompt; see `probes.attention`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, NamedHook
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import EVERYWHERE
from hijacklens.sites import Heads, Layers, choose
from probes.attention.rows import AttentionProbe, Edit, Rows, edges, held
from probes.values.replacements import tensor_hash


def transplant(
    cache: ActivationCache | Mapping[str, Tensor],
    *,
    source: str = EVERYWHERE,
    layers: Layers = None,
    heads: Heads = None,
) -> Transplant:
    """Give the source tokens the attention that they had in another run.

    The other run is of prompts of the same length: one, whose attention goes to every prompt, or
    as many as are run. Prompts do not share tokens while this probe is on.

    Args:
        cache: Of the other run; it has `blocks.L.attn.hook_pattern` [batch, head, query, key]
            (or without batch) for the chosen layers.
        source: Span of the tokens whose attention is replaced.
        layers: One layer, several, or None for all that the cache has.
        heads: Query heads of each of these layers, or pairs (layer, head); None for all.

    Raises:
        InputError: A span that cannot be read, or a layer that is not in the cache.
    """
    held_layers, held_heads = held(layers, heads)
    patterns: dict[int, Tensor] = {}
    for name in cache.keys():  # noqa: SIM118 - an ActivationCache is iterated over its layers
        if found := re.fullmatch(r"blocks\.(\d+)\.attn\.hook_pattern", str(name)):
            pattern = cache[name].detach()
            patterns[int(found[1])] = pattern[None] if pattern.dim() == 3 else pattern
    if not patterns:
        raise InputError(
            "the cache has no pattern (blocks.L.attn.hook_pattern); run the model with run_with_"
            "cache, without a filter that leaves patterns out."
        )
    if held_layers is None and not _pairs(held_heads):
        held_layers = tuple(sorted(patterns))
    return Transplant(*edges(source, EVERYWHERE), held_layers, held_heads, patterns)


@dataclass(frozen=True, slots=True, eq=False)
class Transplant(AttentionProbe):
    """The attention of another run; see `transplant`."""

    patterns: Mapping[int, Float[Tensor, "batch head query key"]]

    @property
    def packs(self) -> bool:
        """False: which pattern a token gets depends on its prompt and place."""
        return False

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Hooks on the pattern of every chosen layer.

        Raises:
            InputError: As for all attention probes, or the layers or lengths of the other run
                are not those of this one.
        """
        chosen = choose(model, layers=self.layers, heads=self.heads, axis="head").by_layer
        length, batch = layout.key(EVERYWHERE).shape[1], len(layout.tokens)
        for layer in chosen:
            if layer not in self.patterns:
                raise InputError(
                    f"the other run has no pattern of layer {layer}; it has layers "
                    f"{sorted(self.patterns)}."
                )
            rows, heads, *sides = self.patterns[layer].shape
            if rows not in (1, batch) or sides != [length, length] or heads != model.cfg.n_heads:
                raise InputError(
                    f"the other run was of {rows} prompts of {sides[-1]} tokens with {heads} "
                    f"heads, this one is of {batch} of {length} with {model.cfg.n_heads}. Run "
                    "one prompt, or as many as here, of the same length; for prompts that differ "
                    "in length patch activations by span (probes.activations)."
                )
        return AttentionProbe.hooks(self, model, layout)

    def _words(self) -> tuple[str, list[str]]:
        hashes = {layer: tensor_hash(pattern) for layer, pattern in sorted(self.patterns.items())}
        digest = hashlib.sha256(repr(hashes).encode())
        return "transplant", [f"pattern={digest.hexdigest()[:16]}"]

    def _at_pattern(self) -> Edit | None:
        def edit(rows: Rows) -> Tensor:
            given = self.patterns[rows.layer].to(rows.values)
            prompt = rows.at_prompt if len(given) > 1 else torch.zeros_like(rows.at_prompt)
            return given[prompt, :, rows.at_key]

        return edit


def _pairs(heads: Heads) -> bool:
    return isinstance(heads, tuple) and any(isinstance(head, tuple) for head in heads)
