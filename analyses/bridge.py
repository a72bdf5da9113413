"""The bridge (not in the paper): the one-layer model and language models side by side.

What is stored: value matrices and embeddings (`bridge_weights`). What is done with a context:
attention (`bridge_attention`), and the answer as more of it speaks for another target
(`bridge_mixing`).
"""

from __future__ import annotations

from analyses.bridge import (
    attention as bridge_attention,
    mixing as bridge_mixing,
    weights as bridge_weights,
)

ANALYSES = (*bridge_weights.ANALYSES, *bridge_attention.ANALYSES, *bridge_mixing.ANALYSES)
