"""Lists of different lengths as one array, one list after the other.

>>> ranges(np.array([10, 50]), np.array([3, 2])).tolist(), starts(np.array([3, 2])).tolist()
([10, 11, 12, 50, 51], [0, 3])
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def starts(counts: Int[np.ndarray, " list"]) -> Int[np.ndarray, " list"]:
    """Return the index at which each list begins."""
    return np.cumsum(counts) - counts


def ranges(
    first: Int[np.ndarray, " list"], counts: Int[np.ndarray, " list"]
) -> Int[np.ndarray, " number"]:
    """Return `counts` whole numbers from `first` on, for each list."""
    return np.arange(counts.sum()) + np.repeat(first - starts(counts), counts)
