"""Activation sites: where in a model activations are read and written, token by token.

    resid_pre, resid_mid, resid_post    residual stream      [batch, pos, d_model]
    attn_out, mlp_out                   added to the stream  [batch, pos, d_model]
    z, q                                per query head       [batch, pos, head, d_head]
    k, v                                per key/value head   [batch, pos, kv_head, d_head]

`attn_out` and `mlp_out` are taken behind the norm that Gemma-2 and -3 put there; `q` and `k`
before rotary positions and before the norm that Gemma-3 gives them.

`resid_mid` is written by way of the attention output. The hook of that name that a
TransformerBridge has is the input of the MLP's norm: writing there changes what the MLP reads and
leaves the stream itself, to which the MLP's output is added, as it was.

>>> HEAD_AXES["v"]
'kv_head'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.errors import InputError, unknown
from hijacklens.models.hooked import HookedModel, HookFunction, NamedHook
from hijacklens.sites import HeadAxis

Site: TypeAlias = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v"
]
HEAD_AXES: Mapping[str, HeadAxis] = {"z": "head", "q": "head", "k": "kv_head", "v": "kv_head"}
"""The sites that are split into heads, and which heads these are."""
_HOOKS = {
    **{name: f"blocks.{{}}.hook_{name}" for name in ("resid_pre", "resid_mid", "resid_post")},
    **{name: f"blocks.{{}}.hook_{name}" for name in ("attn_out", "mlp_out")},
    **{name: f"blocks.{{}}.attn.hook_{name}" for name in HEAD_AXES},
}


def hook_name(model: HookedModel, site: Site, layer: int) -> str:
    """The hook at which a site is read.

    Raises:
        InputError: The model has no such site (the one-layer model has no MLP).
    """
    if site not in _HOOKS:
        raise unknown("site", site, _HOOKS)
    name = _HOOKS[site].format(layer)
    if name not in model.hook_dict:
        there = [other for other, form in _HOOKS.items() if form.format(layer) in model.hook_dict]
        raise unknown("site of this model", site, there)
    return name


def reading(
    model: HookedModel,
    site: Site,
    layer: int,
    rows: Int[Tensor, " place"],
    positions: Int[Tensor, " place"],
    keep: Callable[[Tensor], None],
) -> NamedHook:
    """A hook that hands the activations at places of a batch, [place, ...], to `keep`."""

    def hook_function(value: Tensor, hook: Any) -> None:  # [batch, pos, ...]
        keep(value[rows.to(value.device), positions.to(value.device)])

    return hook_name(model, site, layer), hook_function


def writing(
    model: HookedModel,
    site: Site,
    layer: int,
    rows: Int[Tensor, " place"],
    positions: Int[Tensor, " place"],
    values: Float[Tensor, "place ... width"],
    *,
    heads: Int[Tensor, " place"] | None = None,
) -> list[NamedHook]:
    """Hooks that put values at places of a batch.

    Args:
        model: The model they are for.
        site: What is written.
        layer: Where.
        rows: The row of each place.
        positions: Its position among the computed tokens.
        values: What is put there: [place, d_model], or [place, d_head] with `heads`.
        heads: The head of each place, where the site has heads.
    """
    places = (rows, positions) if heads is None else (rows, positions, heads)
    if site != "resid_mid":
        return [(hook_name(model, site, layer), _put(places, values))]
    hook_name(model, site, layer)  # refuses a model without one
    before: list[Tensor] = []

    def keep_stream(stream: Tensor, hook: Any) -> None:
        before[:] = [stream[rows.to(stream.device), positions.to(stream.device)]]

    def complete(output: Tensor, hook: Any) -> Tensor:
        new = values.to(output) - before[0].to(output)
        return _put(places, new)(output, hook=hook)

    return [
        (hook_name(model, "resid_pre", layer), keep_stream),
        (hook_name(model, "attn_out", layer), complete),
    ]


def _put(places: tuple[Tensor, ...], values: Tensor) -> HookFunction:
    def hook_function(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[tuple(place.to(value.device) for place in places)] = values.to(value)
        return value

    return hook_function


def check_heads(site: Site, heads: Any) -> None:
    """Refuse heads for a site that has none.

    Raises:
        InputError: Heads are given, and the site is not split into heads.
    """
    if heads is not None and site in _HOOKS and site not in HEAD_AXES:
        raise InputError(
            f"{site} is not split into heads; leave heads out, or use {', '.join(HEAD_AXES)}."
        )
