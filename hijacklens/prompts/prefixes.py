"""Prefixes: the symbols before a next token (`hijacklens.prompts.layout`), as bytes.

Bytes are joined, cut, compared and hashed ten times faster than tuples of integers, and prefixes
sort as their symbols do.

>>> prefix = prefix_of((1, 2)) + prefix_of((3,))
>>> symbols_of(prefix), symbols_of(prefix[: 2 * WIDTH])
((1, 2, 3), (1, 2))
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias

Prefix: TypeAlias = bytes
"""Symbols as big-endian 64-bit numbers."""
WIDTH = 8
"""Bytes of a symbol in a prefix."""


def prefix_of(symbols: Sequence[int]) -> Prefix:
    """Return symbols as a prefix."""
    return struct.pack(f">{len(symbols)}q", *symbols)


def symbols_of(prefix: Prefix) -> tuple[int, ...]:
    """Return the symbols of a prefix."""
    return struct.unpack(f">{len(prefix) // WIDTH}q", prefix)


def common(first: Prefix, second: Prefix) -> int:
    """Return how many symbols the longest common prefix has.

    >>> common(prefix_of((1, 2, 3)), prefix_of((1, 2, 4)))
    2
    """
    n = min(len(first), len(second))
    different = int.from_bytes(first[:n], "big") ^ int.from_bytes(second[:n], "big")
    return (8 * n - different.bit_length()) // (8 * WIDTH)
