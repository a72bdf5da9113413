"""Rows: packs written out in tokens, and what a forward pass over a batch of them is given.

A pack is written out depth first, so what stands under a token is the stretch behind it, and token
`q` sees token `k` exactly if `k <= q < end[k]`:

    token     The  Eiffel  Tower  is  The  Louvre  is
    position   6     7       8     9    6     7     8     its depth in the tree
    end        4     4       4     4    7     7     7     the first token not under it

Tokens that come from a cache (the past) stand before all of the row, and a pack sees those of its
own path. A row holds one pack, and in its padding there may be room for others. Rows of a batch are
padded on the right; nothing sees padding but itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hijacklens.engine.packs import Pack
from hijacklens.engine.trie import Trie
from hijacklens.prompts.tokens import TokenIds


@dataclass(frozen=True, slots=True)
class Branch:
    """A pack in tokens."""

    symbols: Sequence[int]
    positions: Sequence[int]
    """The depth of each token in the tree, from 0."""
    ends: Sequence[int]
    """For each token the index of the first token that is not under it."""
    path: TokenIds
    """The symbols of the past."""
    reads: Sequence[tuple[int, TokenIds]]
    """Index of a token, and the prefix that ends with it."""
    leaves: Sequence[TokenIds]


Row: TypeAlias = Sequence[Branch]
"""Branches that stand one behind the other."""


def write_out(trie: Trie, pack: Pack) -> Branch:
    """The tokens of a pack."""
    past = pack.past
    symbols: list[int] = []
    positions: list[int] = []
    reads: list[tuple[int, TokenIds]] = []
    at: list[int] = []  # where each depth of the present leaf stands
    starts: list[int] = []
    for i in range(pack.first, pack.stop):
        leaf = trie.leaves[i]
        kept = past if i == pack.first else trie.shared[i]
        starts.append(len(symbols))
        at[kept - past :] = range(len(symbols), len(symbols) + len(leaf) - kept)
        symbols.extend(leaf[kept:])
        positions.extend(range(kept, len(leaf)))
        reads.extend(
            (at[len(prefix) - 1 - past], prefix) for prefix in trie.reads[i] if len(prefix) > past
        )
    ends = [0] * len(symbols)
    longest = max(map(len, trie.leaves[pack.first : pack.stop]))
    closing = [len(symbols)] * (longest - past)  # where the subtree at each depth ends
    for i in range(pack.stop - 1, pack.first - 1, -1):
        kept = 0 if i == pack.first else trie.shared[i] - past
        start, width = starts[i - pack.first], len(trie.leaves[i]) - past
        ends[start : start + width - kept] = closing[kept:width]
        closing[kept:] = [start] * (len(closing) - kept)
    return Branch(
        symbols,
        positions,
        ends,
        trie.leaves[pack.first][:past],
        reads,
        trie.leaves[pack.first : pack.stop],
    )


def apart(branch: Branch) -> Iterator[Branch]:
    """The leaves of a branch, each a branch by itself with the same past."""
    past = len(branch.path)
    left = [prefix for _, prefix in branch.reads]
    for leaf in branch.leaves:
        here = [prefix for prefix in left if leaf[: len(prefix)] == prefix]
        left = [prefix for prefix in left if leaf[: len(prefix)] != prefix]
        width = len(leaf) - past
        yield Branch(
            symbols=leaf[past:],
            positions=range(past, len(leaf)),
            ends=[width] * width,
            path=branch.path,
            reads=[(len(prefix) - 1 - past, prefix) for prefix in here],
            leaves=[leaf],
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as tensors, padded on the right with zeros."""

    symbols: Int[Tensor, "batch query"]
    positions: Int[Tensor, "batch query"]
    ends: Int[Tensor, "batch query"]
    path: Int[Tensor, "batch past"]
    """Symbols of the pasts of each row's branches, one behind the other."""
    path_positions: Int[Tensor, "batch past"]
    past_from: Int[Tensor, "batch query"]
    """The first key of the past that a token sees."""
    past_to: Int[Tensor, "batch query"]
    """The first that it does not see again."""
    real: Bool[Tensor, "batch query"]
    """Which tokens are no padding."""
    reads: Int[Tensor, "read 2"]
    """Row and position of each read, in the order of rows, branches and their reads."""

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
        """The tensors of rows."""
        names = ("symbols", "positions", "ends", "path", "path_positions", "past_from", "past_to")
        held: dict[str, list[list[int]]] = {name: [[] for _ in rows] for name in names}
        reads: list[tuple[int, int]] = []
        for i, row in enumerate(rows):
            for branch in row:
                start, past = len(held["symbols"][i]), len(held["path"][i])
                width, seen = len(branch.symbols), past + len(branch.path)
                held["symbols"][i].extend(branch.symbols)
                held["positions"][i].extend(branch.positions)
                held["ends"][i].extend([end + start for end in branch.ends])
                held["path"][i].extend(branch.path)
                held["path_positions"][i].extend(range(len(branch.path)))
                held["past_from"][i].extend([past] * width)
                held["past_to"][i].extend([seen] * width)
                reads.extend((i, start + place) for place, _ in branch.reads)
        lengths = torch.tensor([len(values) for values in held["symbols"]])
        whole = {name: _padded(values).to(device) for name, values in held.items()}
        real = torch.arange(whole["symbols"].shape[1]) < lengths[:, None]
        places = torch.tensor(reads, dtype=torch.long).reshape(-1, 2)
        return cls(**whole, real=real.to(device), reads=places.to(device))

    def visible(self, window: int | None = None) -> Bool[Tensor, "batch 1 query key"]:
        """Which keys each query sees, the past first.

        Args:
            window: Of a sliding-window layer: how many positions, its own included, a token sees.
        """
        count, width = self.symbols.shape
        past = torch.arange(self.path.shape[1], device=self.symbols.device)
        here = torch.arange(width, device=self.symbols.device)
        # Padding has no subtree, but sees itself, so that no query sees nothing.
        itself = here[:, None] == here
        below = (here[:, None] >= here) & (here[:, None] < self.ends[:, None, :]) | itself
        before = (past >= self.past_from[:, :, None]) & (past < self.past_to[:, :, None])
        if window is not None:
            before &= self.positions[:, :, None] - self.path_positions[:, None, :] < window
            below &= self.positions[:, :, None] - self.positions[:, None, :] < window
        return torch.cat([before, below.expand(count, width, width)], dim=-1)[:, None]


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row column"]:
    width = max(map(len, rows))
    flat = chain.from_iterable((*row, *((0,) * (width - len(row)))) for row in rows)
    return torch.tensor(list(flat), dtype=torch.long).reshape(len(rows), width)


def masks(
    batch: Batch, windows: Mapping[str, int | None], dtype: torch.dtype
) -> dict[str, Tensor] | Tensor:
    """Additive attention masks, one for each kind of layer, or one for all under the name ""."""
    made: dict[str, Any] = {}
    for kind, window in windows.items():
        seen = batch.visible(window)
        hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        made[kind] = hidden.masked_fill_(~seen, torch.finfo(dtype).min)
    return made.get("", made)
