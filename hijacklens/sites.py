"""Sites: the layers and heads that a probe acts on.

Layers and heads are counted from 0. Under grouped-query attention there are fewer key/value heads
than query heads: probes of W_V choose among the `kv_head`s, probes of attention or of head outputs
among the `head`s.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeAlias

from hijacklens.errors import InputError, is_whole, several, shown
from hijacklens.models.hooked import HookedModel
from hijacklens.models.wrapping import require_split_heads

HeadAxis: TypeAlias = Literal["head", "kv_head"]
Layers: TypeAlias = int | Iterable[int] | None
"""One layer, several, or None for all that have what is probed."""
Heads: TypeAlias = int | Iterable[int | tuple[int, int]] | None
"""Numbers are heads of every chosen layer (all by default): `[1, 2]`. Pairs (layer, head) choose
the layers too: `[(1, 2)]`. None is all heads. `(1, 2)` without layers could mean both: refused."""


@dataclass(frozen=True, slots=True)
class Sites:
    """Chosen heads of a model."""

    pairs: tuple[tuple[int, int], ...]
    """Pairs (layer, head), sorted, each once."""

    @property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer -> its chosen heads."""
        groups = groupby(self.pairs, key=lambda pair: pair[0])
        return {layer: tuple(head for _, head in pairs) for layer, pairs in groups}


def head_count(model: HookedModel, axis: HeadAxis) -> int:
    """Return the number of query heads or key/value heads of a layer."""
    grouped = getattr(model.cfg, "n_key_value_heads", None) if axis == "kv_head" else None
    return int(grouped or model.cfg.n_heads)


def choose(
    model: HookedModel,
    *,
    layers: Layers = None,
    heads: Heads = None,
    axis: HeadAxis = "head",
    hook: str = "attn.hook_z",
) -> Sites:
    """Choose heads of a model, counted among query heads or key/value heads.

    All layers are all that have a hook, by default that of heads: in hybrids (Jamba, Qwen3-Next)
    some layers have none.

    Raises:
        InputError: The model has no such layer or head, a layer without the hook is named, no layer
            has it, the choice is empty, or both pairs and layers are given.
    """
    require_split_heads(model)
    layers, heads = canonical(layers, heads)
    n_layers, n_heads = int(model.cfg.n_layers), head_count(model, axis)
    chosen = sorted(set(pairs(n_layers, n_heads, layers=layers, heads=heads, axis=axis)))
    hooks = model.hook_dict  # a bridge builds this mapping on every access
    having = [layer for layer in range(n_layers) if f"blocks.{layer}.{hook}" in hooks]
    if not having:
        raise InputError(
            f"no layer of {model.cfg.model_name!r} has {hook}, since it has no attention heads or "
            "TransformerLens does not show them."
        )
    without = [layer for layer, _ in chosen if layer not in having]
    if without and (layers is not None or isinstance(heads, tuple)):
        raise InputError(
            f"layer {without[0]} of {model.cfg.model_name!r} has no {hook}; layers that have it: "
            f"{numbers(having)}."
        )
    return Sites(tuple(site for site in chosen if site[0] in having))


def pairs(
    n_layers: int,
    n_heads: int,
    *,
    layers: Layers = None,
    heads: Heads = None,
    axis: HeadAxis = "head",
) -> tuple[tuple[int, int], ...]:
    """Return pairs (layer, head) among `n_layers` layers of `n_heads` heads, in the given order.

    Raises:
        InputError: As for `choose`.
    """
    heads = range(n_heads) if heads is None else _items(_unambiguous(heads, layers))
    if any(isinstance(head, tuple) for head in heads):
        if layers is not None:
            raise InputError("pairs (layer, head) choose the layers too; leave layers out.")
        sites: list[Any] = list(heads)
    else:
        layers = range(n_layers) if layers is None else _items(layers)
        if any(isinstance(layer, tuple) for layer in layers):
            raise InputError(f"layers are numbers, not pairs: {layers}.")
        sites = [(layer, head) for layer in layers for head in heads]
    if not sites:
        raise InputError("no layer or head is chosen; give at least one, or None for all.")
    for layer, head in sites:
        for name, index, count in (("layer", layer, n_layers), (axis, head, n_heads)):
            if not 0 <= index < count:
                raise InputError(
                    f"{name} {index} is not one of this model's; it has {count}, counted from 0 "
                    f"to {count - 1}."
                )
    return tuple(sites)


def canonical(layers: Any, heads: Any) -> tuple[Any, Any]:
    """Return a choice of layers and one of heads in a form that compares equal if they are equal.

    That is None, one number, a sorted tuple of layers or pairs, or a frozenset of numbers of heads.

    Raises:
        InputError: A choice holds anything but numbers, or anything but pairs of numbers, or one
            tuple of two numbers is given for heads and no layers.
    """

    def plain(choice: Any, kind: Any) -> Any:
        if choice is None or is_whole(choice):
            return choice if choice is None else operator.index(choice)
        items = sorted(set(_items(choice)))
        return (tuple if items and isinstance(items[0], tuple) else kind)(items)

    return plain(layers, tuple), plain(_unambiguous(heads, layers), frozenset)


def _unambiguous(heads: Any, layers: Any) -> Any:
    """Refuse one bare pair, which could also be two heads of every layer."""
    if layers is None and isinstance(heads, tuple) and [*map(is_whole, heads)] == [True, True]:
        first, second = map(operator.index, heads)
        raise InputError(
            f"heads=({first}, {second}) may mean two things; give [({first}, {second})] for head "
            f"{second} of layer {first}, or [{first}, {second}] for these heads of every layer."
        )
    return heads


def numbers(choice: Any) -> str:
    """Write layers or heads as the command line does: `8-11`, `0+2` or `8.3+9.1`."""
    items = sorted(set(_items(choice)))
    if items and isinstance(items[0], tuple):
        return "+".join(f"{layer}.{head}" for layer, head in items)
    if len(items) > 2 and items == list(range(items[0], items[-1] + 1)):
        return f"{items[0]}-{items[-1]}"
    return "+".join(map(str, items))


def _items(choice: Any) -> list[Any]:
    """Return one or several numbers, or several pairs of numbers, as a list of plain ones."""
    if is_whole(choice):
        return [operator.index(choice)]
    items: list[Any] = []
    example = "range(8, 12), or heads as [(8, 3)], which a command line writes as 8.3"
    for item in several("layers or heads", choice, example):
        pair = isinstance(item, (tuple, list))
        if not all(map(is_whole, item if pair else [item])) or (pair and len(item) != 2):
            raise InputError(f"{shown(item)} is not a layer or head number, nor a pair of them.")
        items.append(tuple(map(operator.index, item)) if pair else operator.index(item))
    if len({type(item) for item in items}) > 1:
        raise InputError(f"heads are numbers or pairs (layer, head), not both: {items}.")
    return items
