"""What defences change inside a model, and what they learn from tuning facts.

    scaled_heads     z of a head becomes f z
    Twice            z becomes z + f z', with the z' of a first run (JuICE)
    stream_change    the residual stream x becomes x + v, or x - (x . v) v / |v|^2

`Learned` finds heads and directions on the tuning facts, each once. Its `placebo` has as many heads
of the same layers, directions of the same norm, and subspaces of the same rank, drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.engine.batches import batches
from hijacklens.models.hooked import HookedLanguageModel, HookedModel, NamedHook
from hijacklens.probe import HookProbe, hash_of, logits_at
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.tokens import TokenIds
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.pairs import Pairs
from hijacklens.sites import choose
from probes import heads, logit_shift, values
from probes.activation_sites import hook_name, reading
from probes.anatomy.matrices import value_matrix
from probes.heads.held_out import Head, draw
from probes.values.replacements import Replacement

HeadKind = Literal["carriers", "writers", "keepers"]
CANDIDATES, MOST_HEADS = 12, 6
"""Heads that the search ablates one by one, and the size of the set that it chooses."""


def scaled_heads(model: HookedModel, factors: Mapping[Head, float]) -> HookProbe:
    """Return a probe that multiplies the outputs z of query heads at every token."""
    hooks = _head_hooks(model, factors, lambda layer, z, factor: z * factor)
    return HookProbe(f"scale-heads:{_listed(factors)}", hooks, packs=True)


def stream_change(
    model: HookedModel, layers: Sequence[int], vector: Tensor, *, remove: bool = False
) -> HookProbe:
    """Return a probe that adds a vector to the residual stream, or removes its direction.

    It acts after each of the layers, at every token.
    """

    def hook_function(x: Tensor, hook: Any) -> Tensor:  # [batch, pos, d_model]
        v = vector.to(x)
        return x - (x @ v)[..., None] * v / v.dot(v) if remove else x + v

    what = "remove" if remove else "add"
    key = f"{what}-direction:{'+'.join(map(str, layers))},{hash_of(vector)}"
    hooks = [(hook_name("resid_post", layer), hook_function) for layer in layers]
    return HookProbe(key, hooks, packs=True)


@dataclass(frozen=True, slots=True, eq=False)
class Twice:
    """A probe that adds multiples of what heads put out in a first run, without the probe."""

    factors: Mapping[Head, float]

    @property
    def key(self) -> str:
        """The heads with their factors."""
        return f"add-heads-of-first-run:{_listed(self.factors)}"

    @property
    def spans(self) -> Sequence[str]:
        """None: it acts on every token."""
        return ()

    @property
    def packs(self) -> bool:
        """False: the first run has the same rows."""
        return False

    def hooks(self, model: HookedModel, layout: Layout) -> Sequence[NamedHook]:
        """Return a hook per layer, after a forward pass over the layout."""
        at = torch.zeros(1, dtype=torch.long, device=layout.tokens.device)
        first: dict[int, Tensor] = {}

        def keep(layer: int, z: Tensor, factor: Tensor) -> Tensor:
            first[layer] = z.clone()
            return z

        recorder = HookProbe("first run", _head_hooks(model, self.factors, keep))
        logits_at(model, layout, at, at, probes=[recorder])
        return _head_hooks(model, self.factors, lambda n, z, factor: z + first[n] * factor)


def _listed(factors: Mapping[Head, float]) -> str:
    return "+".join(f"{a}.{b}={f}" for (a, b), f in sorted(factors.items()))


def _head_hooks(
    model: HookedModel, factors: Mapping[Head, float], change: Callable[[int, Any, Any], Tensor]
) -> list[NamedHook]:
    """Return hooks that change z of chosen heads, given the layer, z and the factor of each."""

    def hook_of(layer: int, heads: list[int]) -> Any:
        scale = torch.tensor([factors[layer, head] for head in heads])[:, None]

        def hook_function(z: Tensor, hook: Any) -> Tensor:  # [batch, pos, head, d_head]
            z = z.clone()
            z[:, :, heads] = change(layer, z[:, :, heads], scale.to(z))
            return z

        return hook_function

    chosen = choose(model, heads=tuple(factors)).by_layer
    return [(hook_name("z", n), hook_of(n, list(heads))) for n, heads in chosen.items()]


class Learned:
    """What methods may learn from the tuning facts of a model; each part is computed once."""

    def __init__(self, model: HookedLanguageModel, pairs: Pairs, execution: Execution) -> None:
        """Take the model, the tuning pairs, and how runs are computed."""
        self.model = model
        self.pairs = pairs
        self.execution = execution

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self.model.cfg.n_layers)

    def layer(self, depth: float) -> int:
        """Return the layer at a depth between 0 (the first) and 1 (the last)."""
        return round(depth * (self.layers - 1))

    def heads(self, kind: HeadKind, count: int) -> tuple[Head, ...]:
        """Return heads, the strongest first; the number is cut to half of all heads.

        Args:
            kind: `carriers`: without them, exactly, the shift shrinks most (`probes.heads`);
                `writers`: they write most of the shift directly (`probes.logit_shift`);
                `keepers`: by attribution they work against the shift.
            count: How many.
        """
        sites = choose(self.model).pairs
        count = max(1, min(count, len(sites) // 2))
        if kind == "carriers":
            return self._search.heads[:count]
        table = self._search.attribution.mean(0) if kind == "keepers" else self._written
        sign = 1 if kind == "keepers" else -1
        return tuple(sorted(sites, key=lambda head: sign * table[head])[:count])

    def difference(self, layer: int) -> Float[Tensor, " d_model"]:
        """Return the mean residual stream after a layer at the last token, bare minus hijacked."""
        return self._differences[layer]

    def low_rank(self, rank: int) -> Replacement:
        """Return the change of W_V to its best approximation of a rank."""
        return values.low_rank(rank)

    def placebo(self, seed: int) -> Learned:
        """Return random heads, directions and subspaces in place of those found."""
        return _Random(self, seed)

    @cached_property
    def _search(self) -> Any:
        size = max(1, min(MOST_HEADS, len(choose(self.model).pairs) // 2))
        options: Any = {"size": size, "candidates": max(size, CANDIDATES)}
        return heads.search(self.model, self.pairs, **options, execution=self.execution, quiet=True)

    @cached_property
    def _written(self) -> Any:
        usable = self.pairs.without(
            "same first token" if pair.same_first_token else None for pair in self.pairs
        )
        return logit_shift.average(self.model, usable, quiet=True).by_head.mean(0)

    @cached_property
    def _differences(self) -> list[Tensor]:
        bare = mean_stream(self.model, [pair.bare.ids for pair in self.pairs])
        hijacked = mean_stream(self.model, [pair.hijacked.ids for pair in self.pairs])
        return list(bare - hijacked)


class _Random(Learned):
    """Random heads, directions and subspaces."""

    def __init__(self, true: Learned, seed: int) -> None:
        super().__init__(true.model, true.pairs, true.execution)
        self._true, self._seed = true, seed

    def heads(self, kind: HeadKind, count: int) -> tuple[Head, ...]:
        found = self._true.heads(kind, count)
        others = [head for head in choose(self.model).pairs if head not in found]
        # Keepers and carriers of one method must differ.
        seed = self._seed + ("carriers", "writers", "keepers").index(kind)
        return draw(found, others, count=1, seed=seed)[0]

    def difference(self, layer: int) -> Tensor:
        found = self._true.difference(layer)
        generator = torch.Generator().manual_seed(self._seed + layer)
        drawn = torch.randn(found.shape, generator=generator)
        return drawn * found.norm() / drawn.norm()

    def low_rank(self, rank: int) -> Replacement:
        """Return the projection of the outputs of W_V on a random subspace, with its norm."""
        name = f"random subspace of rank {rank}, seed {self._seed}"
        return values.matched(values.computed(partial(_projected, rank, self._seed), name=name))


def _projected(rank: int, seed: int, model: HookedModel, layer: int, head: int) -> Tensor:
    matrix = value_matrix(model, layer, head)
    of_site = (1_000_000 * seed + 1000 * layer + head) % 2**63
    generator = torch.Generator().manual_seed(of_site)
    drawn = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn)[0].to(matrix)
    return matrix @ basis @ basis.T


def mean_stream(
    model: HookedLanguageModel, prompts: Sequence[TokenIds]
) -> Float[Tensor, "layer d_model"]:
    """Return the mean residual stream after each layer at the last token of prompts."""
    layers, total = range(int(model.cfg.n_layers)), {}

    def add(layer: int) -> Any:
        def keep(values: Tensor) -> None:
            total[layer] = total.get(layer, 0) + values.detach().double().sum(0).cpu()

        return keep

    for batch in batches(model, prompts):
        rows = torch.arange(len(batch.members), device=batch.symbols.device)
        last = batch.lengths - 1
        hooks = [reading("resid_post", n, rows, last, add(n)) for n in layers]
        layout = Layout.of_symbols(batch.symbols, ())
        logits_at(model, layout, rows[:1], last[:1], probes=[HookProbe("streams", hooks)])
    return torch.stack([total[layer] for layer in layers]).float().clone() / len(prompts)
