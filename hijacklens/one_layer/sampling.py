"""Draws from many discrete distributions at once: Walker's alias method with integer thresholds.

A distribution over V = 2^bits outcomes is cut into V cells of equal mass; cell i yields i below its
threshold and the other outcome `alias[i]` above it (Walker 1977). One 32-bit random integer makes
one draw, whatever V:

    32 random bits:   | signed fraction, 32 - bits |  cell, bits  |

so a draw costs two look-ups and no search. The thresholds are rounded to that fraction: each
probability is off by at most 2^-32 per cell that feeds it, and a probability of 0 stays exactly 0.

>>> table = AliasTable.build(torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64))
>>> draws = table.draw((1000, 100), torch.Generator().manual_seed(0), row=torch.zeros(1, 1).int())
>>> draws.shape, round((draws == 3).double().mean().item(), 2)
(torch.Size([1000, 100]), 0.4)
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from hijacklens.errors import InputError, shown, unknown


@dataclass(frozen=True, slots=True)
class AliasTable:
    """Alias tables of some distributions over 2^bits outcomes, flattened row after row."""

    bits: int
    thresholds: Int32[Tensor, " cells"]
    """A draw stays in its cell if its signed fraction is below this."""
    jumps: Int32[Tensor, " cells"]
    """Cell xor alias, so that a draw is `cell ^ (jump or 0)`: no branch, no select."""

    @classmethod
    def build(cls, probabilities: Float[Tensor, "row vocab"]) -> AliasTable:
        """The tables of the distributions in the rows; vocab is a power of 2, at most 2^12.

        Cost: vocab steps, each over all rows at once.
        """
        vocab = probabilities.shape[1]
        bits = vocab.bit_length() - 1
        keep, alias = _cells(probabilities.double().cpu().numpy() * vocab)
        half = 1 << (31 - bits)
        thresholds = np.rint(keep * 2 * half).astype(np.int64) - half
        jumps = alias ^ np.arange(vocab)
        return cls(
            bits=bits,
            thresholds=torch.from_numpy(thresholds.astype(np.int32).reshape(-1)),
            jumps=torch.from_numpy(jumps.astype(np.int32).reshape(-1)),
        )

    def to(self, device: torch.device) -> AliasTable:
        """The same tables on a device."""
        return AliasTable(self.bits, self.thresholds.to(device), self.jumps.to(device))

    @property
    def rows(self) -> int:
        """How many distributions there are."""
        return len(self.jumps) >> self.bits

    def draw(
        self,
        shape: tuple[int, int],
        generator: torch.Generator,
        *,
        row: Int[Tensor, "#batch #pos"],
    ) -> Int32[Tensor, "batch pos"]:
        """Draw outcomes of a shape [batch, pos], on the device of the generator.

        Args:
            shape: batch and pos.
            generator: Where the randomness comes from.
            row: Which distribution each draw comes from; it broadcasts to the shape.
        """
        fraction = _random_int32(math.prod(shape), generator)
        cell = fraction & ((1 << self.bits) - 1)
        index = (cell.view(shape) + (row << self.bits).to(torch.int32)).view(-1)
        fraction >>= self.bits
        fraction -= self.thresholds.index_select(0, index)
        fraction >>= 31  # all ones where the draw stays in its cell, all zeros where it jumps
        jump = self.jumps.index_select(0, index)
        jump &= fraction.bitwise_not_()
        cell ^= jump
        return cell.view(shape)

    def implied(self) -> Float[Tensor, "row vocab"]:
        """The probabilities that the tables draw with, rounding included, in float64."""
        vocab = 1 << self.bits
        keep = (self.thresholds.double() / 2.0 ** (32 - self.bits) + 0.5).view(-1, vocab) / vocab
        alias = self.jumps.view(-1, vocab).long() ^ torch.arange(vocab, device=keep.device)
        return keep.scatter_add(1, alias, 1 / vocab - keep)


def _random_int32(count: int, generator: torch.Generator) -> Int32[Tensor, " count"]:
    """Uniform 32-bit integers, drawn in pairs (one 64-bit draw costs less than two of 32 bits)."""
    pairs = torch.empty((count + 1) // 2, dtype=torch.int64, device=generator.device)
    return pairs.random_(-(2**63), None, generator=generator).view(torch.int32)[:count]


def _cells(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of each cell that it keeps, and its alias; the rows of `weights` have mean 1.

    Sweeps over the light (< 1) and the heavy outcomes of all rows in step. The heavy outcome at
    hand fills up light cells until its own remainder is light; then the next heavy one fills it.
    Every step closes one cell per row, so there are as many steps as outcomes.
    """
    rows, vocab = weights.shape
    row = np.arange(rows)
    heavy = weights >= 1
    heavy[row, weights.argmax(1)] = True  # rounding may leave a uniform row just below 1
    # The light outcomes come first in `order`, then the heavy ones.
    order = np.argsort(heavy, axis=1, kind="stable")
    first_heavy = vocab - heavy.sum(1)
    light, now = np.zeros(rows, dtype=np.int64), first_heavy.copy()
    rest = weights[row, order[row, now]]
    keep, alias = np.ones_like(weights), np.tile(np.arange(vocab), (rows, 1))
    for _ in range(vocab):
        last = now >= vocab - 1
        close = (light == first_heavy) | ((rest <= 1) & ~last)
        cell = order[row, np.where(close, np.minimum(now, vocab - 1), light)]
        following = order[row, np.minimum(now + 1, vocab - 1)]
        share = np.where(close, rest, weights[row, cell])
        keep[row, cell] = np.clip(share, 0, 1)
        alias[row, cell] = np.where(close, following, order[row, np.minimum(now, vocab - 1)])
        rest = np.where(close, weights[row, following] + rest - 1, rest + share - 1)
        now += close
        light += ~close
    return keep, alias


Support: TypeAlias = Callable[[Tensor, Tensor], Tensor] | Tensor
"""A user's support: a rule (a, b) -> "b is in N(a)", or its boolean matrix [vocab, vocab]."""

SUPPORTS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "all": lambda difference, bits: difference != 0,
    "hamming-1": lambda difference, bits: difference & (difference - 1) == 0,
    "first-bit": lambda difference, bits: difference >> (bits - 1) == 0,
    "first-two-bits": lambda difference, bits: difference >> max(bits - 2, 0) == 0,
}
"""The named supports, as rules on a xor b; a itself is taken out afterwards.

Because they depend on a xor b alone, all labels share one distribution of `token xor label`.
"""


def named(name: str, bits: int, *, rows: int | None = None) -> Bool[Tensor, "row vocab"]:
    """The matrix of a named support, or its first `rows` rows.

    Raises:
        InputError: There is no such name.
    """
    if name not in SUPPORTS:
        raise unknown("support", name, SUPPORTS, "Or pass a rule (a, b) -> b in N(a).")
    token = torch.arange(1 << bits)
    difference = token[:rows, None] ^ token
    return SUPPORTS[name](difference, bits) & (difference != 0)


def evaluate(support: Support, bits: int) -> Bool[Tensor, "vocab vocab"]:
    """The matrix of a user's support, with the diagonal taken out, on the CPU.

    A rule is called once, with a [vocab, 1] and b [1, vocab].

    Raises:
        InputError: What is given, or what the rule answers, is not boolean or has another shape.
    """
    vocab = 1 << bits
    token = torch.arange(vocab)
    if not (isinstance(support, Tensor) or callable(support)):
        raise InputError(
            f"a support is {', '.join(SUPPORTS)}, a rule (a, b) -> b in N(a) or a boolean matrix, "
            f"not {shown(support)}."
        )
    given = support if isinstance(support, Tensor) else support(token[:, None], token[None])
    what = "matrix" if isinstance(support, Tensor) else "rule's answer for all pairs"
    if not (isinstance(given, Tensor) and given.dtype == torch.bool):
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise InputError(
            f"the {what} of the support must be a tensor of booleans, got {kind}: entry (a, b) "
            "says whether b is in N(a)."
        )
    # A rule may ignore a or b, and so answer with a row or a column; a matrix has to be whole.
    fits = [(vocab, vocab)]
    if not isinstance(support, Tensor):
        fits += [(vocab, 1), (1, vocab)]
    if tuple(given.shape) not in fits:
        raise InputError(
            f"the {what} of the support must have the shape [{vocab}, {vocab}] (2^bits tokens), "
            f"got {list(given.shape)}."
        )
    return given.detach().cpu().expand(vocab, vocab) & (token[:, None] != token)


def depends_on_xor(matrix: Bool[Tensor, "vocab vocab"]) -> bool:
    """Whether membership of b in N(a) depends on a xor b alone, as for all named supports."""
    token = torch.arange(len(matrix))
    return bool((matrix == matrix[0][token[:, None] ^ token]).all())


def pack(matrix: Bool[Tensor, "vocab vocab"]) -> str:
    """The matrix as text for a saved configuration: bits, zlib, base64."""
    return base64.b64encode(zlib.compress(np.packbits(matrix.numpy()).tobytes(), 9)).decode("ascii")


def unpack(text: str, bits: int) -> Bool[Tensor, "vocab vocab"]:
    """The matrix that `pack` made a text of.

    Raises:
        InputError: The text is no such matrix, or one for another number of bits.
    """
    vocab = 1 << bits
    try:
        packed = zlib.decompress(base64.b64decode(text, validate=True))
    except (TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise InputError(
            f"the support matrix of a saved concept task cannot be read: {error!r}. Save the task "
            "again with configuration()."
        ) from error
    if len(packed) != -(-vocab * vocab // 8):
        raise InputError(
            f"the support matrix of a saved concept task has {len(packed)} bytes; bits={bits} "
            f"needs {-(-vocab * vocab // 8)}. Were the bits changed by hand?"
        )
    flat = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=vocab * vocab)
    return torch.from_numpy(flat.astype(bool)).view(vocab, vocab)
