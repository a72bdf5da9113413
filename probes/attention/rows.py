"""The rows of attention that a probe edits: what the source tokens of a layer attend to.

A row is what one head of one source token gives to every key. Edits get the rows of a layer as
one tensor, before the softmax (scores) or after it (weights), and give it back changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, NamedHook
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import atoms
from hijacklens.sites import Heads, Layers, Sites, choose, describe, kept

LARGEST_SCORE = 2.0**13
"""Scores below minus this are those of hidden keys: masks add -inf, finfo.min or -1e9. The scores
of visible keys are some dozens, and no edit takes one beyond it, either way."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What the source tokens of a layer attend to, in all its heads."""

    layer: int
    values: Float[Tensor, "row head key"]
    """Scores or weights, in float32 if the model's are of half precision."""
    visible: Bool[Tensor, "row head key"]
    """Keys that the model does not hide from the source token."""
    target: Bool[Tensor, "row 1 key"]
    """Keys that stand in the target span of the source token's prompt."""
    lowest: float
    """The score that hides a key."""
    at_prompt: Int[Tensor, " row"]
    """Place of the source token: which prompt of the batch,"""
    at_key: Int[Tensor, " row"]
    """and which position, counted among the keys."""


Edit: TypeAlias = Callable[[Rows], Tensor]
"""From the rows of a layer to their new values [row, head, key]."""


@dataclass(frozen=True, slots=True)
class AttentionProbe:
    """What all attention probes share: from which tokens to which, in which heads."""

    source: str
    target: str
    layers: Layers
    heads: Heads

    @property
    def key(self) -> str:
        """The probe in the words of the command line."""
        name, options = self._words()
        sites = describe(layers=self.layers, heads=self.heads)
        # The target stands last, since a text may hold commas.
        ends = [f"from={_quoted(self.source)}", f"to={_quoted(self.target)}"]
        return f"{name}:" + ",".join([part for part in (sites, *options) if part] + ends)

    @property
    def spans(self) -> Sequence[str]:
        """The two spans."""
        return (self.source, self.target)

    @property
    def packs(self) -> bool:
        """True: a row of attention depends on its own prompt alone."""
        return True

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Hooks on the scores and the pattern of every chosen layer.

        Raises:
            InputError: The model has no such layer or head, the layout no such span; in the
                forward pass, if the layout is of other tokens or if TransformerLens cannot edit
                the attention of this architecture.
        """
        return _hooks_of(
            model,
            layout,
            choose(model, layers=self.layers, heads=self.heads, axis="head"),
            source=self.source,
            target=self.target,
            at_scores=self._at_scores(),
            at_pattern=self._at_pattern(),
        )

    def _words(self) -> tuple[str, list[str]]:
        """The name of the kind, and its options that are not left at their defaults."""
        raise NotImplementedError

    def _at_scores(self) -> Edit | None:
        return None

    def _at_pattern(self) -> Edit | None:
        return None


def keep_only(rows: Rows, keep: Bool[Tensor, "row head key"], *, renormalise: bool) -> Tensor:
    """Weights with those of other keys removed; a row keeps its sum if it is renormalised."""
    left = torch.where(keep, rows.values, 0.0)
    return with_sum_of(rows, left) if renormalise else left


def with_sum_of(rows: Rows, weights: Float[Tensor, "row head key"]) -> Tensor:
    """New weights scaled so that each row sums to what it did; a row of zeros stays one.

    That sum is one, except under attention sinks (GPT-OSS), whose share stays as it is.
    """
    old = torch.where(rows.visible, rows.values, 0.0).sum(-1, keepdim=True)
    new = weights.sum(-1, keepdim=True)
    return weights * torch.where(new > 0, old / new, 0.0)


def _quoted(span: str) -> str:
    """The span, in quotes where two different keys could otherwise read alike."""
    plain = span.isprintable() and not span.startswith(("'", '"')) and ",to=" not in span
    return span if plain else repr(span)


def edges(source: str, target: str) -> tuple[str, str]:
    """The two spans, if they can be read."""
    for span in (source, target):
        atoms(span)
    return source, target


def held(layers: Layers, heads: Heads) -> tuple[Layers, Heads]:
    """The choice as it can be read any number of times."""
    return kept(layers), kept(heads)


def _hooks_of(
    model: HookedModel,
    layout: Layout,
    chosen: Sites,
    *,
    source: str,
    target: str,
    at_scores: Edit | None,
    at_pattern: Edit | None,
) -> list[NamedHook]:
    """The hooks that edit the rows of the source tokens in every chosen layer and head.

    There are none if no source token of the layout has a target token in its prompt.

    Raises:
        InputError: A span has a name that is not known in the layout. In the forward pass: the
            layout is of other tokens, or the architecture's attention cannot be edited.
    """
    prompts, queries = layout.query(source).nonzero(as_tuple=True)
    targets = layout.key(target)[prompts]
    if not bool(targets.any()):
        return []
    found: list[NamedHook] = []
    names = model.hook_dict  # a bridge makes it anew each time
    for layer, heads in chosen.by_layer.items():
        acts = torch.zeros(int(model.cfg.n_heads), 1, dtype=torch.bool)
        acts[list(heads)] = True
        site = _Layer(layer, acts, prompts, queries, targets, layout, at_scores, at_pattern)
        found += [
            (f"blocks.{layer}.attn.hook_attn_scores", site.on_scores),
            (f"blocks.{layer}.attn.hook_pattern", site.on_pattern),
        ]
        behind = f"blocks.{layer}.hook_attn_out"
        if behind in names:
            found.append((behind, site.on_output))
    return found


@dataclass(slots=True, repr=False)
class _Layer:
    """The hooks of one layer, and what the first of them leaves for the others.

    TransformerLens names each hook by its repr, so that one that printed tensors would be slow.
    """

    layer: int
    acts: Tensor  # [head, 1]: whether the head is chosen
    prompts: Tensor
    queries: Tensor
    targets: Tensor  # [row, key]
    layout: Layout
    at_scores: Edit | None
    at_pattern: Edit | None
    visible: Tensor | None = None
    done: bool = False

    def on_scores(self, scores: Tensor, hook: Any) -> Tensor | None:
        self._check(scores, hook)
        rows = scores[self.prompts.to(scores.device), :, self.queries.to(scores.device)]
        self.visible = rows >= -LARGEST_SCORE
        return None if self.at_scores is None else self._edited(scores, self.at_scores)

    def on_pattern(self, pattern: Tensor, hook: Any) -> Tensor | None:
        self._check(pattern, hook)
        if self.visible is None:
            raise _out_of_reach(hook)
        edited = None if self.at_pattern is None else self._edited(pattern, self.at_pattern)
        self.visible, self.done = None, True
        return edited

    def on_output(self, output: Any, hook: Any) -> None:
        if not self.done:
            raise _out_of_reach(hook)
        self.done = False

    def _edited(self, values: Tensor, edit: Edit) -> Tensor:
        assert self.visible is not None
        device = values.device
        prompts, queries = self.prompts.to(device), self.queries.to(device)
        old = values[prompts, :, queries]
        past = self.targets.shape[1] - self.layout.tokens.shape[1]
        rows = Rows(
            layer=self.layer,
            values=old.to(torch.promote_types(old.dtype, torch.float32)),
            visible=self.visible.to(device),
            target=self.targets.to(device)[:, None],
            lowest=torch.finfo(old.dtype).min,
            at_prompt=prompts,
            at_key=queries + past,
        )
        new = torch.where(self.acts.to(device), edit(rows).to(old.dtype), old)
        # A copy: caches may hold the tensor that came in.
        result = values.clone()
        result[prompts, :, queries] = new
        return result

    def _check(self, values: Tensor, hook: Any) -> None:
        batch, queries = self.layout.tokens.shape
        expected = (batch, len(self.acts), queries, self.targets.shape[1])
        if tuple(values.shape) != expected:
            raise InputError(
                f"{hook.name} is {tuple(values.shape)} (batch, head, query, key), and the "
                f"layout says {expected}. Make the layout of the tokens that are run."
            )


def _out_of_reach(hook: Any) -> InputError:
    return InputError(
        f"attention probes do nothing here: TransformerLens runs this architecture's attention as "
        f"a whole and its hooks only watch it (at {hook.name}). It can be edited in the families "
        "whose attention TransformerLens rebuilds, such as GPT-2, GPT-NeoX, LLaMA, Qwen, Gemma."
    )
