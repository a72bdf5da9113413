"""Value probes: put another matrix in place of W_V, or of a head's whole OV circuit.

    values.replace(values.zero(), layers=range(8, 12))            # no values in four layers
    values.replace(values.low_rank(4), heads=[(8, 1), (9, 0)])     # kv heads of chosen layers
    values.replace(values.taken_from(layer=5), layers=8)
    values.replace({(8, 1): matrix})                              # [d_model, d_head]
    values.replace(values.memory(task))                           # equation 5.1, one-layer model
    values.replace_circuit(values.low_rank(2), heads=[(8, 3)])     # W_V W_O of one query head

Under grouped-query attention a W_V belongs to a key/value head, which several query heads read, so
`replace` counts heads among the `kv_head`s; an OV circuit belongs to one query head, so
`replace_circuit` counts them among the `head`s and leaves the others that share its W_V alone.

Matrices act on row vectors, on what the model at hand feeds to W_V: weighted norms in a model as
loaded, bare ones where norms were folded (`probes.values.matrices` says more). The bias b_V stays
unless `keep_bias=False`; after `fold_value_biases` it is part of b_O, which always stays.
Replacing a W_V equals editing the weights; nothing in the model is written to.

>>> import torch
>>> from hijacklens.one_layer import spans
>>> from hijacklens.one_layer.model import OneLayerConfig, OneLayerTransformer
>>> from hijacklens.one_layer.task import ConceptTask
>>> from hijacklens.probe import probed
>>> task = ConceptTask(bits=2, length=4)
>>> model = OneLayerTransformer(OneLayerConfig(vocab=4, d_model=4, length=4))
>>> layout = spans.layout(task, torch.tensor([[0, 1, 2, 3]]))
>>> with probed(model, [replace(identity())], layout):
...     swapped = model(layout.tokens)
>>> torch.allclose(swapped, model.with_value(torch.eye(4))(layout.tokens), atol=1e-6)
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, NamedHook
from hijacklens.prompts.layout import Layout
from hijacklens.sites import Heads, Layers, choose, describe, kept
from probes.values.hooks import circuit_hooks, inner_hooks, value_hooks
from probes.values.paper_memory import associations, memory
from probes.values.replacements import (
    MadeMatrices,
    Source,
    computed,
    given,
    identity,
    low_rank,
    matched,
    random,
    scaled,
    taken_from,
    zero,
)

__all__ = [
    "CircuitReplacement",
    "Source",
    "ValueReplacement",
    "associations",
    "computed",
    "given",
    "identity",
    "low_rank",
    "matched",
    "memory",
    "random",
    "replace",
    "replace_circuit",
    "scaled",
    "taken_from",
    "zero",
]

Replacement: TypeAlias = Source | Tensor | Mapping[tuple[int, int], Tensor]
"""A source, a matrix for all places, or a mapping (layer, head) -> matrix."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValueReplacement:
    """A probe that puts another matrix in place of W_V; `replace` makes one."""

    source: Source
    layers: Layers
    heads: Heads
    """Key/value heads."""
    keep_bias: bool
    made: MadeMatrices = field(default_factory=MadeMatrices, repr=False)

    @property
    def key(self) -> str:
        """Where values are replaced, by what, and whether b_V stays."""
        return _key("replace-values", self.layers, self.heads, "kv_heads", self)

    @property
    def spans(self) -> Sequence[str]:
        """None: the values of all tokens are replaced."""
        return ()

    @property
    def packs(self) -> bool:
        """True: a token's value depends on that token alone."""
        return True

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Two hooks per layer: on the input of W_V and on the values.

        Raises:
            InputError: The model has no such layer or head, no W_V per head, or the matrix does
                not fit.
        """
        chosen = choose(model, layers=self.layers, heads=self.heads, axis="kv_head")
        new = self.made.of(self.source.matrix, model, "value", chosen)
        return [
            hook
            for layer, matrices in new.items()
            for hook in value_hooks(model, layer, matrices, keep_bias=self.keep_bias)
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CircuitReplacement:
    """A probe that puts another matrix in place of W_V W_O; `replace_circuit` makes one."""

    source: Source
    layers: Layers
    heads: Heads
    """Query heads."""
    keep_bias: bool
    made: MadeMatrices = field(default_factory=MadeMatrices, repr=False)

    @property
    def key(self) -> str:
        """Where circuits are replaced, by what, and whether b_V stays."""
        return _key("replace-circuits", self.layers, self.heads, "heads", self)

    @property
    def spans(self) -> Sequence[str]:
        """None: what is read from any token is replaced."""
        return ()

    @property
    def packs(self) -> bool:
        """True where the new circuit is made of W_V and W_O (`zero`, `scaled`, `low_rank`).

        Others need what W_V was given for every token, also for those whose keys and values come
        from a cache when prompts share them.
        """
        return self.source.make_inner is not None

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Hooks on z, and for any matrix on the input of W_V, values, pattern and output too.

        Raises:
            InputError: As for `ValueReplacement.hooks`; or keys and values come from a cache and
                the probe does not pack.
        """
        chosen = choose(model, layers=self.layers, heads=self.heads)
        if self.packs:
            make, hooks_of = self.source.inner, inner_hooks
        elif layout.past_tokens is None:
            make, hooks_of = self.source.matrix, circuit_hooks
        else:
            raise InputError(
                f"replacing circuits by {self.source.key} needs what W_V was given for every token "
                "and a key/value cache does not hold it; run whole prompts without a cache."
            )
        new = self.made.of(make, model, "circuit", chosen)
        return [
            hook
            for layer, matrices in new.items()
            for hook in hooks_of(model, layer, matrices, keep_bias=self.keep_bias)
        ]


def replace(
    source: Replacement, *, layers: Layers = None, heads: Heads = None, keep_bias: bool = True
) -> ValueReplacement:
    """Put another matrix in place of W_V for chosen layers and key/value heads.

    Args:
        source: What takes its place: `zero()`, `identity()`, `scaled(f)`, `low_rank(r)`,
            `random(seed=s)`, `taken_from(...)`, `memory(task)`, `associations(pairs)`,
            `computed(function, name=...)`, `matched(...)` of any of them, a matrix
            [d_model, d_head] on row vectors, or a mapping (layer, kv_head) -> matrix.
        layers: One layer, several, or None for all (for a mapping: those it names).
        heads: Key/value heads of each of these layers, or pairs (layer, kv_head); None for all
            (for a mapping: those it names).
        keep_bias: Whether b_V (GPT-2) stays; with `zero()` and False the values are zero.

    Returns:
        A probe. It packs, and it works with a key/value cache.

    Raises:
        InputError: The source is none of these. What the model lacks, and a matrix of another
            shape, show when the probe is put on it.

    Note:
        It acts on what W_V is given when its turn comes: probes that change that (`attn.v.hook_in`)
        are listed before it. Costs one product [pos, d_model] x [d_model, d_head] per kv head.
    """
    made, at = _source(source), _places(source, layers, heads)
    return ValueReplacement(source=made, layers=kept(layers), heads=at, keep_bias=keep_bias)


def replace_circuit(
    source: Replacement, *, layers: Layers = None, heads: Heads = None, keep_bias: bool = True
) -> CircuitReplacement:
    """Put another matrix in place of the OV circuit W_V W_O of chosen query heads.

    The head then writes pattern @ (x @ M), x what W_V is given: before the norm that Gemma-2 and
    -3 have behind attention. M need not factor through d_head.

    Args:
        source: As for `replace`; a matrix is [d_model, d_model] on row vectors, and `low_rank`,
            `scaled`, `random` and `taken_from` mean the product W_V W_O.
        layers: One layer, several, or None for all (for a mapping: those it names).
        heads: Query heads of each of these layers, or pairs (layer, head); None for all (for a
            mapping: those it names).
        keep_bias: Whether what the head writes for b_V (GPT-2) stays; b_O always does.

    Returns:
        A probe. With `zero`, `scaled` and `low_rank` (matched or not) it packs and works with a
        key/value cache; with any other matrix every prompt is run by itself.

    Raises:
        InputError: As for `replace`. During a run with a matrix that does not pack: another probe
            changes the pattern or values of the head after this one, or its output z at all.

    Note:
        List probes of attention and of values before this one. A circuit that packs costs one
        product [pos, d_head] x [d_head, d_head] per head. Any other costs [pos, d_model] x
        [d_model, d_model] and [pos, pos] x [pos, d_model] per head, and at `hook_z` its head shows
        the part of b_V alone, as the rest is added behind W_O.
    """
    made, at = _source(source), _places(source, layers, heads)
    return CircuitReplacement(source=made, layers=kept(layers), heads=at, keep_bias=keep_bias)


def _source(source: Any) -> Source:
    if isinstance(source, Source):
        return source
    if isinstance(source, (Tensor, Mapping)):
        return given(source)
    hint = ""
    if callable(source):
        hint = (
            " Call it if it is one of probes.values, such as zero() or memory(task); give a "
            "function of your own a name: computed(function, name=...)."
        )
    raise InputError(
        f"a value matrix is replaced by a source such as probes.values.zero(), a matrix, or a "
        f"mapping (layer, head) -> matrix; not by {source!r}.{hint}"
    )


def _places(source: Any, layers: Layers, heads: Heads) -> Any:
    if isinstance(source, Mapping) and layers is None and heads is None:
        return tuple(sorted(source))
    return kept(heads)


def _key(
    name: str,
    layers: Layers,
    heads: Heads,
    axis: str,
    probe: ValueReplacement | CircuitReplacement,
) -> str:
    chosen = describe(layers=layers, heads=heads).replace("heads=", f"{axis}=") or "layers=all"
    bias = "" if probe.keep_bias else ",keep_bias=False"
    return f"{name}:{chosen},by={probe.source.key}{bias}"
