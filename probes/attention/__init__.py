"""Attention probes: knock out, rescale or redirect the attention from source to target tokens.

    attention.knock_out("last", "hijack", layers=range(6, 12))
    attention.rescale(2.0, "last", "subject", heads=[(8, 3), (9, 1)])
    attention.redirect("last", "cluster")             # the one-layer model, by the same call
    attention.transplant(cache, prompts=tokens)       # the attention of another run

Source tokens are queries, target tokens keys; both are spans (`hijacklens.prompts.spans`). Heads
are query heads. Probes act on these hooks, in the order in which they are listed:

    q k^T -> soft cap -> mask -> hook_attn_scores -> softmax -> hook_pattern -> z
                                 "before"                       "after"

Keys that a model hides (later tokens, padding, keys outside a sliding window or in another prompt
of a pack) stay hidden. A source token without any key left attends to nothing: its heads write
zero. Only the rows of source tokens change, in float32 if the model runs in half precision. The
cost is one copy of the scores and of the pattern of each chosen layer.

Without a BOS, heads rest their attention on the first token of the prompt (the attention sink). A
knock-out of `hijack` then hides the sink too: compare it with hiding `at:0` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import ActivationCache

from hijacklens.errors import InputError, choice, several, shown, strict
from hijacklens.models.hooked import HookedModel, NamedHook
from hijacklens.probe import hash_of, spell
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import EVERYWHERE
from hijacklens.prompts.tokens import TokenIds
from hijacklens.renamed import old_names, renamed
from hijacklens.sites import Heads, Layers, choose
from probes.attention.rows import (
    LARGEST_SCORE,
    PATTERN,
    AttentionProbe,
    Rows,
    keep_only,
    located,
    with_sum_of,
)
from probes.checks import When, check_factor, check_when

__all__ = [
    "KnockOut",
    "Redirect",
    "Rescale",
    "Transplant",
    "knock_out",
    "redirect",
    "rescale",
    "transplant",
]

__getattr__ = old_names(__name__, patch="redirect", Patch="Redirect")

Split: TypeAlias = Literal["uniform", "proportional"]
"""How redirected attention is divided among the target tokens."""


@strict
def knock_out(
    source: str,
    target: str,
    *,
    layers: Layers = None,
    heads: Heads = None,
    when: When = "before",
    renormalise: bool = True,
) -> KnockOut:
    """Remove all attention from the source tokens to the target tokens.

    The attention knock-out of Geva et al. 2023 (arXiv 2304.14767), between any two spans.
    `before`, and `after` with `renormalise`, agree up to rounding: the remaining weights of a row
    are scaled up to its old sum. `before` is exact in half precision too, when nearly all
    attention is removed, and under attention sinks (GPT-OSS), whose weight then grows as well.

    Args:
        source: Span of the tokens that attend, such as `last`.
        target: Span of the tokens that are attended to, such as `hijack` or `cluster`.
        layers: One layer, several, or None for all.
        heads: Query heads of each of these layers, or pairs (layer, head); None for all.
        when: Before the softmax (scores) or after it (weights).
        renormalise: If False, the other weights do not change, so the heads write less; this
            needs `after`.

    Raises:
        InputError: A span cannot be read, `when` is unknown, or `before` comes without
            renormalisation.
    """
    check_when(when, renormalise)
    return KnockOut(*located(source, target, layers, heads), when, renormalise)


@strict
def rescale(
    factor: float | int,
    source: str,
    target: str,
    *,
    layers: Layers = None,
    heads: Heads = None,
    when: When = "after",
    renormalise: bool = True,
) -> Rescale:
    """Multiply the attention from the source tokens to the target tokens.

    There are three ways to do so:

    - `after`, renormalised: weights times `factor`, rows scaled back to their old sum. This
      equals adding ln(factor) to the scores; 1 changes nothing, 0 is `knock_out`.
    - `after`, not renormalised: the value vectors of the target tokens times `factor`, for these
      source tokens.
    - `before`: scores times `factor`, as in "Competition of Mechanisms" (Ortu et al. 2024,
      arXiv 2402.11655). It raises only scores above zero, although the softmax does not depend
      on where zero is, so interpret it with care.

    The other arguments are those of `knock_out`.

    Raises:
        InputError: As for `knock_out`; or the factor cannot be used: it must be finite, and with
            `after` at least 0.
    """
    check_when(when, renormalise)
    factor = check_factor(factor, when)
    return Rescale(*located(source, target, layers, heads), when, renormalise, factor)


@renamed(share="split")
def redirect(
    source: str,
    target: str,
    *,
    split: Split = "uniform",
    layers: Layers = None,
    heads: Heads = None,
) -> Redirect:
    """Move all attention of the source tokens onto the target tokens.

    With `uniform` every target token gets the same weight; with `proportional` the weights of the
    model are scaled up, that is, everything else is knocked out. The attention of a source token
    that sees no target token does not change. The target `cluster` takes the attention of figures
    C.7 and C.8 to its limit: trained one-layer models put most of it, not all, on the cluster. The
    other arguments are those of `knock_out`.

    Raises:
        InputError: A span cannot be read, or `split` is unknown.
    """
    choice("split", split, get_args(Split))
    return Redirect(*located(source, target, layers, heads), split)


@strict
def transplant(
    cache: ActivationCache | Mapping[str, Tensor],
    *,
    prompts: Sequence[Sequence[int]] | Tensor | None = None,
    source: str = EVERYWHERE,
    layers: Layers = None,
    heads: Heads = None,
) -> Transplant:
    """Give the source tokens the attention that they had in another run.

    The attention of a run of one prompt goes to every prompt of its length. For a run of several,
    `prompts` says which prompt gets which; any other prompt is refused. Prompts do not share tokens
    while this probe is on.

    Args:
        cache: The activations of the other run, with `blocks.L.attn.hook_pattern` [batch, head,
            query, key] (or without batch) for the chosen layers.
        prompts: For each row of the cache the complete token ids of the prompt that gets its
            attention [batch, pos], such as the tokens of the other run itself. Prompts are known
            by their tokens, since a run sorts them and cuts them into batches.
        source: Span of the tokens whose attention is replaced.
        layers: One layer, several, or None for all layers of the cache.
        heads: Query heads of each of these layers, or pairs (layer, head); None for all.

    Raises:
        InputError: A span cannot be read, the cache has no patterns, or `prompts` are not one for
            each of its rows, of its length and without repetition.
    """
    source, target, layers, heads = located(source, EVERYWHERE, layers, heads)
    patterns: dict[int, Tensor] = {}
    for name in cache.keys():  # noqa: SIM118 - iterating over an ActivationCache gives layers
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.hook_pattern", str(name)):
            pattern = cache[name].detach()
            patterns[int(match[1])] = pattern[None] if pattern.dim() == 3 else pattern
    if not patterns:
        raise InputError(
            "the cache has no pattern (blocks.L.attn.hook_pattern); run the model with run_with_"
            "cache, without a filter that leaves patterns out."
        )
    pairs = isinstance(heads, tuple) and any(isinstance(head, tuple) for head in heads)
    if layers is None and not pairs:
        layers = tuple(sorted(patterns))
    return Transplant(source, target, layers, heads, patterns, _receivers(patterns, prompts))


def _receivers(
    patterns: Mapping[int, Tensor], prompts: Sequence[Sequence[int]] | Tensor | None
) -> Mapping[TokenIds, int] | None:
    """Return prompt -> row of the patterns; None if their only row goes to every prompt."""
    sizes = {(len(pattern), pattern.shape[-1]) for pattern in patterns.values()}
    if prompts is None and {rows for rows, _ in sizes} == {1}:
        return None
    form = "transplant(cache, prompts=tokens) with the token ids of each prompt"
    if prompts is None:
        raise InputError(
            f"the cache is of {max(sizes)[0]} prompts; say which prompt gets which: {form}."
        )
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    listed = [
        tuple(map(int, several("a prompt", ids, "[464, 3139]")))
        for ids in several("prompts", rows, form)
    ]
    if sizes != {(len(listed), len(ids)) for ids in listed}:
        held = " and ".join(
            f"{count} prompts of {length} tokens" for count, length in sorted(sizes)
        )
        given = sorted({len(ids) for ids in listed})
        raise InputError(
            f"the cache is of {held}, and prompts are {len(listed)} of {given} tokens; give one "
            "for each row of the cache, of the same length."
        )
    if len(set(listed)) < len(listed):
        raise InputError("a prompt occurs twice in prompts; give each prompt one row of the cache.")
    return {ids: row for row, ids in enumerate(listed)}


@dataclass(frozen=True, slots=True)
class KnockOut(AttentionProbe):
    """Removed attention; see `knock_out`."""

    kind, make = "knock-out", staticmethod(knock_out)

    when: When
    renormalise: bool

    def _at_scores(self, rows: Rows) -> Tensor | None:
        if self.when == "after":
            return None
        return rows.values.masked_fill(rows.visible & rows.target, rows.lowest)

    def _at_pattern(self, rows: Rows) -> Tensor | None:
        # With `before` too: a row without any key left would be spread over hidden keys, and an
        # earlier probe may have put attention back.
        return keep_only(rows, rows.visible & ~rows.target, renormalise=self.renormalise)


@dataclass(frozen=True, slots=True)
class Rescale(AttentionProbe):
    """Multiplied attention; see `rescale`."""

    kind, make = "rescale", staticmethod(rescale)

    when: When
    renormalise: bool
    factor: float

    def _at_scores(self, rows: Rows) -> Tensor | None:
        if self.when == "after":
            return None
        scaled = (rows.values * self.factor).clamp(-LARGEST_SCORE, LARGEST_SCORE)
        return torch.where(rows.target & rows.visible, scaled, rows.values)

    def _at_pattern(self, rows: Rows) -> Tensor | None:
        if self.when == "before":
            return None
        scaled = torch.where(rows.target, rows.values * self.factor, rows.values)
        return with_sum_of(rows, scaled) if self.renormalise else scaled


@dataclass(frozen=True, slots=True)
class Redirect(AttentionProbe):
    """Attention moved onto the target tokens; see `redirect`."""

    kind, make = "redirect", staticmethod(redirect)

    split: Split

    def _at_scores(self, rows: Rows) -> Tensor | None:
        if self.split == "uniform":
            return None
        return rows.values.masked_fill(rows.visible & ~_target_or_all(rows), rows.lowest)

    def _at_pattern(self, rows: Rows) -> Tensor | None:
        if self.split == "proportional":
            return keep_only(rows, _target_or_all(rows), renormalise=True)
        targets = rows.visible & rows.target
        count = targets.sum(-1, keepdim=True)
        return torch.where(count > 0, targets / count, rows.values)


@dataclass(frozen=True, slots=True, eq=False)
class Transplant(AttentionProbe):
    """The attention of another run; see `transplant`."""

    patterns: Mapping[int, Float[Tensor, "batch head query key"]]
    rows: Mapping[TokenIds, int] | None
    """Prompt -> row of the patterns; None: the only row goes to every prompt."""

    @property
    def key(self) -> str:
        """The sites and a hash of the prompts and patterns."""
        patterns = (item for pair in sorted(self.patterns.items()) for item in pair)
        prompts = None if self.rows is None else sorted(self.rows.items())
        sites = {"source": self.source, "layers": self.layers, "heads": self.heads}
        return spell("transplant", transplant, {"cache": hash_of(prompts, *patterns), **sites})

    @property
    def packs(self) -> bool:
        """False: the pattern of a token depends on its prompt and position."""
        return False

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return hooks on the pattern of every chosen layer.

        Raises:
            InputError: As for all attention probes, or the other run differs in layers, heads or
                lengths, or lacks a prompt.
        """
        layers = choose(model, layers=self.layers, heads=self.heads, hook=PATTERN).by_layer
        length = layout.key(EVERYWHERE).shape[1]
        for layer in layers:
            if layer not in self.patterns:
                raise InputError(
                    f"the other run has no pattern of layer {layer}; it has layers "
                    f"{sorted(self.patterns)}."
                )
            _, heads, *sides = self.patterns[layer].shape
            if sides != [length, length] or heads != model.cfg.n_heads:
                raise InputError(
                    f"the other run was of prompts of {sides[-1]} tokens with {heads} heads, this "
                    f"one is of {length} with {model.cfg.n_heads}; for prompts that differ in "
                    "length patch activations by span (probes.activations)."
                )
        of_batch = {layer: self.patterns[layer] for layer in layers}
        if self.rows is None:
            of_batch = {i: p.expand(len(layout.tokens), -1, -1, -1) for i, p in of_batch.items()}
        else:
            rows = _rows_of(self.rows, layout)
            of_batch = {i: p[rows] for i, p in of_batch.items()}
        return AttentionProbe.hooks(replace(self, patterns=of_batch), model, layout)

    def _at_pattern(self, rows: Rows) -> Tensor | None:
        patterns = self.patterns[rows.layer].to(rows.values)
        return patterns[rows.at_prompt, :, rows.at_key]


def _rows_of(known: Mapping[TokenIds, int], layout: Layout) -> list[int]:
    """Return the row of each prompt of a layout."""
    tokens = layout.tokens
    if layout.past_tokens is not None:
        tokens = torch.cat([layout.past_tokens, tokens], dim=1)
    prompts = [tuple(ids) for ids in tokens.tolist()]
    if missing := next((ids for ids in prompts if ids not in known), None):
        raise InputError(
            f"the prompt of tokens {shown(list(missing))} is not one of the {len(known)} that "
            "transplant has attention for; add it to the other run and to prompts."
        )
    return [known[ids] for ids in prompts]


def _target_or_all(rows: Rows) -> Bool[Tensor, "row head key"]:
    """Return the visible target tokens of each row, or all visible tokens if there are none."""
    targets = rows.visible & rows.target
    return torch.where(targets.any(-1, keepdim=True), targets, rows.visible)
