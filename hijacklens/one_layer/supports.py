"""Supports N(z) of the concept task: which tokens may be drawn for a label z (z itself never).

Reference page, 3.1. A support is a name, a rule on pairs of tokens, or a boolean
matrix [vocab, vocab] with N(a) in row a. Rules are not always symmetric: b in N(a) need not mean
a in N(b).

>>> named("first-bit", 2).int().tolist()
[[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hijacklens.arguments import shown
from hijacklens.errors import InputError, unknown

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
