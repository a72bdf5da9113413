"""A reading as it is stored: a digest of the prefix, and the numbers as bytes with a checksum.

    int32, float64   the top token and its log-probability
    int32, float64   a token and its log-probability, for every token that was read
    uint32           CRC-32 of the digest and all that

Numbers come back bit for bit. Change the schema of the database when this changes.

>>> reading = Reading({7: -0.5, 9: -2.25}, top_token=7, top_logprob=-0.5)
>>> stored = encode(name_of((5, 6)), reading)
>>> len(stored), decode(name_of((5, 6)), stored) == reading
(40, True)
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from typing import Any

from hijacklens.store.database import DamagedError
from hijacklens.engine.engine import Reading
from hijacklens.prompts.tokens import TokenIds

_PAIR, _CHECKSUM = struct.Struct("<id"), struct.Struct("<I")


def name_of(prefix: TokenIds) -> bytes:
    """16 bytes that name the symbols of a prefix."""
    symbols = struct.pack(f"<{len(prefix)}q", *prefix)
    return hashlib.blake2b(symbols, digest_size=16).digest()


def is_finite(reading: Reading) -> bool:
    """Whether every number of a reading is finite; others are not stored."""
    return math.isfinite(reading.top_logprob) and all(map(math.isfinite, reading.logprobs.values()))


def merge(old: Reading, new: Reading) -> Reading:
    """The tokens of two readings of one prefix; what the old one has does not change."""
    return Reading({**new.logprobs, **old.logprobs}, old.top_token, old.top_logprob)


def encode(name: bytes, reading: Reading) -> bytes:
    """The top token, then every token with its log-probability, then a checksum over all."""
    pairs = sorted(reading.logprobs.items())
    body = _PAIR.pack(reading.top_token, reading.top_logprob) + b"".join(
        _PAIR.pack(token, logprob) for token, logprob in pairs
    )
    return body + _CHECKSUM.pack(zlib.crc32(name + body))


def decode(name: bytes, stored: Any) -> Reading:
    """The reading that `encode` wrote.

    Raises:
        DamagedError: It is not what was written.
    """
    stored = stored if isinstance(stored, bytes) else b""
    body, end = stored[: -_CHECKSUM.size], stored[-_CHECKSUM.size :]
    if not body or len(body) % _PAIR.size or end != _CHECKSUM.pack(zlib.crc32(name + body)):
        raise DamagedError("a reading in it is not what was written")
    (top_token, top_logprob), *pairs = _PAIR.iter_unpack(body)
    return Reading(dict(pairs), top_token, top_logprob)
