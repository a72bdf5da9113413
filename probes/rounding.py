"""How much vectors may differ by rounding."""

from __future__ import annotations

import torch

EQUAL, NEARLY_EQUAL = 1e-4, 0.03
"""Relative differences up to which vectors count as equal, in float32 and in 16-bit dtypes."""


def rounding(dtype: torch.dtype) -> float:
    """Return the relative difference up to which vectors of a dtype count as equal."""
    return EQUAL if dtype in (torch.float32, torch.float64) else NEARLY_EQUAL
