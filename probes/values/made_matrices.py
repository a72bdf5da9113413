"""Matrices that a probe puts on a model again and again, made once for as long as they are right.

A run asks a probe for its hooks once per batch; a singular value decomposition of every head each
time would cost more than the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from hijacklens.models.hooked import HookedModel
from hijacklens.sites import Sites
from probes.values.replacements import MatrixKind, Place


class MadeMatrices:
    """What a source has made for a probe, for as long as the weights of their model do not change.

    A singular value decomposition per batch would cost more than the batch. Copies start empty.
    """

    def __init__(self) -> None:
        self._of_model: WeakKeyDictionary[Any, tuple[Any, dict[tuple[int, int], Tensor]]]
        self._of_model = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return MadeMatrices, ()

    def of(
        self,
        make: Callable[[Place], Tensor],
        model: HookedModel,
        kind: MatrixKind,
        sites: Sites,
    ) -> dict[int, dict[int, Tensor]]:
        """What is made for all sites: layer -> head -> matrix; always by the same function.

        Raises:
            InputError: It has no matrix that fits.
        """
        state = tuple(
            (p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()
        )
        seen, made = self._of_model.get(model, (None, {}))
        if seen != state:
            made = {}
            self._of_model[model] = (state, made)
        for layer, head in sites.pairs:
            if (layer, head) not in made:
                made[layer, head] = make(Place(model, layer, head, kind))
        return {
            layer: {head: made[layer, head] for head in heads}
            for layer, heads in sites.by_layer.items()
        }
