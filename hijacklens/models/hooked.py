"""The interface that scoring and probes need of a model, and hooks that are always removed.

A hooked model has TransformerLens hook points under their usual names, such as
`blocks.0.attn.hook_pattern`, and runs with hooks and with a cache: a `TransformerBridge`, the
one-layer model of `hijacklens.one_layer` or, under TransformerLens 3.9, a `HookedTransformer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from transformer_lens.hook_points import HookPoint

from hijacklens.errors import InputError, unknown
from hijacklens.models.additions import hooks_on
from hijacklens.models.delegated import delegated_attention, edited
from hijacklens.models.exclusive import held

HookFunction: TypeAlias = Callable[..., Any]
"""Called with the activation and `hook=` (the hook point); returns the new activation or None."""
NamedHook: TypeAlias = tuple[str, HookFunction]


@runtime_checkable
class HookedModel(Protocol):
    """A model with TransformerLens hook points: the members that this project uses."""

    @property
    def cfg(self) -> Any:
        """The configuration: `n_layers`, `n_heads`, `d_model`, `d_vocab`, `n_ctx`, ..."""

    @property
    def hook_dict(self) -> Mapping[str, HookPoint]:
        """Hook name -> hook point."""
        ...

    @property
    def training(self) -> bool:
        """Whether the model is in training mode, where dropout makes scores random."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The logits of a batch of tokens."""

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """The logits, with temporary hooks."""

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """The logits and an ActivationCache."""

    def parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The parameters, as on any torch module."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The parameters with their names, as on any torch module."""


@runtime_checkable
class HookedLanguageModel(HookedModel, Protocol):
    """A hooked model of text, with the tokenizer whose default call makes its prompts."""

    @property
    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer."""


def device_of(model: HookedModel) -> torch.device:
    """Return the device of a model's input: the device of its first parameter."""
    return next(iter(model.parameters())).device


def end_tokens(model: HookedLanguageModel) -> set[int | None]:
    """Return the tokens at which `generate` stops: a model may have several."""
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = model.tokenizer.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def vocabulary_of(model: HookedModel) -> int:
    """Return the number of token ids that a model reads and predicts: rows of its embeddings."""
    plain = getattr(model, "original_model", None)
    finders = (getattr(plain, f"get_{side}_embeddings", None) for side in ("input", "output"))
    sizes = []
    for find in filter(None, finders):
        with suppress(AttributeError, NotImplementedError):  # it was replaced, or is not known
            sizes.append(len(find().weight))
    return min(sizes or [int(model.cfg.d_vocab)])


def require_eval(model: HookedModel, *, operation: str) -> None:
    """Refuse a model in training mode, whose dropout would make every number random.

    Raises:
        InputError: The model, or a part of it, is in training mode.
    """
    parts = model.modules() if isinstance(model, torch.nn.Module) else (model,)
    if any(part.training for part in parts):  # `train()` of the plain model leaves the hooked one
        raise InputError(
            f"{operation} needs a model in evaluation mode, and this one is in training mode "
            "(dropout would make its scores random). Call model.eval() first."
        )


def require_text(model: HookedModel, *, operation: str) -> None:
    """Refuse a model that reads no text, such as the one-layer model.

    Raises:
        InputError: The model is a name, or has no hooks or tokenizer.
    """
    if isinstance(model, str):
        raise InputError(
            f"{operation} needs a loaded model, not its name: hl.load_model({model!r}) gives one."
        )
    if not hasattr(model, "hook_dict"):
        raise InputError(
            f"{operation} needs a model with hooks, and this is a {type(model).__name__}; "
            "hl.load_model(model, tokenizer=tokenizer) gives one."
        )
    if getattr(model, "tokenizer", None) is None:
        raise InputError(
            f"{operation} needs a language model, and this {type(model).__name__} has no "
            "tokenizer. For the one-layer model use trained.accuracy(probes=[...]), "
            "probes.account.accounts(...) or probes.logit_lens.through(...)."
        )


@contextmanager
def hooked(model: HookedModel, hooks: Sequence[NamedHook]) -> Iterator[HookedModel]:
    """Run the body with forward hooks on the model, and remove them whatever happens in it.

    Other hooks on the model stay. No weight changes, so the model stays bit for bit the same.
    Other threads that put hooks on the model wait until the body ends. Hooks on attention scores
    and patterns change them in every family (`hijacklens.models.delegated`).

    Raises:
        InputError: The model has no hook of that name (TransformerLens 3.9 would ignore it).
    """
    points = model.hook_dict  # a bridge builds this mapping on every access
    for name, _ in hooks:
        if name not in points:
            raise unknown("hook", name, points, "See model.hook_dict for what this model has.")
    handles, delegated = [], []
    for name, function in hooks:
        if attention := delegated_attention(model, name):
            delegated.append((name, function, attention))
    apart = {name for name, *_ in delegated}
    with held(model), edited(points, delegated):
        try:
            for name, function in hooks:
                if name in apart:
                    continue
                point = points[name]
                before = len(point.fwd_hooks)
                point.add_hook(_plain(function))
                handles.extend((point, handle) for handle in point.fwd_hooks[before:])
            yield model
        finally:
            for point, handle in handles:
                handle.hook.remove()
                if handle in point.fwd_hooks:  # the body may have reset all hooks itself
                    point.fwd_hooks.remove(handle)


def _plain(function: HookFunction) -> HookFunction:
    """Give a hook a short repr: TransformerLens takes it, and a probe's would print tensors."""

    def call(value: Any, hook: Any) -> Any:
        return function(value, hook=hook)

    return call


def unnamed_hooks(model: HookedModel) -> bool:
    """Return whether the user has put hooks on the model that are not probes.

    Hooks that TransformerLens and transformers install themselves do not count.
    """
    return bool(hooks_on(model))
