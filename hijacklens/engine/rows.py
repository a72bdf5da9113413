"""Rows: packs written out in tokens, and batches of them as tensors.

A pack is written out depth first, so the subtree of a token is the stretch that follows it, and
token `q` sees token `k` exactly if `k <= q < end[k]`:

    token     The  Eiffel  Tower  is  The  Louvre  is
    position   6     7       8     9    6     7     8     its depth in the tree
    end        4     4       4     4    7     7     7     the first token outside its subtree

Tokens from a cache (the past) come before all tokens of the row, and a pack sees those of its own
path. A row holds one pack, and further packs if they fit into its padding. Rows of a batch are
padded on the right; a padding token is seen by itself only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    """For each token, the index of the first token outside its subtree."""
    path: TokenIds
    """The symbols of the past."""
    reads: Sequence[tuple[int, TokenIds]]
    """Index of a token, and the prefix that ends with it."""
    leaves: Sequence[TokenIds]


Row: TypeAlias = Sequence[Branch]
"""Branches one after the other."""


def write_out(trie: Trie, pack: Pack) -> Branch:
    """Return the tokens of a pack."""
    past = pack.past
    leaves = trie.leaves[pack.first : pack.stop]
    symbols: list[int] = []
    positions: list[int] = []
    reads: list[tuple[int, TokenIds]] = []
    indices: list[int] = []  # of the present leaf's tokens, by depth
    starts: list[int] = []
    for i, leaf in enumerate(leaves, start=pack.first):
        shared = past if i == pack.first else trie.shared[i]
        starts.append(len(symbols))
        indices[shared - past :] = range(len(symbols), len(symbols) + len(leaf) - shared)
        symbols.extend(leaf[shared:])
        positions.extend(range(shared, len(leaf)))
        reads.extend(
            (indices[len(prefix) - 1 - past], prefix)
            for prefix in trie.reads[i]
            if len(prefix) > past
        )
    ends = [0] * len(symbols)
    closing = [len(symbols)] * (max(map(len, leaves)) - past)  # end of the subtree at each depth
    for i in range(pack.stop - 1, pack.first - 1, -1):
        shared = 0 if i == pack.first else trie.shared[i] - past
        start, width = starts[i - pack.first], len(trie.leaves[i]) - past
        ends[start : start + width - shared] = closing[shared:width]
        closing[shared:] = [start] * (len(closing) - shared)
    return Branch(symbols, positions, ends, leaves[0][:past], reads, leaves)


def apart(branch: Branch) -> Iterator[Branch]:
    """Split a branch into its leaves, each a branch with the same past."""
    past = len(branch.path)
    unread = [prefix for _, prefix in branch.reads]
    for leaf in branch.leaves:
        reads = [prefix for prefix in unread if leaf[: len(prefix)] == prefix]
        unread = [prefix for prefix in unread if leaf[: len(prefix)] != prefix]
        width = len(leaf) - past
        yield Branch(
            symbols=leaf[past:],
            positions=range(past, len(leaf)),
            ends=[width] * width,
            path=branch.path,
            reads=[(len(prefix) - 1 - past, prefix) for prefix in reads],
            leaves=[leaf],
        )


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A batch of rows as tensors, padded on the right with zeros."""

    symbols: Int[Tensor, "batch query"]
    positions: Int[Tensor, "batch query"]
    ends: Int[Tensor, "batch query"]
    path: Int[Tensor, "batch past"]
    """Symbols of the pasts of each row's branches, one after the other."""
    path_positions: Int[Tensor, "batch past"]
    past_from: Int[Tensor, "batch query"]
    """The first key of the past that a token sees."""
    past_to: Int[Tensor, "batch query"]
    """The key after the last one of the past that it sees."""
    real: Bool[Tensor, "batch query"]
    """Which tokens are not padding."""
    reads: Int[Tensor, "read 2"]
    """Row and index of each read, in the order of rows, branches and their reads."""

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> PackedRows:
        """Return the tensors of rows."""
        names = ("symbols", "positions", "ends", "path", "path_positions", "past_from", "past_to")
        values: dict[str, list[list[int]]] = {name: [[] for _ in rows] for name in names}
        reads: list[tuple[int, int]] = []
        for i, row in enumerate(rows):
            for branch in row:
                start, past = len(values["symbols"][i]), len(values["path"][i])
                width, past_end = len(branch.symbols), past + len(branch.path)
                values["symbols"][i].extend(branch.symbols)
                values["positions"][i].extend(branch.positions)
                values["ends"][i].extend([end + start for end in branch.ends])
                values["path"][i].extend(branch.path)
                values["path_positions"][i].extend(range(len(branch.path)))
                values["past_from"][i].extend([past] * width)
                values["past_to"][i].extend([past_end] * width)
                reads.extend((i, start + index) for index, _ in branch.reads)
        lengths = torch.tensor([len(symbols) for symbols in values["symbols"]])
        tensors = {name: padded(lists).to(device) for name, lists in values.items()}
        real = torch.arange(tensors["symbols"].shape[1]) < lengths[:, None]
        indices = torch.tensor(reads, dtype=torch.long).reshape(-1, 2)
        return cls(**tensors, real=real.to(device), reads=indices.to(device))

    def visible(self, window: int | None = None) -> Bool[Tensor, "batch 1 query key"]:
        """Return which keys each query sees, the past first.

        Args:
            window: For a sliding-window layer, how many positions a token sees, itself included.
        """
        count, width = self.symbols.shape
        past = torch.arange(self.path.shape[1], device=self.symbols.device)
        row = torch.arange(width, device=self.symbols.device)
        # Padding has no subtree but sees itself, since a softmax over nothing is undefined.
        itself = row[:, None] == row
        below = (row[:, None] >= row) & (row[:, None] < self.ends[:, None, :]) | itself
        before = (past >= self.past_from[:, :, None]) & (past < self.past_to[:, :, None])
        if window is not None:
            before &= self.positions[:, :, None] - self.path_positions[:, None, :] < window
            below &= self.positions[:, :, None] - self.positions[:, None, :] < window
        return torch.cat([before, below.expand(count, width, width)], dim=-1)[:, None]

    def masks(
        self, windows: Mapping[str, int | None], dtype: torch.dtype
    ) -> dict[str, Tensor] | Tensor:
        """Return additive attention masks by kind of layer, or the one mask of the kind ""."""
        masks = {}
        for kind, window in windows.items():
            seen = self.visible(window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(~seen, torch.finfo(dtype).min)
        return masks.get("", masks)


def padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row column"]:
    """Return rows of whole numbers as a tensor, padded on the right with zeros."""
    return pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
