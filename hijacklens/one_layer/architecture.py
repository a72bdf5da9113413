"""Shape and starting point of the one-layer model, and the same under TransformerLens' names.

>>> config = OneLayerConfig(vocab=32, d_model=16, length=64)
>>> config.d_a, config.std
(16, 0.25)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hijacklens.arguments import choice, number, whole_number
from hijacklens.errors import InputError

LARGEST = 2**20
"""Tokens, widths and lengths beyond it fit into no memory."""
FREEZABLE = ("W_E", "W_V", "W_QK")
VALUE_INITS = ("gaussian", "identity")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class OneLayerConfig:
    """Shape and starting point of a one-layer model.

    The paper states the architecture and that embeddings start Gaussian; `d_attn`, `init_scale`
    and the start of W_Q, W_K and W_V are our defaults.
    """

    vocab: int
    """Number of tokens V, 2^m for latent concept association."""
    d_model: int
    """Width d of the embeddings; W_V is [d_model, d_model]."""
    d_attn: int | None = None
    """Width d_a of queries and keys; None for d_model."""
    length: int = 256
    """Context length the model is made for (`cfg.n_ctx`). Without positions any other works too."""
    init_scale: float | None = None
    """Standard deviation of the Gaussian start of every matrix; None for 1 / sqrt(d_model)."""
    value_init: str = "gaussian"
    """W_V starts `"gaussian"` or as the `"identity"`."""
    freeze: tuple[str, ...] = ()
    """What training leaves as it starts: any of `"W_E"`, `"W_V"`, `"W_QK"` (both W_Q and W_K)."""
    dtype: str = "float32"
    """`"float32"` or `"float64"`. The start is drawn in float64, so both start alike."""
    seed: int = 0
    """Seed of the Gaussian start."""

    def __post_init__(self) -> None:
        sizes = {"vocab": self.vocab, "d_model": self.d_model, "length": self.length}
        if self.d_attn is not None:
            sizes["d_attn"] = self.d_attn
        for name, size in sizes.items():
            whole = whole_number(f"one-layer model: {name}", size, least=1, most=LARGEST)
            object.__setattr__(self, name, whole)
        if self.init_scale is not None:
            scale = number("one-layer model: init_scale", self.init_scale, least=0)
            object.__setattr__(self, "init_scale", scale)
        choice("start of W_V", self.value_init, VALUE_INITS)
        if isinstance(self.freeze, str):
            raise InputError(
                f"freeze is {self.freeze!r}; give a tuple, such as ({self.freeze!r},)."
            )
        for name in self.freeze:
            choice("part to freeze", name, FREEZABLE)
        choice("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "seed", whole_number("seed", self.seed))

    @property
    def d_a(self) -> int:
        """Width of queries and keys."""
        return self.d_model if self.d_attn is None else self.d_attn

    @property
    def std(self) -> float:
        """Standard deviation of the Gaussian start."""
        return self.d_model**-0.5 if self.init_scale is None else self.init_scale


@dataclass(frozen=True, slots=True)
class HookedConfig:
    """What TransformerLens' caches and patching tools ask of a model's `cfg`."""

    d_model: int
    d_head: int
    """Width of a value: d_model, since W_V is square."""
    d_attn: int
    """Width of a query and of a key."""
    attn_scale: float
    """Scores are divided by this: sqrt(d_attn)."""
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    dtype: torch.dtype
    device: torch.device
    model_name: str = "one-layer"
    n_layers: int = 1
    n_heads: int = 1
    n_key_value_heads: int | None = None
    d_mlp: int | None = None
    attn_only: bool = True
    parallel_attn_mlp: bool = False
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    normalization_type: str | None = None
    final_rms: bool = False
    positional_embedding_type: str = "none"
    output_logits_soft_cap: float = -1.0
    default_prepend_bos: bool = False
