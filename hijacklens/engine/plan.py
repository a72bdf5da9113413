"""A plan: which prefixes run together in which forward passes, and what that costs.

There are three ways to read behind a set of prefixes:

    plain     every leaf of their trie is a row of its own
    packed    neighbouring leaves share a row under a tree attention mask
    cached    as packed, and what packs share is computed before them: a trunk whose keys and
              values they take from a cache

A plan falls into units that need nothing of each other. No model is needed to make one.

>>> prefixes = [(*[1, 2, 3, 4] * dose, query, 6) for dose in range(4) for query in (5, 7)]
>>> plan = make_plan(prefixes, Costs.usual(), sharing="packed")
>>> plan.naive_tokens, plan.trie_tokens, plan.forward_tokens
(64, 28, 28)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from hijacklens.engine.packs import MOST_TOKENS, Costs, Cuts, Pack, cut, separate, trunk
from hijacklens.engine.trie import Trie, common
from hijacklens.errors import unknown
from hijacklens.prompts.tokens import TokenIds

Sharing: TypeAlias = Literal["auto", "plain", "packed", "cached"]
"""How a run shares what its prompts have in common; `auto` takes the cheapest."""
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
MARGIN = 0.99
"""A way has to cost less than this share of a simpler one to be taken."""
TRUNK_TOKENS = 4_096
"""Tokens whose keys and values are kept at a time, by default."""
BATCH_TOKENS = {"cpu": 1_024, "cuda": 32_768}
"""Usual size of a batch, in tokens with padding, by type of device."""


@dataclass(frozen=True, slots=True)
class Level:
    """Packs that can run in any order, once those of the level before have run."""

    trie: Trie
    packs: Sequence[Pack]

    @property
    def reads(self) -> Iterator[TokenIds]:
        """The prefixes that are read at this level."""
        for pack in self.packs:
            for on_the_way in self.trie.reads[pack.first : pack.stop]:
                for prefix in on_the_way:
                    if len(prefix) > pack.past:
                        yield prefix


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a plan that needs nothing of the others."""

    levels: Sequence[Level]
    """Trunk first; the leaves come last."""

    @property
    def forward_tokens(self) -> int:
        """Tokens that the unit computes, padding left out."""
        return sum(pack.own for level in self.levels for pack in level.packs)

    @property
    def prefixes(self) -> list[TokenIds]:
        """The prefixes that are read in the unit."""
        return [prefix for level in self.levels for prefix in level.reads]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, in which way, and why that way."""

    sharing: Sharing
    why: str
    units: Sequence[Unit]
    cost: float
    """In tokens (`hijacklens.engine.packs`)."""
    naive_tokens: int
    """Tokens of all leaves: every prefix by itself, those read on the way to others left out."""
    trie_tokens: int
    """Distinct nodes of the trie: the fewest tokens there can be."""

    @property
    def forward_tokens(self) -> int:
        """Tokens that the plan computes, padding left out."""
        return sum(unit.forward_tokens for unit in self.units)


def make_plan(
    prefixes: Iterable[TokenIds],
    costs: Costs,
    *,
    sharing: Sharing = "auto",
    why: str = "",
    batch_tokens: int = BATCH_TOKENS["cpu"],
    pack_tokens: int = MOST_TOKENS,
    pack_reads: int = 0,
    trunk_tokens: int = TRUNK_TOKENS,
) -> Plan:
    """Plan how to read behind prefixes.

    Args:
        prefixes: Symbols (`hijacklens.prompts.layout`), none empty.
        costs: What rows cost on the machine and model it is for.
        sharing: How prefixes share tokens; by default the cheapest.
        why: Why that way is taken, where it is not for its costs.
        batch_tokens: Size of a batch in tokens.
        pack_tokens: Tokens of a pack of several leaves, at most; no more than fit into a batch.
        pack_reads: Reads of a pack of several leaves, at most; 0 for any number.
        trunk_tokens: Tokens of a trunk at most, more only for a single path that is longer.

    Raises:
        InputError: An unknown sharing.

    Note:
        2 s for each way for the 131,120 distinct prompts of the whole CounterFact at doses 0 to 5,
        on one core.
    """
    if sharing not in SHARINGS:
        raise unknown("sharing", str(sharing), SHARINGS)
    trie = Trie.of(prefixes)
    most = min(pack_tokens, batch_tokens)

    def whole(cuts: Cuts) -> tuple[list[Unit], float]:
        passes = math.ceil(cuts.own / batch_tokens)
        return [Unit([Level(trie, cuts.packs)])], cuts.cost + passes * costs.forward_pass

    def cached() -> tuple[list[Unit], float]:
        cuts = cut(trie, costs, cached=True, most_tokens=most, most_reads=pack_reads)
        units, cost = [], 0.0
        for packs in _parts(trie, cuts.packs, trunk_tokens):
            levels, spent = _levels(Level(trie, packs), costs, batch_tokens, most, pack_reads)
            units.append(Unit(levels))
            cost += spent
        return units, cost

    makers: dict[Sharing, Callable[[], tuple[list[Unit], float]]] = {
        "plain": lambda: whole(separate(trie, costs)),
        "packed": lambda: whole(
            cut(trie, costs, cached=False, most_tokens=most, most_reads=pack_reads)
        ),
        "cached": cached,
    }
    found: dict[Sharing, tuple[list[Unit], float]] = {
        name: make() for name, make in makers.items() if sharing in ("auto", name)
    }
    chosen: Sharing = next(iter(found))
    for name, (_, cost) in found.items():  # simpler ones first
        if cost < MARGIN * found[chosen][1]:
            chosen = name
    units, cost = found[chosen]
    return Plan(
        sharing=chosen,
        why=why or ("it was requested" if sharing == chosen else "it costs least"),
        units=units,
        cost=cost,
        naive_tokens=trie.tokens,
        trie_tokens=trie.nodes,
    )


def separate_plan(prefixes: Iterable[TokenIds], *, why: str) -> Plan:
    """A plan in which every prefix is a row by itself, even if it begins another one."""
    listed = sorted(set(prefixes))
    # No trie of its own: here a leaf may begin the next one, and nothing is shared.
    rows = Trie(listed, [0] * len(listed), [(prefix,) for prefix in listed])
    packs = [Pack(i, i + 1, 0, len(prefix)) for i, prefix in enumerate(listed)]
    return Plan(
        sharing="plain",
        why=why,
        units=[Unit([Level(rows, packs)])],
        cost=float(rows.tokens),
        naive_tokens=rows.tokens,
        trie_tokens=Trie.of(listed).nodes,
    )


def _parts(trie: Trie, packs: Sequence[Pack], trunk_tokens: int) -> Iterator[Sequence[Pack]]:
    """Cut a row of packs where their trunk gets too long, at the places that share least."""
    grown: list[tuple[int, int]] = []  # of each pack: new tokens of the trunk, and shared ones
    path: TokenIds = ()
    for pack in packs:
        own = trie.leaves[pack.first][: pack.past]
        same = common(path, own)
        grown.append((len(own) - same, same))
        path = own
    start, held = 0, 0
    for i in range(len(packs)):
        held += grown[i][0]
        if held > trunk_tokens and i > start:
            middle = (start + i) // 2
            stop = min(range(middle + 1, i + 1), key=lambda j: (grown[j][1], -j))
            yield packs[start:stop]
            start = stop
            held = grown[start][1] + sum(new for new, _ in grown[start : i + 1])
    if packs[start:]:
        yield packs[start:]


def _levels(
    top: Level, costs: Costs, batch_tokens: int, most: int, pack_reads: int
) -> tuple[list[Level], float]:
    """A level with those that it needs before it, trunk first, and what all cost."""
    levels, cost = [top], 0.0
    while True:
        level = levels[0]
        own = sum(pack.own for pack in level.packs)
        rows = sum(costs.rows(pack.own, pack.past) for pack in level.packs)
        cost += rows + math.ceil(own / batch_tokens) * costs.forward_pass
        below = trunk(level.trie, level.packs)
        if not below.leaves:
            return levels, cost
        again, deeper = (
            cut(below, costs, cached=deep, most_tokens=most, most_reads=pack_reads)
            for deep in (False, True)
        )
        # A trunk under the trunk costs a forward pass more.
        best = deeper if deeper.cost + costs.forward_pass < again.cost else again
        levels.insert(0, Level(below, best.packs))
