"""Sites: which layers and which heads a probe acts on.

Layers and heads are counted from 0. Under grouped-query attention keys and values have fewer heads
than queries: a probe of W_V chooses among the `kv_head`s, one of attention or of head outputs
among the `head`s, and labels say which.

>>> describe(layers=range(8, 12), heads=[0, 2])
'layers=8-11,heads=0+2'
>>> describe(heads=[(8, 3), (9, 1)])
'heads=8.3+9.1'
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeAlias

from hijacklens.errors import InputError, is_whole, several, shown
from hijacklens.models.hooked import HookedModel

HeadAxis: TypeAlias = Literal["head", "kv_head"]
Layers: TypeAlias = int | Iterable[int] | None
"""One layer, several, or None for all."""
Heads: TypeAlias = int | Iterable[int | tuple[int, int]] | None
"""Heads of every chosen layer, or pairs (layer, head) that choose the layers too; None for all."""


@dataclass(frozen=True, slots=True)
class Sites:
    """Chosen heads of a model, in order."""

    pairs: tuple[tuple[int, int], ...]
    """Pairs (layer, head), sorted, each once."""
    axis: HeadAxis
    label: str
    """How they were asked for: `layers=8-11,heads=0+2`, `heads=8.3+9.1`, or nothing for all."""

    @property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer -> its chosen heads."""
        groups = groupby(self.pairs, key=lambda pair: pair[0])
        return {layer: tuple(head for _, head in pairs) for layer, pairs in groups}


def head_count(model: HookedModel, axis: HeadAxis) -> int:
    """How many heads a layer has along an axis."""
    grouped = getattr(model.cfg, "n_key_value_heads", None) if axis == "kv_head" else None
    return int(grouped or model.cfg.n_heads)


def choose(
    model: HookedModel, *, layers: Layers = None, heads: Heads = None, axis: HeadAxis = "head"
) -> Sites:
    """The heads of a model that are asked for.

    Args:
        model: Any hooked model.
        layers: One layer, several, or None for all.
        heads: Heads of each of these layers, or pairs (layer, head) and no layers; None for all.
        axis: Whether heads are counted among query heads or key/value heads.

    Raises:
        InputError: The model has no such layer or head, none is chosen, or pairs are given with
            layers.
    """
    n_layers, n_heads = int(model.cfg.n_layers), head_count(model, axis)
    chosen = None if heads is None else _items(heads)
    if chosen is not None and any(isinstance(head, tuple) for head in chosen):
        if layers is not None:
            raise InputError("pairs (layer, head) choose the layers too; leave layers out.")
        if not all(isinstance(head, tuple) and len(head) == 2 for head in chosen):
            raise InputError(f"heads are numbers or pairs (layer, head), not both: {chosen}.")
        pairs: Iterable[Any] = [
            (_whole(layer, n_layers, "layer"), _whole(head, n_heads, axis))
            for layer, head in (pair for pair in chosen if isinstance(pair, tuple))
        ]
    else:
        of_layers = [_whole(layer, n_layers, "layer") for layer in _listed(layers, n_layers)]
        of_heads = [_whole(head, n_heads, axis) for head in _listed(chosen, n_heads)]
        pairs = [(layer, head) for layer in of_layers for head in of_heads]
    found = tuple(sorted(set(pairs)))
    if not found:
        raise InputError(
            "no layer or head is chosen; give at least one, or leave both out for all."
        )
    return Sites(found, axis, describe(layers=layers, heads=chosen))


def describe(*, layers: Layers = None, heads: Heads = None) -> str:
    """The choice in the words of the command line: `layers=8-11,heads=0+2`."""
    parts = [
        f"{name}={_numbers(value)}"
        for name, value in (("layers", layers), ("heads", heads))
        if value is not None
    ]
    return ",".join(parts)


def _numbers(value: Any) -> str:
    listed = sorted(_items(value), key=lambda item: (isinstance(item, tuple), item))
    if any(isinstance(item, tuple) for item in listed):
        return "+".join(".".join(map(str, pair)) for pair in listed)
    if len(listed) > 2 and listed == list(range(listed[0], listed[-1] + 1)):
        return f"{listed[0]}-{listed[-1]}"
    return "+".join(map(str, listed))


def _listed(value: Any, count: int) -> list[Any]:
    return list(range(count)) if value is None else _items(value)


def kept(chosen: Any) -> Any:
    """A choice of layers or heads that can be read any number of times: None, one, or a tuple.

    Raises:
        InputError: It holds something that is no number and no pair of them.
    """
    if chosen is None:
        return None
    items = _items(chosen)
    return items[0] if is_whole(chosen) else tuple(items)


def _items(value: Any) -> list[Any]:
    """One number, or several numbers or pairs, as a list of plain ones."""
    if is_whole(value):
        return [operator.index(value)]
    found: list[Any] = []
    for item in several("layers or heads", value, "8, range(8, 12) or [(8, 3), (9, 1)]"):
        pair = isinstance(item, (tuple, list))
        if not all(map(is_whole, item if pair else [item])):
            raise InputError(f"{shown(item)} is no number of a layer or head, nor a pair of them.")
        found.append(tuple(map(operator.index, item)) if pair else operator.index(item))
    return found


def _whole(value: Any, count: int, what: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < count:
        raise InputError(
            f"{what} {value!r} is not one of this model's; it has {count}, counted from 0 to "
            f"{count - 1}."
        )
    return number
