"""Value probes: put another matrix in place of W_V, or of the entire OV circuit of a head.

    values.replace(values.zero(), layers=range(8, 12))            # no values in four layers
    values.replace(values.low_rank(4), heads=[(8, 1), (9, 0)])     # two key/value heads
    values.replace(values.taken_from(layer=5), layers=8)
    values.replace({(8, 1): matrix})                              # [d_model, d_head]
    values.replace(values.memory(task))                           # equation 5.1, one-layer model
    values.replace_circuit(values.low_rank(2), heads=[(8, 3)])     # W_V W_O of one query head

Under grouped-query attention a W_V belongs to a key/value head, which several query heads read, so
`replace` counts heads among the `kv_head`s. An OV circuit belongs to one query head, so
`replace_circuit` counts heads among the `head`s and does not change others that share the W_V.

Matrices act on row vectors, on what the model feeds to W_V (`probes.anatomy.matrices`). The bias
b_V stays unless `keep_bias=False`; after `fold_value_biases` it is part of b_O, which always stays.
Replacing a W_V equals editing the weights, but nothing in the model is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel, NamedHook
from hijacklens.probe import Probe, spell
from hijacklens.prompts.layout import Layout
from hijacklens.renamed import old_names, renamed
from hijacklens.sites import Heads, Layers, canonical, choose
from probes.values.hooks import circuit_hooks, inner_hooks, value_hooks
from probes.values.replacements import (
    MatrixKind,
    Replacement,
    associations,
    computed,
    given,
    identity,
    low_rank,
    matched,
    matrices,
    memory,
    random,
    scaled,
    taken_from,
    zero,
)

__all__ = [
    "CircuitReplacement",
    "Replacement",
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

__getattr__ = old_names(__name__, Source="Replacement")

NewMatrices: TypeAlias = Replacement | Tensor | Mapping[tuple[int, int], Tensor]
"""A replacement, a matrix for all sites, or a mapping (layer, head) -> matrix."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValueReplacement:
    """A probe that puts another matrix in place of W_V; made by `replace`."""

    replacement: Replacement
    layers: Layers
    heads: Heads
    """Key/value heads, or query heads for a `CircuitReplacement`."""
    keep_bias: bool

    @property
    def key(self) -> str:
        """The replacement, its sites, and whether b_V stays."""
        unnamed = ("replace-value", {"replacement": self.replacement.key})
        kind, options = self.replacement.spelling or unnamed
        of = "circuit" if isinstance(self, CircuitReplacement) else None
        sites = {"of": of, "layers": self.layers, "heads": self.heads}
        return spell(kind, replace, {**options, **sites, "keep_bias": self.keep_bias})

    @property
    def spans(self) -> Sequence[str]:
        """None: the matrices act on all tokens."""
        return ()

    @property
    def packs(self) -> bool:
        """True: the value of a token depends on that token alone."""
        return True

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return two hooks per layer: on the input of W_V and on the values.

        Raises:
            InputError: As for every probe, or the model has no W_V per head, or one of other shape.
        """
        return self._hooks(model, "value", value_hooks)

    def _hooks(
        self, model: HookedModel, kind: MatrixKind, hooks_of: Callable[..., Sequence[NamedHook]]
    ) -> Sequence[NamedHook]:
        axis = "kv_head" if kind == "value" else "head"
        sites = choose(model, layers=self.layers, heads=self.heads, axis=axis)
        new = matrices(self.replacement, model, kind, sites)
        return [
            hook
            for layer, by_head in new.items()
            for hook in hooks_of(model, layer, by_head, keep_bias=self.keep_bias)
        ]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CircuitReplacement(ValueReplacement):
    """A probe that puts another matrix in place of W_V W_O; made by `replace_circuit`."""

    @property
    def packs(self) -> bool:
        """True if the new circuit is made of W_V and W_O (`zero`, `scaled`, `low_rank`).

        Others need the input of W_V for every token, also for tokens whose keys and values come
        from a cache when prompts share them.
        """
        return self.replacement.has_inner

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return hooks on z; if it does not pack also on the input of W_V, values, pattern, output.

        Raises:
            InputError: Also if keys and values come from a cache and the probe does not pack.
        """
        if self.packs:
            return self._hooks(model, "inner", inner_hooks)
        if layout.past_tokens is not None:
            raise InputError(
                f"replacing circuits by {self.replacement.key} needs the input of W_V for every "
                "token and a key/value cache does not hold it; run prompts without a cache."
            )
        return self._hooks(model, "circuit", circuit_hooks)


@renamed(source="replacement")
def replace(
    replacement: NewMatrices,
    *,
    layers: Layers = None,
    heads: Heads = None,
    keep_bias: bool = True,
) -> ValueReplacement:
    """Put another matrix in place of W_V for chosen layers and key/value heads.

    Args:
        replacement: `zero()`, `identity()`, `scaled(f)`, `low_rank(r)`, `random(seed=s)`,
            `taken_from(...)`, `memory(task)`, `associations(pairs)`, `computed(function,
            name=...)`, `matched(...)` of any of these, a matrix [d_model, d_head] on row vectors,
            or a mapping (layer, kv_head) -> matrix.
        layers: One layer, several, or None for all (for a mapping: those it names).
        heads: Key/value heads of each of these layers, or pairs (layer, kv_head); None for all
            (for a mapping: those it names).
        keep_bias: Whether b_V (GPT-2) stays; with `zero()` and False the values are zero.

    Returns:
        A probe. It packs, and it works with a key/value cache.

    Raises:
        InputError: The replacement is none of these. Layers, heads and shapes are checked when
            the probe is put on a model.

    Note:
        It acts on the input that W_V receives: list probes that change this input
        (`attn.v.hook_in`) before it. The cost is one product [pos, d_model] x [d_model, d_head]
        per key/value head.
    """
    return ValueReplacement(**_fields(replacement, layers, heads), keep_bias=keep_bias)


@renamed(source="replacement")
def replace_circuit(
    replacement: NewMatrices,
    *,
    layers: Layers = None,
    heads: Heads = None,
    keep_bias: bool = True,
) -> CircuitReplacement:
    """Put another matrix in place of the OV circuit W_V W_O of chosen query heads.

    The head then writes pattern @ (x @ M), where x is the input of W_V: before the norm that
    Gemma-2 and -3 have after attention. M need not factor through d_head.

    Args:
        replacement: As for `replace`; a matrix is [d_model, d_model] on row vectors, and
            `low_rank`, `scaled`, `random` and `taken_from` refer to the product W_V W_O.
        layers: As for `replace`.
        heads: As for `replace`, but query heads.
        keep_bias: Whether what the head writes for b_V (GPT-2) stays; b_O always does.

    Returns:
        A probe. With `zero`, `scaled` and `low_rank` (matched or not) it packs and works with a
        key/value cache; with any other matrix each prompt is run separately.

    Raises:
        InputError: As for `replace`. During a run, unless the new circuit is a multiple of the
            old one: the model gates, clips or norms what its heads put out, or another probe
            changes the pattern or the values of the head after this one, or its output z.

    Note:
        List probes of attention and of values before this one. A circuit that packs costs one
        product [pos, d_head] x [d_head, d_head] per head. Any other costs [pos, d_model] x
        [d_model, d_model] and [pos, pos] x [pos, d_model] per head. Since no z could write it, it
        is added after W_O, and hooks on z see no output of this head.
    """
    return CircuitReplacement(**_fields(replacement, layers, heads), keep_bias=keep_bias)


def removed_biases(model: HookedModel, probes: Sequence[Probe]) -> set[tuple[int, int]]:
    """Return layer and key/value head of the values from which probes, in order, remove b_V."""
    removed: set[tuple[int, int]] = set()
    for probe in probes:
        if isinstance(probe, ValueReplacement) and not isinstance(probe, CircuitReplacement):
            sites = choose(model, layers=probe.layers, heads=probe.heads, axis="kv_head")
            removed = removed - set(sites.pairs) if probe.keep_bias else removed | set(sites.pairs)
    return removed


def _fields(replacement: Any, layers: Layers, heads: Heads) -> dict[str, Any]:
    if isinstance(replacement, Mapping) and layers is None and heads is None:
        heads = tuple(replacement)
    if isinstance(replacement, (Tensor, Mapping)):
        replacement = given(replacement)
    if not isinstance(replacement, Replacement):
        hint = ""
        if callable(replacement):
            hint = (
                " Call it if it is one of probes.values, such as zero() or memory(task); give a "
                "function of your own a name: computed(function, name=...)."
            )
        raise InputError(
            f"a value matrix is replaced by a replacement such as probes.values.zero(), a matrix, "
            f"or a mapping (layer, head) -> matrix; not by {replacement!r}.{hint}"
        )
    layers, heads = canonical(layers, heads)
    return {"replacement": replacement, "layers": layers, "heads": heads}
