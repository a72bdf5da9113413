"""The rows of attention that a probe edits: what the source tokens of a layer attend to.

A row holds what one head of one source token gives to every key. Edits receive the rows of a layer
as one tensor, before the softmax (scores) or after it (weights), and return it changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, NamedHook
from hijacklens.probe import spell
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import check_span
from hijacklens.sites import Heads, Layers, canonical, choose

LARGEST_SCORE = 2.0**13
"""Scores below minus this belong to hidden keys: masks add -inf, finfo.min or -1e9. Scores of
visible keys are some dozens, and no edit takes one beyond this bound in either direction."""
PATTERN = "attn.hook_pattern"
"""The hook that a layer needs."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What the source tokens of a layer attend to, in all its heads."""

    layer: int
    values: Float[Tensor, "row head key"]
    """Scores or weights, in float32 if the model runs in half precision."""
    visible: Bool[Tensor, "row head key"]
    """Keys that the model does not hide from the source token."""
    target: Bool[Tensor, "row 1 key"]
    """Keys in the target span of the source token's prompt."""
    lowest: float
    """The score that hides a key."""
    at_prompt: Int[Tensor, " row"]
    """The prompt of each source token, as an index into the batch."""
    at_key: Int[Tensor, " row"]
    """The position of each source token, counted among the keys."""


@dataclass(frozen=True, slots=True)
class AttentionProbe:
    """What all attention probes share: source tokens, target tokens and heads."""

    kind: ClassVar[str]
    make: ClassVar[Callable[..., Any]]
    """The function that makes the probe; its arguments are attributes of the probe."""

    source: str
    target: str
    layers: Layers
    heads: Heads

    @property
    def key(self) -> str:
        """The probe as the command line spells it."""
        arguments = inspect.signature(self.make).parameters
        return spell(self.kind, self.make, {name: getattr(self, name) for name in arguments})

    @property
    def spans(self) -> Sequence[str]:
        """The two spans."""
        return (self.source, self.target)

    @property
    def packs(self) -> bool:
        """True: a row of attention depends on its own prompt alone."""
        return True

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return hooks on the scores and the pattern of every chosen layer.

        The list is empty if no source token of the layout has a target token in its prompt.

        Raises:
            InputError: The model has no such layer or head, or the layout has no such span. In
                the forward pass: the layout is of other tokens, or the attention is not eager.
        """
        sites = choose(model, layers=self.layers, heads=self.heads, hook=PATTERN).by_layer
        prompts, queries = layout.query(self.source).nonzero(as_tuple=True)
        targets = layout.key(self.target)[prompts]
        if not bool(targets.any()):
            return []
        hooks: list[NamedHook] = []
        names = model.hook_dict  # a bridge builds this mapping on every access
        for layer, heads in sites.items():
            acts = torch.isin(torch.arange(int(model.cfg.n_heads)), torch.tensor(heads))[:, None]
            edited = _Layer(self, layer, acts, prompts, queries, targets, layout)
            hooks += [
                (f"blocks.{layer}.attn.hook_attn_scores", edited.on_scores),
                (f"blocks.{layer}.{PATTERN}", edited.on_pattern),
            ]
            if (output := f"blocks.{layer}.hook_attn_out") in names:
                hooks.append((output, edited.on_output))
        return hooks

    def _at_scores(self, rows: Rows) -> Tensor | None:
        """Return new scores [row, head, key]; None leaves them as they are."""

    def _at_pattern(self, rows: Rows) -> Tensor | None:
        """Return new weights [row, head, key]; None leaves them as they are."""


def located(
    source: str, target: str, layers: Layers, heads: Heads
) -> tuple[str, str, Layers, Heads]:
    """Return the fields of an `AttentionProbe`, checked as far as possible without a model."""
    for span in (source, target):
        check_span(span)
    return source, target, *canonical(layers, heads)


def keep_only(rows: Rows, keep: Bool[Tensor, "row head key"], *, renormalise: bool) -> Tensor:
    """Set the weights of all other keys to zero; a renormalised row keeps its sum."""
    weights = torch.where(keep, rows.values, 0.0)
    return with_sum_of(rows, weights) if renormalise else weights


def with_sum_of(rows: Rows, weights: Float[Tensor, "row head key"]) -> Tensor:
    """Scale new weights so that each row keeps its old sum; a row of zeros stays zero.

    That sum is one, except under attention sinks (GPT-OSS), whose weight does not change.
    """
    old = torch.where(rows.visible, rows.values, 0.0).sum(-1, keepdim=True)
    new = weights.sum(-1, keepdim=True)
    return weights * torch.where(new > 0, old / new, 0.0)


@dataclass(slots=True, repr=False)
class _Layer:
    """The hooks of one layer, and what the first of them passes on to the others.

    TransformerLens names each hook by its repr, so printing the tensors would be slow.
    """

    probe: AttentionProbe
    layer: int
    acts: Tensor  # [head, 1]: whether the head is chosen
    prompts: Tensor
    queries: Tensor
    targets: Tensor  # [row, key]
    layout: Layout
    visible: Tensor | None = None
    done: bool = False

    def on_scores(self, scores: Tensor, hook: Any) -> Tensor | None:
        self._check(scores, hook)
        rows = scores[self.prompts.to(scores.device), :, self.queries.to(scores.device)]
        self.visible = rows >= -LARGEST_SCORE
        return self._edited(scores, self.visible, self.probe._at_scores)

    def on_pattern(self, pattern: Tensor, hook: Any) -> Tensor | None:
        self._check(pattern, hook)
        if self.visible is None:
            raise _not_editable(hook)
        edited = self._edited(pattern, self.visible, self.probe._at_pattern)
        self.visible, self.done = None, True
        return edited

    def on_output(self, output: Any, hook: Any) -> None:
        if not self.done:
            raise _not_editable(hook)
        self.done = False

    def _edited(
        self, values: Tensor, visible: Tensor, edit: Callable[[Rows], Tensor | None]
    ) -> Tensor | None:
        device = values.device
        prompts, queries = self.prompts.to(device), self.queries.to(device)
        old = values[prompts, :, queries]
        past = self.targets.shape[1] - self.layout.tokens.shape[1]
        rows = Rows(
            layer=self.layer,
            values=old.to(torch.promote_types(old.dtype, torch.float32)),
            visible=visible.to(device),
            target=self.targets.to(device)[:, None],
            lowest=torch.finfo(old.dtype).min,
            at_prompt=prompts,
            at_key=queries + past,
        )
        new = edit(rows)
        if new is None:
            return None
        result = values.clone()  # caches may hold the incoming tensor
        result[prompts, :, queries] = torch.where(self.acts.to(device), new.to(old.dtype), old)
        return result

    def _check(self, values: Tensor, hook: Any) -> None:
        batch, queries = self.layout.tokens.shape
        expected = (batch, len(self.acts), queries, self.targets.shape[1])
        if tuple(values.shape) != expected:
            raise InputError(
                f"{hook.name} is {tuple(values.shape)} (batch, head, query, key), and the "
                f"layout says {expected}. Make the layout of the tokens that are run."
            )


def _not_editable(hook: Any) -> InputError:
    return InputError(
        f"attention probes do nothing here: the scores at {hook.name} are not those from which "
        "the output is computed. The attention must be eager: model.original_model."
        'set_attn_implementation("eager").'
    )
