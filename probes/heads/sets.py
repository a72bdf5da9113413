"""Sets of heads: their labels, and random sets to compare a chosen set with.

>>> label([(9, 1), (8, 3)])
'8.3+9.1'
>>> draw([(1, 0)], layers=2, heads=2, count=5, matched=True, seed=0)
(((1, 1),),)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from hijacklens.errors import InputError

Head: TypeAlias = tuple[int, int]
"""Layer and query head, counted from 0."""

_ATTEMPTS = 50
"""Draws per requested set, after which a small model is taken to have no further sets."""


def label(heads: Sequence[Head]) -> str:
    """Write a set as on the command line: `8.3+9.1` is head 3 of layer 8 and head 1 of layer 9."""
    return "+".join(f"{layer}.{head}" for layer, head in sorted(heads))


def draw(
    chosen: Sequence[Head], *, layers: int, heads: int, count: int, matched: bool, seed: int
) -> tuple[tuple[Head, ...], ...]:
    """Draw distinct random sets of the size of a chosen set and without its heads.

    Args:
        chosen: The set that the random sets are controls for.
        layers: How many layers the model has.
        heads: How many query heads a layer has.
        count: How many sets; a small model may have fewer.
        matched: Whether each layer has as many heads as in the chosen set. If a layer has too few
            other heads, the nearest layers with free heads provide the rest.
        seed: Seeds the draw.

    Raises:
        InputError: Fewer heads remain than the chosen set has.
    """
    everything = [(layer, head) for layer in range(layers) for head in range(heads)]
    others = [head for head in everything if head not in chosen]
    if len(others) < len(chosen):
        raise InputError(
            f"a random set of {len(chosen)} heads cannot be drawn from the {len(others)} that are "
            f"not chosen; choose fewer of the model's {len(everything)} heads, or random_sets=0."
        )
    rng = np.random.default_rng([seed, int(matched)])
    sets: dict[tuple[Head, ...], None] = {}
    for _ in range(_ATTEMPTS * count):
        if len(sets) == count:
            break
        free = list(others)
        for i in rng.permutation(len(chosen)):
            pool = _nearest(free, chosen[i][0]) if matched else free
            free.remove(pool[rng.integers(len(pool))])
        sets.setdefault(tuple(head for head in others if head not in free))
    return tuple(sets)


def _nearest(heads: Sequence[Head], layer: int) -> list[Head]:
    """Return the heads of a layer, or of the closest layers that have any."""
    distance = min(abs(at - layer) for at, _ in heads)
    return [head for head in heads if abs(head[0] - layer) == distance]
