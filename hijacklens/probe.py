"""A probe: anything that changes what a model computes, by hooks alone.

The probes themselves are in the package `probes`. This module has their common interface, with
which scoring and the one-layer model can run with any probe:

    with probed(model, [blind], layout):
        logits = model(layout.tokens)

Contract 3: when the body ends, even by an error or Ctrl-C, weights and hooks are bit for bit the
same as before.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.errors import InputError, several, utf8
from hijacklens.models.agreement import require_one_side
from hijacklens.models.exclusive import held
from hijacklens.models.hooked import HookedModel, HookFunction, NamedHook, hooked
from hijacklens.models.unhooked import NO_PLAIN_BLOCKS, PlainBlocks
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import placed_atoms
from hijacklens.sites import numbers


@runtime_checkable
class Probe(Protocol):
    """The interface between a probe and the runs that use it."""

    @property
    def key(self) -> str:
        """One line that says what the probe does, equal for two probes only if they do the same.

        It is printed, saved with results, and identifies stored readings. The key of a probe that
        holds tensors contains a hash of them.
        """
        ...

    @property
    def spans(self) -> Sequence[str]:
        """The spans that the probe looks up in a layout."""
        ...

    @property
    def packs(self) -> bool:
        """Whether prompts may share tokens while the probe is on.

        True if the effect on a token depends only on the token, on the tokens before it in the
        prompt, and on the spans that contain these tokens.
        """
        ...

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return the hooks for a forward pass over the tokens of a layout.

        They act in this order, after the hooks of probes that are listed earlier; those that are
        `Placed` act before or after all others.

        Raises:
            InputError: The model lacks a layer, head, span or hook of the probe.
        """
        ...


@dataclass(frozen=True, slots=True)
class Placed:
    """A hook that acts before or after those of all other probes at its hook point."""

    function: HookFunction
    place: Literal["first", "last"]

    def __call__(self, value: Any, hook: Any) -> Any:
        """Run the hook."""
        return self.function(value, hook=hook)


PLACES = {"first": 0, "last": 2}


@dataclass(frozen=True, slots=True)
class HookProbe:
    """A probe of your own: hooks that act in the same way on every forward pass.

    Each prompt has its own row, and all prompts of a batch have the same length, so positions in
    the hooks are positions of the prompt and there is no padding.
    """

    key: str
    """A unique name; change it whenever the hooks change, since stored readings are keyed by it."""
    named_hooks: Sequence[NamedHook]
    spans: Sequence[str] = ()
    packs: bool = False
    """Set this to True if no hook depends on positions within a row, or on other prompts."""

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return `named_hooks`."""
        return self.named_hooks


def spell(kind: str, make: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """Return the key of a probe: its kind and the options that differ from the defaults of `make`.

    `probes.specification.parse` reads it back. Texts with a comma or with characters that cannot
    be printed are quoted as in JSON.

    >>> spell("rescale", lambda factor, layers=None: ..., {"factor": 2.0, "layers": (8, 9, 10)})
    'rescale:factor=2.0,layers=8-10'
    """
    defaults = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    parts = [
        f"{name.replace('_', '-')}={_written(name, value)}"
        for name, value in options.items()
        if value != defaults.get(name)
    ]
    return f"{kind}:{','.join(parts)}" if parts else kind


def _written(name: str, value: Any) -> str:
    if name in ("layers", "heads"):
        return numbers(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    plain = text.isprintable() and "," not in text and not text.startswith('"')
    return text if plain else json.dumps(text)


def hash_of(*parts: Any) -> str:
    """Return sixteen hex digits for tensors, by type, shape and values, and others, by `repr`."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            values = part.detach().cpu().contiguous()
            digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()[:16]


def spans_of(probes: Iterable[Probe]) -> tuple[str, ...]:
    """Return the parts of the probes' spans that depend on the position of a token, sorted."""
    return placed_atoms(span for probe in probes for span in probe.spans)


def check_probes(probes: Iterable[Any]) -> tuple[Probe, ...]:
    """Return the probes as a tuple.

    Raises:
        InputError: An item is not a probe, or its key is not text.
    """
    listed: tuple[Any, ...] = (probes,)
    if isinstance(probes, Iterable) and not isinstance(probes, str):
        listed = several("probes", probes, "[attention.knock_out(source='last', target='hijack')]")
    for probe in listed:
        if not isinstance(probe, Probe):
            written = isinstance(probe, str) or hasattr(probe, "probe")
            received = repr(probe) if isinstance(probe, str) else f"a {type(probe).__name__}"
            hint = "probes.specification.parse(text).probe(model=model) makes a probe from a text."
            raise InputError(
                f"probes takes a list of probes, such as those of probes.attention or "
                f"probes.values; got {received}.{f' {hint}' if written else ''}"
            )
        utf8("the key of a probe", probe.key, "'my-probe'")
    return listed


@contextmanager
def probed(
    model: HookedModel,
    probes: Sequence[Probe],
    layout: Layout,
    *,
    plain_blocks: PlainBlocks = NO_PLAIN_BLOCKS,
) -> Iterator[HookedModel]:
    """Run the body with probes on the model, in their order; always remove them afterwards.

    Args:
        model: A hooked model.
        probes: The probes.
        layout: The tokens that the body runs.
        plain_blocks: Blocks that replace those of the layers that no probe acts on; by default all
            hook points work in the body.

    Raises:
        InputError: A probe needs something that the model or the layout does not have, or the
            forward pass does not reach one of its hook points.
    """
    hooks: list[NamedHook] = []
    ran: set[str] = set()
    with held(model):
        for probe in probes:
            try:
                hooks += probe.hooks(model, layout)
            except InputError as error:
                # Prefix the probe's key, since several probes may be active.
                if probe.key in str(error):
                    raise
                raise InputError(f"the probe {probe.key}: {error}") from error
        hooks.sort(key=lambda named: PLACES.get(getattr(named[1], "place", ""), 1))
        recorded = [(name, _recorded(function, name, ran)) for name, function in hooks]
        with hooked(model, recorded), plain_blocks.where_no_hook_acts(name for name, _ in hooks):
            yield model
    if ran and (idle := next((name for name, _ in hooks if name not in ran), None)):
        raise InputError(
            f"the forward pass of this model does not reach its hook point {idle!r}, so a probe "
            "there does nothing. Use another hook point."
        )


def _recorded(function: HookFunction, name: str, ran: set[str]) -> HookFunction:
    def call(value: Any, hook: Any) -> Any:
        ran.add(name)
        return function(value, hook=hook)

    return call


def logits_at(
    model: HookedModel,
    layout: Layout,
    at_row: Int[Tensor, " read"],
    at_position: Int[Tensor, " read"],
    *,
    probes: Sequence[Probe] = (),
    plain_blocks: PlainBlocks = NO_PLAIN_BLOCKS,
    **forward: Any,
) -> Float[Tensor, "read vocab"]:
    """Return logits at chosen positions of a batch, with probes on.

    Only these positions are unembedded: nothing of size batch x pos x vocabulary is made, and no
    gradient is kept.

    Positions are counted among the computed tokens; `plain_blocks` are as in `probed`, and
    `forward` are further arguments of the model's forward pass, such as masks and positions.
    """

    def keep_read(residual: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        index = (at_row.to(residual.device), at_position.to(residual.device))
        return residual[index][None]

    if isinstance(model, TransformerBridge):
        # A cache of keys and values would hold the activations of every layer for nothing.
        forward.setdefault("use_cache", False)
        if "position_ids" not in forward:
            require_one_side(model, layout.tokens.shape[1], at_position)
    reader = HookProbe("read", [("unembed.hook_in", keep_read)])
    on = probed(model, [*probes, reader], layout, plain_blocks=plain_blocks)
    with torch.inference_mode(), on:
        return model(layout.tokens, **forward)[0].to(layout.tokens.device)
