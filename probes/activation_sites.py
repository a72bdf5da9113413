"""Activation sites: where in a model activations are read and written, token by token.

    resid_pre, resid_mid, resid_post    residual stream      [batch, pos, d_model]
    attn_out, mlp_out                   added to the stream  [batch, pos, d_model]
    z, q                                per query head       [batch, pos, head, d_head]
    k, v                                per key/value head   [batch, pos, kv_head, d_head]

`attn_out` and `mlp_out` are taken after the norm that Gemma-2 and -3 put there; `q` and `k` before
rotary positions and before the norm that Gemma-3 gives them.

Writing `resid_mid` changes the attention output. The hook of that name in a TransformerBridge is
the input of the MLP's norm: writing to it would change what the MLP reads, but not the stream
itself, to which the MLP's output is added. A model whose stream there is not the sum of `resid_pre`
and `attn_out` is refused during the run (norms of the stream as in GPT, mixers as in Falcon-H1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args

from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.errors import InputError, choice
from hijacklens.models.hooked import HookedModel, HookFunction, NamedHook
from hijacklens.probe import Placed
from hijacklens.sites import Heads, Layers, Sites, choose
from probes.checks import HEAD_AXES, Site, check_heads
from probes.rounding import rounding

_HOOKS = {name: f"{'attn.' if name in HEAD_AXES else ''}hook_{name}" for name in get_args(Site)}


def hook_name(site: Site, layer: int) -> str:
    """Return the hook at which a site is read."""
    return f"blocks.{layer}.{_HOOKS[site]}"


def choose_sites(
    model: HookedModel,
    site: Site,
    *,
    layers: Layers = None,
    heads: Heads = None,
    allowed: Iterable[Site] = get_args(Site),
) -> Sites:
    """Choose layers and heads of a site: query heads for `z` and `q`, key/value heads for the rest.

    All layers are all that have the site.

    Raises:
        InputError: As for `check_heads`; the site is not allowed, or the model does not have it
            (the one-layer model has no MLP), or has no such layer or head.
    """
    choice("site", site, allowed)
    check_heads(site, heads)
    hooks, n_layers = model.hook_dict, int(model.cfg.n_layers)
    known = [x for x in allowed if any(hook_name(x, i) in hooks for i in range(n_layers))]
    choice("site of this model", site, known)
    axis = HEAD_AXES.get(site, "head")
    return choose(model, layers=layers, heads=heads, axis=axis, hook=_HOOKS[site])


def reading(
    site: Site,
    layer: int,
    rows: Int[Tensor, " token"],
    positions: Int[Tensor, " token"],
    keep: Callable[[Tensor], None],
) -> NamedHook:
    """Return a hook that passes the activations of tokens of a batch, [token, ...], to `keep`."""

    def hook_function(value: Tensor, hook: Any) -> None:  # [batch, pos, ...]
        keep(_at(value, (rows, positions)))

    return hook_name(site, layer), hook_function


def writing(
    site: Site,
    layer: int,
    rows: Int[Tensor, ...],
    positions: Int[Tensor, ...],
    values: Float[Tensor, "token ... width"],
    *,
    heads: Int[Tensor, ...] | None = None,
) -> list[NamedHook]:
    """Return hooks that put values at tokens of a batch.

    A token is given by its row and its position among the computed tokens; at a site with heads
    also by a head, and values are [token, d_head]. All three may be arrays that broadcast.
    """
    index = (rows, positions) if heads is None else (rows, positions, heads)
    name = hook_name(site, layer)
    if site != "resid_mid":
        return [(name, _put(index, values))]
    at = (rows, positions)
    seen: dict[str, Tensor] = {}

    def keep(part: str, value: Tensor, hook: Any) -> None:
        _same_width(values, value, hook)
        seen[part] = _at(value, at)

    def complete(output: Tensor, hook: Any) -> Tensor:
        return _put(at, values.to(output) - seen["before"].to(output))(output, hook=hook)

    def check(stream: Tensor, hook: Any) -> None:
        parts = [seen[part].to(stream.device).float() for part in ("before", "output")]
        error = _at(stream, at).float() - sum(parts)
        if error.norm() > rounding(stream.dtype) * sum(float(part.norm()) for part in parts):
            raise InputError(
                f"resid_mid of this model cannot be patched: at {hook.name} the stream is not the "
                "sum of resid_pre and attn_out, since a norm, a multiplier or a further part of "
                "the layer comes between. Patch attn_out, resid_pre or resid_post."
            )

    attn_out = hook_name("attn_out", layer)
    return [  # other probes may change the parts, too: the sum is measured after them
        (hook_name("resid_pre", layer), Placed(partial(keep, "before"), "last")),
        (attn_out, complete),
        (attn_out, Placed(partial(keep, "output"), "last")),
        (name, Placed(check, "first")),
    ]


def _at(value: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    return value[tuple(part.to(value.device) for part in index)]


def _put(index: tuple[Tensor, ...], values: Tensor) -> HookFunction:
    def hook_function(value: Tensor, hook: Any) -> Tensor:
        _same_width(values, value, hook)
        value = value.clone()
        value[tuple(part.to(value.device) for part in index)] = values.to(value)
        return value

    return hook_function


def _same_width(new: Tensor, activation: Tensor, hook: Any) -> None:
    if new.shape[-1] != activation.shape[-1]:
        raise InputError(
            f"the patch holds activations of width {new.shape[-1]}, and {hook.name} of this model "
            f"has {activation.shape[-1]}: they come from another model."
        )
