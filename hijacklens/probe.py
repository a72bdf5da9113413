"""A probe: something pointed at a model that changes what it computes, by hooks alone.

The probes themselves are in the package `probes`; here is what they have in common, so that
scoring and the one-layer model can be run with any of them on:

    with probed(model, [blind], layout):
        logits = model(layout.tokens)

Contract 3: when the body ends, by an error or Ctrl-C too, weights and hooks are bit for bit what
they were.

>>> double = HookProbe("double", [("blocks.0.hook_attn_out", lambda value, hook: 2 * value)])
>>> double.key, double.packs
('double', False)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.errors import InputError, several
from hijacklens.models.hooked import HookedModel, NamedHook, hooked
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.spans import placed_atoms


@runtime_checkable
class Probe(Protocol):
    """What a run needs to know of a probe."""

    @property
    def key(self) -> str:
        """One line that says what the probe does, equal for two probes only if they do the same.

        It is printed, saved with results, and names stored scores; a probe that holds tensors
        puts a hash of them into it.
        """
        ...

    @property
    def spans(self) -> Sequence[str]:
        """The spans that the probe looks up in a layout."""
        ...

    @property
    def packs(self) -> bool:
        """Whether prompts may share tokens while the probe is on.

        True if what it does to a token depends only on the token, on those before it in its own
        prompt, and on the spans they stand in.
        """
        ...

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """The hooks for a forward pass over the tokens of a layout.

        They act in the order given, after those of the probes listed before.

        Raises:
            InputError: The model has no such layer, head, span or hook.
        """
        ...


@dataclass(frozen=True, slots=True)
class HookProbe:
    """A probe of your own: hooks that act on every forward pass in the same way.

    Prompts are run one to a row, and only prompts of one length in a batch, so that positions in
    the hooks are positions of the prompt and there is no padding.
    """

    key: str
    """A name that tells it apart; change it when the hooks change, as stored scores go by it."""
    named_hooks: Sequence[NamedHook]
    spans: Sequence[str] = ()
    packs: bool = False
    """Say True if no hook depends on where in a row a token stands, or on other prompts."""

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """The hooks that were given."""
        return self.named_hooks


def spans_of(probes: Iterable[Probe]) -> tuple[str, ...]:
    """The parts of the probes' spans that depend on where a token stands, sorted."""
    return placed_atoms(span for probe in probes for span in probe.spans)


def check_probes(probes: Iterable[Any]) -> tuple[Probe, ...]:
    """The probes as a tuple.

    Raises:
        InputError: Something else than probes is given.
    """
    listed: tuple[Any, ...] = (probes,)
    if isinstance(probes, Iterable) and not isinstance(probes, str):
        listed = several("probes", probes, "[attention.knock_out(source='last', target='hijack')]")
    for probe in listed:
        if not isinstance(probe, Probe):
            written = isinstance(probe, str) or hasattr(probe, "probe")
            given = repr(probe) if isinstance(probe, str) else f"a {type(probe).__name__}"
            hint = "probes.specification.parse(text).probe(model=model) makes one of a text."
            raise InputError(
                f"probes takes a list of probes, such as those of probes.attention or "
                f"probes.values; got {given}.{f' {hint}' if written else ''}"
            )
    return listed


@contextmanager
def probed(model: HookedModel, probes: Sequence[Probe], layout: Layout) -> Iterator[HookedModel]:
    """Run the body with probes on the model, in their order; they come off whatever happens.

    Raises:
        InputError: A probe asks for what the model or the layout does not have.
    """
    hooks = [hook for probe in probes for hook in _hooks(probe, model, layout)]
    with hooked(model, hooks):
        yield model


def _hooks(probe: Probe, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
    """The hooks of a probe; what is wrong with it is told with its key, as there may be several."""
    try:
        return probe.hooks(model, layout)
    except InputError as error:
        if probe.key in str(error):
            raise
        raise InputError(f"the probe {probe.key}: {error}") from error


def logits_at(
    model: HookedModel,
    layout: Layout,
    at_row: Int[Tensor, " read"],
    at_position: Int[Tensor, " read"],
    *,
    probes: Sequence[Probe] = (),
    **forward: Any,
) -> Float[Tensor, "read vocab"]:
    """Logits at chosen places of a batch, with probes on; only those places are unembedded.

    Nothing of size batch x pos x vocabulary is made, and no gradient is kept.

    Args:
        model: A hooked model.
        layout: The tokens of the forward pass.
        at_row: Row of each place.
        at_position: Position of each place among the computed tokens.
        probes: Act in their order.
        forward: Further arguments of the model's forward pass, such as masks and positions.
    """

    def keep_read(residual: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        places = (at_row.to(residual.device), at_position.to(residual.device))
        return residual[places][None]

    if isinstance(model, TransformerBridge):
        # A cache of keys and values would hold every layer's activations for nothing.
        forward.setdefault("use_cache", False)
    reading = [("unembed.hook_in", keep_read)]
    with torch.inference_mode(), probed(model, probes, layout), hooked(model, reading):
        return model(layout.tokens, **forward)[0].to(layout.tokens.device)
