"""Shape and start of the one-layer model, and its weights; needs no TransformerLens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import choice, number, several, whole_number

LARGEST = 2**20
"""Largest number of tokens, width or length: more would not fit into RAM."""

VALUE_INITS = ("gaussian", "identity")

NAMES = ("W_E", "W_Q", "W_K", "W_V")

PART_OF = {"W_E": "W_E", "W_V": "W_V", "W_Q": "W_QK", "W_K": "W_QK"}
"""Matrix -> the name that freezes it."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Width and start of a one-layer model, the same for every task and seed.

    The paper states the architecture and that embeddings start Gaussian; `d_attn`, `init_scale`
    and the start of W_Q, W_K and W_V are our defaults.
    """

    d_model: int
    """Width d of the embeddings; W_V is [d_model, d_model]."""
    d_attn: int | None = None
    """Width d_a of queries and keys; None for d_model."""
    init_scale: float | None = None
    """Standard deviation of the Gaussian start of every matrix; None for 1 / sqrt(d_model)."""
    value_init: str = "gaussian"
    """W_V starts `"gaussian"`, or as the `"identity"` (which figure 3a also freezes)."""
    freeze: Sequence[str] = ()
    """Matrices that training does not change: any of `"W_E"`, `"W_V"`, `"W_QK"` (W_Q and W_K)."""
    dtype: str = "float32"
    """`"float32"` or `"float64"`. The start is drawn in float64, so both start alike."""

    def __post_init__(self) -> None:
        self._set_sizes("d_model")
        if self.d_attn is not None:
            self._set_sizes("d_attn")
        if self.init_scale is not None:
            scale = number("one-layer model: init_scale", self.init_scale, least=0)
            object.__setattr__(self, "init_scale", scale)
        choice("start of W_V", self.value_init, VALUE_INITS)
        object.__setattr__(self, "freeze", several("freeze", self.freeze, "['W_V']"))
        for name in self.freeze:
            choice("part to freeze", name, dict.fromkeys(PART_OF.values()))
        choice("dtype", self.dtype, DTYPES)

    def _set_sizes(self, *names: str) -> None:
        """Replace sizes by plain ints, or refuse them."""
        for name in names:
            value = getattr(self, name)
            size = whole_number(f"one-layer model: {name}", value, least=1, most=LARGEST)
            object.__setattr__(self, name, size)

    @property
    def d_a(self) -> int:
        """Width of queries and keys."""
        return self.d_model if self.d_attn is None else self.d_attn

    @property
    def std(self) -> float:
        """Standard deviation of the Gaussian start."""
        return self.d_model**-0.5 if self.init_scale is None else self.init_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class OneLayerConfig(ModelSettings):
    """Shape and start of one model on one task.

    Raises:
        InputError: A setting is outside its range.
    """

    vocab: int
    """Number of tokens V, 2^m for latent concept association."""
    length: int = 256
    """Context length (`cfg.n_ctx`). Without positions any other length works too."""
    seed: int = 0
    """Seed of the Gaussian start."""

    def __post_init__(self) -> None:
        ModelSettings.__post_init__(self)
        self._set_sizes("vocab", "length")
        object.__setattr__(self, "seed", whole_number("seed", self.seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class OneLayerWeights:
    """The four matrices of equation 4.1, acting on row vectors; or their gradients.

    Runs that train together have theirs stacked along a leading axis `run`.
    """

    W_E: Float[Tensor, "*run vocab d_model"]
    W_Q: Float[Tensor, "*run d_model d_attn"]
    W_K: Float[Tensor, "*run d_model d_attn"]
    W_V: Float[Tensor, "*run d_model d_model"]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and matrix, in the order of `NAMES`."""
        for name in NAMES:
            yield name, getattr(self, name)

    def __getitem__(self, run: int | slice) -> OneLayerWeights:
        """Return views of the matrices of one run or of some."""
        return self.map(lambda stack: stack[run])

    @classmethod
    def stack(cls, weights: Sequence[OneLayerWeights]) -> OneLayerWeights:
        """Stack the matrices of several models along a new first axis."""
        return cls(**{name: torch.stack([getattr(w, name) for w in weights]) for name in NAMES})

    def map(self, function: Callable[[Tensor], Tensor]) -> OneLayerWeights:
        """Apply a function to each of the four matrices."""
        return OneLayerWeights(**{name: function(matrix) for name, matrix in self.items()})
