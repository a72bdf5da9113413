"""Sets of heads: how they are written, and random ones to hold a found set against.

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
"""Draws for each set that is wanted, before a small model counts as having no more of them."""


def label(heads: Sequence[Head]) -> str:
    """A set in the words of the command line: `8.3+9.1` is head 3 of layer 8 and 1 of layer 9."""
    return "+".join(f"{layer}.{head}" for layer, head in sorted(heads))


def draw(
    chosen: Sequence[Head], *, layers: int, heads: int, count: int, matched: bool, seed: int
) -> tuple[tuple[Head, ...], ...]:
    """Random sets of the size of a chosen one and without its heads, no two alike.

    Args:
        chosen: The set that they are controls of.
        layers: How many layers the model has.
        heads: How many query heads a layer has.
        count: How many sets. There are fewer where the model has not so many.
        matched: Whether they have as many heads in each layer as the chosen one. A layer with too
            few other heads is helped out by the nearest layers that have some.
        seed: Seeds the draw.

    Raises:
        InputError: The chosen set leaves fewer heads than it has.
    """
    everything = [(layer, head) for layer in range(layers) for head in range(heads)]
    others = [head for head in everything if head not in chosen]
    if len(others) < len(chosen):
        raise InputError(
            f"a random set of {len(chosen)} heads cannot be drawn from the {len(others)} that are "
            f"not chosen; choose fewer of the model's {len(everything)} heads, or random_sets=0."
        )
    rng = np.random.default_rng([seed, int(matched)])
    found: dict[tuple[Head, ...], None] = {}
    for _ in range(_ATTEMPTS * count):
        if len(found) == count:
            break
        free = list(others)
        for i in rng.permutation(len(chosen)):
            pool = _nearest(free, chosen[i][0]) if matched else free
            free.remove(pool[rng.integers(len(pool))])
        found.setdefault(tuple(head for head in others if head not in free))
    return tuple(found)


def _nearest(heads: Sequence[Head], layer: int) -> list[Head]:
    """The heads of a layer, or of the layers closest to it that have some."""
    distance = min(abs(at - layer) for at, _ in heads)
    return [head for head in heads if abs(head[0] - layer) == distance]
