"""Attention probes: knock out, rescale or patch what source tokens take from target tokens.

    attention.knock_out("last", "hijack", layers=range(6, 12))
    attention.rescale(2.0, "last", "subject", heads=[(8, 3), (9, 1)])
    attention.patch("last", "cluster")                # the one-layer model, by the same call
    attention.transplant(cache, source="last")        # the attention of another run

Source tokens are queries, target tokens keys; both are spans (`hijacklens.prompts.spans`). Heads
are query heads: under grouped-query attention several of them share a key/value head.

    q k^T -> soft cap -> mask -> hook_attn_scores -> softmax -> hook_pattern -> z
                                 "before"                       "after"

In every model family the scores that hooks see are soft-capped (Gemma-2) and masked already, so a
probe acts on the very numbers that the softmax is taken of. Keys that a model hides (later tokens,
padding, those outside a sliding window or in another prompt of a pack) stay hidden, and a source
token that has no key left attends to nothing: its heads write zero.

Only the rows of source tokens are touched, in float32 where the model runs in half precision.
Probes act in the order listed at each hook; what is done to scores comes before what is done to
patterns. Cost: one copy of the scores and of the pattern of each chosen layer.

Where a tokenizer adds no BOS, heads rest their attention on the first token of the prompt (the
attention sink). A knock-out that hides it, as one of `hijack` does then, measures that too: compare
with hiding `at:0` alone.

>>> import torch
>>> from hijacklens.one_layer import spans
>>> from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
>>> from hijacklens.one_layer.task import ConceptTask
>>> from hijacklens.probe import probed
>>> task = ConceptTask(bits=2, support="first-bit", length=4)
>>> model = OneLayerTransformer(OneLayerConfig(vocab=4, d_model=4, length=4))
>>> layout = spans.layout(task, torch.tensor([[0, 1, 2, 3]]))
>>> with probed(model, [patch("last", "cluster")], layout):
...     _, cache = model.run_with_cache(layout.tokens)
>>> cache["pattern", 0][0, 0, -1].tolist()
[0.0, 0.0, 0.5, 0.5]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from hijacklens.errors import InputError, number, unknown
from hijacklens.sites import Heads, Layers
from probes.attention.rows import (
    LARGEST_SCORE,
    AttentionProbe,
    Edit,
    Rows,
    edges,
    held,
    keep_only,
    with_sum_of,
)
from probes.attention.transplants import transplant

__all__ = ["KnockOut", "Patch", "Rescale", "knock_out", "patch", "rescale", "transplant"]

When: TypeAlias = Literal["before", "after"]
"""Whether a probe acts on the scores, before the softmax, or on the pattern, after it."""
Share: TypeAlias = Literal["uniform", "proportional"]
"""How attention that is put on a span is divided among its tokens."""


def knock_out(
    source: str,
    target: str,
    *,
    layers: Layers = None,
    heads: Heads = None,
    when: When = "before",
    renormalise: bool = True,
) -> KnockOut:
    """Take away all attention from the source tokens to the target tokens.

    The attention knock-out of Geva et al. 2023 (arXiv 2304.14767), between any two spans.
    `before` and `after` with `renormalise` are the same up to rounding: what is left of a row is
    scaled up to its old sum. `before` is exact in half precision too, when nearly all attention
    is taken away, and under attention sinks (GPT-OSS), whose share then grows as well.

    Args:
        source: Span of the tokens that attend, such as `last`.
        target: Span of the tokens that are attended to, such as `hijack` or `cluster`.
        layers: One layer, several, or None for all.
        heads: Query heads of each of these layers, or pairs (layer, head); None for all.
        when: Before the softmax (scores) or after it (weights).
        renormalise: Only with `after`: False leaves the other weights as they were, so that the
            heads write the less.

    Raises:
        InputError: A span that cannot be read, an unknown `when`, or `before` without
            renormalisation.
    """
    _check_when(when)
    if when == "before" and not renormalise:
        raise InputError(
            "what is left before the softmax always sums to one behind it: renormalise=False goes "
            'with when="after".'
        )
    return KnockOut(*edges(source, target), *held(layers, heads), when, renormalise)


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

    Three things go by this name:

    - `after`, renormalised: weights times `factor`, rows scaled back to their old sum. This is
      adding ln(factor) to the scores; 1 changes nothing, 0 is `knock_out`.
    - `after`, not renormalised: the value vectors of the target tokens times `factor`, for these
      source tokens.
    - `before`: scores times `factor`, as in "Competition of Mechanisms" (Ortu et al. 2024,
      arXiv 2402.11655). Only scores above zero rise then; what a score is relative to, the
      softmax does not say, so read this one with care.

    Args:
        factor: The multiplier; not negative with `after`.
        source: Span of the tokens that attend.
        target: Span of the tokens that are attended to.
        layers: One layer, several, or None for all.
        heads: Query heads of each of these layers, or pairs (layer, head); None for all.
        when: Whether weights (`after`) or scores (`before`) are multiplied.
        renormalise: Only with `after`: False leaves the other weights as they were.

    Raises:
        InputError: A span that cannot be read, a factor that cannot be used, an unknown `when`,
            or `before` without renormalisation.
    """
    _check_when(when)
    if when == "before" and not renormalise:
        raise InputError(
            "weights always sum to one behind the softmax: renormalise=False goes with "
            'when="after".'
        )
    # A share cannot be negative; a score can.
    factor = number("factor", factor, least=0) if when == "after" else number("factor", factor)
    chosen = held(layers, heads)
    return Rescale(*edges(source, target), *chosen, when, renormalise, factor)


def patch(
    source: str,
    target: str,
    *,
    share: Share = "uniform",
    layers: Layers = None,
    heads: Heads = None,
) -> Patch:
    """Put all attention of the source tokens on the target tokens.

    A source token that sees no target token keeps its attention as it is.

    Args:
        source: Span of the tokens that attend.
        target: Span of the tokens that are attended to, such as `cluster`: the attention that
            the trained one-layer model has (figures C.7 and C.8), made exact.
        share: `uniform`: the same weight on every target token; `proportional`: in proportion to
            what the model gives them, that is, everything else knocked out.
        layers: One layer, several, or None for all.
        heads: Query heads of each of these layers, or pairs (layer, head); None for all.

    Raises:
        InputError: A span that cannot be read, or an unknown `share`.
    """
    if share not in ("uniform", "proportional"):
        raise unknown("share", share, ("uniform", "proportional"))
    return Patch(*edges(source, target), *held(layers, heads), share)


@dataclass(frozen=True, slots=True)
class KnockOut(AttentionProbe):
    """Attention taken away; see `knock_out`."""

    when: When
    renormalise: bool

    def _words(self) -> tuple[str, list[str]]:
        return "knock-out", _changed(self, when="before")

    def _at_scores(self) -> Edit | None:
        return _hide_target if self.when == "before" else None

    def _at_pattern(self) -> Edit | None:
        # Before the softmax as well: a row with no key left would be spread over hidden keys,
        # and a probe listed before may have put attention back.
        def edit(rows: Rows) -> Tensor:
            return keep_only(rows, rows.visible & ~rows.target, renormalise=self.renormalise)

        return edit


@dataclass(frozen=True, slots=True)
class Rescale(AttentionProbe):
    """Attention multiplied; see `rescale`."""

    when: When
    renormalise: bool
    factor: float

    def _words(self) -> tuple[str, list[str]]:
        return "rescale", [f"factor={self.factor!r}", *_changed(self, when="after")]

    def _at_scores(self) -> Edit | None:
        def edit(rows: Rows) -> Tensor:
            scaled = (rows.values * self.factor).clamp(-LARGEST_SCORE, LARGEST_SCORE)
            return torch.where(rows.target & rows.visible, scaled, rows.values)

        return edit if self.when == "before" else None

    def _at_pattern(self) -> Edit | None:
        def edit(rows: Rows) -> Tensor:
            scaled = torch.where(rows.target, rows.values * self.factor, rows.values)
            return with_sum_of(rows, scaled) if self.renormalise else scaled

        return edit if self.when == "after" else None


@dataclass(frozen=True, slots=True)
class Patch(AttentionProbe):
    """Attention put on the target tokens; see `patch`."""

    share: Share

    def _words(self) -> tuple[str, list[str]]:
        return "patch", [] if self.share == "uniform" else [f"share={self.share}"]

    def _at_scores(self) -> Edit | None:
        def edit(rows: Rows) -> Tensor:
            lost = rows.visible & ~_target_or_all(rows)
            return rows.values.masked_fill(lost, rows.lowest)

        return edit if self.share == "proportional" else None

    def _at_pattern(self) -> Edit | None:
        def spread(rows: Rows) -> Tensor:
            seen = rows.visible & rows.target
            count = seen.sum(-1, keepdim=True)
            return torch.where(count > 0, seen / count, rows.values)

        def keep(rows: Rows) -> Tensor:
            return keep_only(rows, _target_or_all(rows), renormalise=True)

        return spread if self.share == "uniform" else keep


def _hide_target(rows: Rows) -> Tensor:
    return rows.values.masked_fill(rows.visible & rows.target, rows.lowest)


def _target_or_all(rows: Rows) -> Bool[Tensor, "row head key"]:
    """The target tokens that are seen, or where there is none, all tokens that are."""
    seen = rows.visible & rows.target
    return torch.where(seen.any(-1, keepdim=True), seen, rows.visible)


def _changed(probe: KnockOut | Rescale, *, when: When) -> list[str]:
    moved = [] if probe.when == when else [f"when={probe.when}"]
    return moved if probe.renormalise else [*moved, "renormalise=no"]


def _check_when(when: object) -> None:
    if when not in ("before", "after"):
        raise unknown("when", when, ("before", "after"), "It says on which side of the softmax.")
