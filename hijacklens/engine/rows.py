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

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hijacklens.engine.packs import Pack
from hijacklens.engine.trie import Trie
from hijacklens.prompts.prefixes import WIDTH, Prefix


@dataclass(frozen=True, slots=True)
class Branch:
    """A pack in tokens."""

    symbols: Int[np.ndarray, " pos"]
    positions: Sequence[int]
    """The depth of each token in the tree, from 0."""
    ends: Sequence[int]
    """For each token, the index of the first token outside its subtree."""
    path: Prefix
    """The symbols of the past."""
    reads: Sequence[tuple[int, int]]
    """Index of a token, and the id of the prefix that ends with it."""
    leaves: Sequence[Prefix]


Row: TypeAlias = Sequence[Branch]
"""Branches one after the other."""


def write_out(trie: Trie, pack: Pack) -> Branch:
    """Return the tokens of a pack."""
    past = pack.past
    leaves = trie.leaves[pack.first : pack.stop]
    overlaps = [past, *trie.shared[pack.first + 1 : pack.stop].tolist()]
    lengths = [len(leaf) // WIDTH for leaf in leaves]
    reads_of_leaves = trie.first_read[pack.first : pack.stop + 1].tolist()
    all_reads = trie.reads[reads_of_leaves[0] : reads_of_leaves[-1]].tolist()
    positions: list[int] = []
    reads: list[tuple[int, int]] = []
    indices: list[int] = []  # of the present leaf's tokens, by depth
    starts: list[int] = []
    for i, (shared, length) in enumerate(zip(overlaps, lengths, strict=True)):
        start = len(positions)
        starts.append(start)
        indices[shared - past :] = range(start, start + length - shared)
        positions.extend(range(shared, length))
        first, stop = (k - reads_of_leaves[0] for k in reads_of_leaves[i : i + 2])
        reads += [(indices[n - 1 - past], read) for n, read in all_reads[first:stop] if n > past]
    ends = [0] * len(positions)
    closing = [len(positions)] * (max(lengths) - past)  # end of the subtree at each depth
    for shared, length, start in zip(overlaps[::-1], lengths[::-1], starts[::-1], strict=True):
        ends[start : start + length - shared] = closing[shared - past : length - past]
        closing[shared - past :] = [start] * (len(closing) - shared + past)
    new = [leaf[WIDTH * shared :] for leaf, shared in zip(leaves, overlaps, strict=True)]
    symbols = np.frombuffer(b"".join(new), ">i8").astype(np.int64)
    return Branch(symbols, positions, ends, leaves[0][: WIDTH * past], reads, leaves)


def apart(branch: Branch) -> Iterator[Branch]:
    """Split a branch into its leaves, each a branch with the same past."""
    past = len(branch.path) // WIDTH
    unread = branch.reads
    following = [*branch.positions[1:], past]
    pairs = zip(branch.positions, following, strict=True)
    last_of_leaves = [i for i, (depth, below) in enumerate(pairs) if below <= depth]
    for leaf, last in zip(branch.leaves, last_of_leaves, strict=True):
        reads = [(i, read) for i, read in unread if i <= last < branch.ends[i]]
        unread = [read for read in unread if read not in reads]
        symbols = np.frombuffer(leaf, ">i8").astype(np.int64)[past:]
        width = len(symbols)
        yield Branch(
            symbols=symbols,
            positions=range(past, past + width),
            ends=[width] * width,
            path=branch.path,
            reads=[(branch.positions[i] - past, read) for i, read in reads],
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
        """Return the tensors of rows, which are sent to the device in three copies."""
        paths = [[np.frombuffer(branch.path, ">i8") for branch in row] for row in rows]
        width = max(sum(len(branch.symbols) for branch in row) for row in rows)
        keys = max(sum(map(len, of_row)) for of_row in paths)
        query = np.zeros((6, len(rows), width), dtype=np.int64)
        key = np.zeros((2, len(rows), keys), dtype=np.int64)
        reads: list[tuple[int, int]] = []
        for i, row in enumerate(rows):
            start = past = 0
            for branch, path in zip(row, paths[i], strict=True):
                own = slice(start, start + len(branch.symbols))
                cached = slice(past, past + len(path))
                query[0, i, own] = branch.symbols
                query[1, i, own] = branch.positions
                query[2, i, own] = branch.ends
                query[2, i, own] += start
                query[3, i, own] = past
                query[4, i, own] = cached.stop
                query[5, i, own] = 1
                key[0, i, cached] = path
                key[1, i, cached] = range(len(path))
                reads.extend((i, start + index) for index, _ in branch.reads)
                start, past = own.stop, cached.stop
        symbols, positions, ends, past_from, past_to, real = to_device(query, device)
        path, path_positions = to_device(key, device)
        indices = to_device(np.array(reads, dtype=np.int64).reshape(-1, 2), device)
        return cls(
            symbols, positions, ends, path, path_positions, past_from, past_to, real.bool(), indices
        )

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


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy numbers to a device; the host does not wait for a copy to a GPU."""
    tensor = torch.from_numpy(numbers)
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
