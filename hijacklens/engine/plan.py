"""A plan: which prefixes run together in which forward passes, and what that costs.

Prefixes can share the tokens that they have in common in three ways:

    plain     no sharing: every leaf of their trie has a separate row
    packed    neighbouring leaves share a row under a tree attention mask
    cached    as packed, and what packs share is computed before them: a trunk whose keys and
              values they take from a cache

A plan consists of units that do not depend on each other. No model is needed to make one.

>>> from hijacklens.prompts.prefixes import prefix_of
>>> prefixes = [(*[1, 2, 3, 4] * dose, query, 6) for dose in range(4) for query in (5, 7)]
>>> plan = make_plan(Trie.of(map(prefix_of, prefixes)), Costs.usual(), sharing="packed")
>>> plan.naive_tokens, plan.trie_tokens, plan.forward_tokens
(64, 28, 28)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from hijacklens.engine.packs import Costs, Limits, Pack, cut, separate, trunk
from hijacklens.engine.trie import Trie
from hijacklens.errors import choice
from hijacklens.garbage import no_collection
from hijacklens.prompts.prefixes import Prefix

Sharing: TypeAlias = Literal["auto", "plain", "packed", "cached"]
"""How prompts share computed prefixes; `auto` takes the cheapest way."""
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)


@dataclass(frozen=True, slots=True)
class Level:
    """Packs that can run in any order."""

    trie: Trie
    packs: Sequence[Pack]

    @property
    def forward_tokens(self) -> int:
        """Tokens that the level computes, without padding."""
        return sum(pack.computed for pack in self.packs)


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a plan that does not depend on the others."""

    trunk: Level | None
    """Runs first; the leaves take its keys and values as their past."""
    leaves: Level

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels in the order in which they run."""
        return (self.leaves,) if self.trunk is None else (self.trunk, self.leaves)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, with which sharing, and why."""

    sharing: Sharing
    why: str
    units: Sequence[Unit]
    naive_tokens: int
    """Tokens of all leaves, each computed by itself."""
    trie_tokens: int
    """Distinct nodes of the trie: the fewest tokens that any plan can compute."""

    @property
    def levels(self) -> list[Level]:
        """The levels of all units, in the order in which they run."""
        return [level for unit in self.units for level in unit.levels]

    @property
    def forward_tokens(self) -> int:
        """Tokens that the plan computes, without padding."""
        return sum(level.forward_tokens for level in self.levels)

    def cost(self, costs: Costs, batch_tokens: int) -> float:
        """Return the cost of the plan, in tokens."""
        passes = sum(math.ceil(level.forward_tokens / batch_tokens) for level in self.levels)
        packs = [pack for level in self.levels for pack in level.packs]
        sizes = np.array([(pack.computed, pack.past) for pack in packs]).reshape(-1, 2)
        return costs.rows(*sizes.T).sum() + passes * costs.forward_pass


@no_collection()
def make_plan(
    trie: Trie,
    costs: Costs,
    limits: Limits = Limits(),
    *,
    sharing: Sharing = "auto",
    why: str = "",
) -> Plan:
    """Plan how to read after prefixes.

    Args:
        trie: The prefixes.
        costs: What rows cost with the model on its machine.
        limits: Sizes of batches, packs and trunks.
        sharing: How prefixes share tokens; by default the cheapest.
        why: The reason for the sharing, if it is not the cost.

    Raises:
        InputError: An unknown sharing.

    Note:
        Costs the search for cuts for each sharing that is compared.
    """
    choice("sharing", sharing, SHARINGS)
    makers: dict[Sharing, Callable[[], list[Unit]]] = {  # simpler ones first
        "plain": lambda: [Unit(None, Level(trie, separate(trie)))],
        "packed": lambda: [Unit(None, Level(trie, cut(trie, costs, limits, cached=False)))],
        "cached": lambda: list(_cached_units(trie, costs, limits)),
    }
    why = why or ("it costs least" if sharing == "auto" else "it was requested")
    plans = [
        Plan(name, why, make(), naive_tokens=trie.tokens, trie_tokens=trie.nodes)
        for name, make in makers.items()
        if sharing in ("auto", name)
    ]
    cheapest, size = plans[0], limits.batch_tokens
    for plan in plans[1:]:
        if costs.simpler * plan.cost(costs, size) < cheapest.cost(costs, size):
            cheapest = plan
    return cheapest


def separate_plan(prefixes: Iterable[Prefix], *, why: str) -> Plan:
    """Plan a separate row for every prefix, even if another prefix continues it."""
    trie = Trie.apart(prefixes)
    return Plan(
        sharing="plain",
        why=why,
        units=[Unit(None, Level(trie, separate(trie)))],
        naive_tokens=trie.tokens,
        trie_tokens=Trie.of(trie.leaves).nodes,
    )


def _cached_units(trie: Trie, costs: Costs, limits: Limits) -> Iterator[Unit]:
    """Cut a trie into packs with a trunk, which has no trunk: that saves 0.04 per cent more."""
    for packs in _parts(trie, cut(trie, costs, limits, cached=True), limits.trunk_tokens):
        below = trunk(trie, packs)
        trunk_level = Level(below, cut(below, costs, limits, cached=False))
        yield Unit(trunk_level if below.leaves else None, Level(trie, packs))


def _parts(trie: Trie, packs: Sequence[Pack], trunk_tokens: int) -> Iterator[Sequence[Pack]]:
    """Split a sequence of packs so that no trunk gets too long, at the cuts that share least."""
    if not packs:
        return
    past = np.array([pack.past for pack in packs])
    # Tokens of the trunk that each pack shares with the pack before, and that it adds.
    first = np.array([pack.first for pack in packs])
    overlap = (
        np.minimum.reduceat(trie.shared[1 : first[-1] + 1], first[:-1]) if packs[1:] else past[1:]
    )
    paths = np.minimum(np.minimum(past[1:], past[:-1]), overlap)
    shared = [0, *paths.tolist()]
    new = (past - shared).tolist()
    start, tokens = 0, 0
    for i in range(len(packs)):
        tokens += new[i]
        if tokens > trunk_tokens and i > start:
            middle = (start + i) // 2
            stop = min(range(middle + 1, i + 1), key=lambda j: (shared[j], -j))
            yield packs[start:stop]
            start = stop
            tokens = shared[start] + sum(new[start : i + 1])
    yield packs[start:]
