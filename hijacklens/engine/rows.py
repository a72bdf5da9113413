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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hijacklens.engine.packs import Pack
from hijacklens.engine.ragged import ranges, starts
from hijacklens.engine.trie import Trie
from hijacklens.prompts.prefixes import WIDTH

Row: TypeAlias = Sequence[Pack]
"""Packs one after the other."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A batch of rows as tensors, padded on the right with zeros."""

    trie: Trie
    rows: Sequence[Row]
    """Packs of the trie."""
    symbols: Int[Tensor, "batch query"]
    positions: Int[Tensor, "batch query"]
    """The depth of each token in the tree, from 0."""
    ends: Int[Tensor, "batch query"]
    """For each token, the index of the first token outside its subtree."""
    path: Int[Tensor, "batch past"]
    """Symbols of the pasts of each row's packs, one after the other."""
    path_positions: Int[Tensor, "batch past"]
    past_from: Int[Tensor, "batch query"]
    """The first key of the past that a token sees."""
    past_to: Int[Tensor, "batch query"]
    """The key after the last one of the past that it sees."""
    real: Bool[Tensor, "batch query"]
    """Which tokens are not padding."""
    reads: Int[Tensor, "read 2"]
    """Row and index of each read, in the order of rows, packs and leaves."""
    ids: Int[np.ndarray, " read"]
    """The prefix that each read is of."""

    @classmethod
    def of(cls, trie: Trie, rows: Sequence[Row], device: torch.device) -> PackedRows:
        """Write packs of a trie out, and send them to the device in three copies."""
        packs = np.array([(pack.first, pack.stop, pack.past) for row in rows for pack in row])
        first, stop, past = packs.T
        # Leaves of all packs, one after the other. Each adds tokens to those that it shares with
        # the leaf before, or with the past.
        head = starts(stop - first)
        leaf = ranges(first, stop - first)
        leaves = [trie.leaves[i] for i in leaf.tolist()]
        lengths = np.fromiter(map(len, leaves), np.int64, len(leaves)) // WIDTH
        known = trie.shared[leaf]
        known[head] = past
        added = lengths - known
        start = starts(added)
        symbols = np.frombuffer(b"".join(leaves), ">i8")[ranges(starts(lengths) + known, added)]
        position = ranges(known, added)
        end = _ends(position, known, added, head)

        # Packs in their rows.
        in_row = np.array([len(row) for row in rows])
        row_of_pack = np.repeat(np.arange(len(rows)), in_row)
        size = np.add.reduceat(added, head)
        column, past_from = (_within(sizes, in_row) for sizes in (size, past))
        row, index = np.repeat(row_of_pack, size), ranges(column, size)
        width, keys = (np.add.reduceat(sizes, starts(in_row)).max() for sizes in (size, past))
        end += np.repeat(column - start[head], size)
        seen = np.repeat([past_from, past_from + past], size, axis=1)
        query = np.zeros((6, len(rows), width), dtype=np.int64)
        query[:, row, index] = [symbols, position, end, *seen, np.ones_like(end)]
        tokens, positions, ends, first_seen, stop_seen, real = to_device(query, device)

        paths = [pack.path(trie) for row in rows for pack in row]
        key = np.zeros((2, len(rows), keys), dtype=np.int64)
        key[:, np.repeat(row_of_pack, past), ranges(past_from, past)] = (
            np.frombuffer(b"".join(paths), ">i8"),
            ranges(0 * past, past),
        )
        path, path_positions = to_device(key, device)

        # A read is at the last token of its prefix; prefixes that end in the past were read there.
        n_reads = trie.first_read[leaf + 1] - trie.first_read[leaf]
        length, ids = trie.reads[ranges(trie.first_read[leaf], n_reads)].T
        new = length - np.repeat(known, n_reads)
        token = (np.repeat(start, n_reads) + new - 1)[new > 0]
        return cls(
            trie=trie,
            rows=rows,
            symbols=tokens,
            positions=positions,
            ends=ends,
            path=path,
            path_positions=path_positions,
            past_from=first_seen,
            past_to=stop_seen,
            real=real.bool(),
            reads=to_device(np.stack([row[token], index[token]], axis=1), device),
            ids=ids[new > 0],
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


def _ends(
    position: Int[np.ndarray, " token"],
    known: Int[np.ndarray, " leaf"],
    added: Int[np.ndarray, " leaf"],
    head: Int[np.ndarray, " pack"],
) -> Int[np.ndarray, " token"]:
    """Return the index of the first token outside the subtree of each token.

    That token begins a leaf: the next one that shares fewer symbols than lie above the token, or
    the first one of the next pack.
    """
    shares = np.append(known, -1)
    shares[head] = -1
    begins = np.append(starts(added), added.sum())
    ends = np.empty_like(position)
    open_ = np.arange(len(position))
    leaf = np.repeat(np.arange(1, len(known) + 1), added)  # the next one to look at
    while len(open_):
        closed = shares[leaf] <= position[open_]
        ends[open_[closed]] = begins[leaf[closed]]
        open_, leaf = open_[~closed], leaf[~closed] + 1
    return ends


def _within(
    sizes: Int[np.ndarray, " pack"], in_row: Int[np.ndarray, " row"]
) -> Int[np.ndarray, " pack"]:
    """Return where each pack begins in its row."""
    begin = starts(sizes)
    return begin - np.repeat(begin[starts(in_row)], in_row)


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Copy numbers to a device; the host does not wait for a copy to a GPU."""
    tensor = torch.from_numpy(numbers)
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
