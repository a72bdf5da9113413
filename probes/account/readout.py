"""The readout: from the residual stream to a difference of two logits, as a frozen linear map.

The final norm divides by a scale that depends on the complete stream. With the scale frozen at its
value in a run the norm is linear, and so is the map from any part of the stream to

    D = logit(plus) - logit(minus) = x . pulled / scale + bias

where x is the stream at the position that is read, `pulled` is the difference of two columns of W_U
mapped back through the norm's weight and centring, and `bias` is the sum of the biases of the norm
and the unembedding. A final soft-cap (Gemma-2) is not linear and is a separate part.

>>> norm = Norm(weight=torch.tensor([1.0, 2.0]), bias=torch.zeros(2), centred=True)
>>> norm.pull(torch.tensor([[3.0, 2.0]]))     # (3, 4) without its mean
tensor([[-0.5000,  0.5000]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.one_layer.model import OneLayerTransformer

PROBE_SIZE = 16.0
"""Large enough that a norm's epsilon is negligible (1e-5 of 256), small enough for float16."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm or RMS norm without its scale: `norm(x) = weight * (C x) / scale + bias`.

    C subtracts the mean for a layer norm and is the identity for an RMS norm.
    """

    weight: Float[Tensor, " d_model"]
    """The effective weight: 1 + w for Gemma, ones if the weight is folded into the next matrix."""
    bias: Float[Tensor, " d_model"]
    centred: bool

    @classmethod
    def of(cls, module: Any, width: int, like: Tensor) -> Norm:
        """Measure what a norm module does by applying it to three vectors.

        This works whatever the name, offset or folding of the weight.

        Args:
            module: A norm; it is called on [1, 1, width].
            width: Its width.
            like: A tensor of the model, which sets the dtype and device of the vectors.
        """
        place = next(iter(module.parameters()), like)
        signs = torch.ones(width, dtype=like.dtype, device=place.device)
        signs[1::2] = -1
        if width % 2:
            signs[-3:] = signs.new_tensor([2, -1, -1])  # the mean stays zero
        rows = torch.stack([torch.zeros_like(signs), signs, torch.ones_like(signs)]) * PROBE_SIZE
        with torch.inference_mode():
            bias, along, flat = (module(row[None, None])[0, 0].float() for row in rows)
        signs = signs.float()
        weight = (along - bias) * signs.pow(2).mean().sqrt() / signs
        centred = bool((flat - bias).abs().max() < 0.1 * weight.abs().max())
        return cls(weight.clone(), bias.clone(), centred)

    def pull(self, direction: Float[Tensor, "read d_model"]) -> Float[Tensor, "read d_model"]:
        """Map a direction on the output to the one on the input that reads the same times scale.

        The norm's bias is left out.
        """
        weighted = direction * self.weight.to(direction.device)
        return weighted - weighted.mean(-1, keepdim=True) if self.centred else weighted


@dataclass(frozen=True, slots=True)
class Frame:
    """What the readout needs of a model besides its activations; made once per model."""

    final: Norm | None
    """The norm before the unembedding, if there is one."""
    after_attention: tuple[Norm | None, ...]
    """Layer -> the norm on the output of attention (Gemma-2 and -3)."""
    soft_cap: float | None
    residual: bool
    """Whether the embedding reaches the output, unlike in the one-layer model."""

    @classmethod
    def of(cls, model: HookedModel) -> Frame:
        """Collect the norms of any hooked model."""
        width, like = int(model.cfg.d_model), next(iter(model.parameters()))
        like = like.new_empty(0, device=device_of(model))

        def norm(owner: Any, name: str, path: str) -> Norm | None:
            if f"{path}.hook_scale" not in model.hook_dict:
                return None
            return Norm.of(getattr(owner, name), width, like)

        untyped: Any = model
        layers = range(int(model.cfg.n_layers))
        cap = float(getattr(model.cfg, "output_logits_soft_cap", None) or 0)
        return cls(
            final=norm(model, "ln_final", "ln_final"),
            after_attention=tuple(
                norm(untyped.blocks[i], "ln1_post", f"blocks.{i}.ln1_post") for i in layers
            ),
            soft_cap=cap if cap > 0 else None,
            residual=not isinstance(model, OneLayerTransformer),
        )


@dataclass(frozen=True, slots=True)
class Readout:
    """The directions of several reads, each of one logit or of the difference of two."""

    plus: Float[Tensor, "read d_model"]
    """A column of W_U, a direction on the output of the final norm."""
    minus: Float[Tensor, "read d_model"]
    """Zeros if one logit is read."""
    plus_bias: Float[Tensor, " read"]
    minus_bias: Float[Tensor, " read"]
    pulled: Float[Tensor, "read d_model"]
    """`plus - minus` as a direction on the residual stream; divide its reading by the scale."""
    norm_bias: Float[Tensor, " read"]
    """What the final norm's bias adds to the difference."""

    @classmethod
    def of(
        cls, model: HookedModel, frame: Frame, plus: Sequence[int], minus: Sequence[int | None]
    ) -> Readout:
        """Read `logit(plus) - logit(minus)`, or `logit(plus)` if minus is None."""
        untyped: Any = model
        device = device_of(model)
        two = torch.tensor([float(token is not None) for token in minus], device=device)
        others = [token or 0 for token in minus]
        W_U, b_U = untyped.W_U, untyped.b_U
        with torch.inference_mode():
            dtype = torch.promote_types(W_U.dtype, torch.float32)
            first = W_U[:, list(plus)].T.to(device, dtype)
            second = W_U[:, others].T.to(device, dtype) * two[:, None].to(dtype)
            biases = first.new_zeros(2, len(plus))
            if b_U is not None:
                pair = torch.stack([b_U[list(plus)], b_U[others]]).to(device, dtype)
                biases = pair * torch.stack([torch.ones_like(two), two]).to(dtype)
            pulled, from_norm = first - second, first.new_zeros(len(plus))
            if frame.final is not None:
                from_norm = pulled @ frame.final.bias.to(device, dtype)
                pulled = frame.final.pull(pulled)
            return cls(first, second, biases[0], biases[1], pulled, from_norm)

    def soft_cap(
        self, normed: Float[Tensor, "read d_model"], cap: float | None
    ) -> Float[Tensor, " read"]:
        """Return what the final soft-cap adds to the difference: capped minus uncapped, in logits.

        Args:
            normed: The output of the final norm at the reads.
            cap: Logits become `cap * tanh(logits / cap)`; None for no cap.
        """
        if cap is None:
            return torch.zeros_like(self.plus_bias)
        here = normed.to(self.plus)
        added = []
        for column, bias in ((self.plus, self.plus_bias), (self.minus, self.minus_bias)):
            logit = (here * column).sum(-1) + bias
            added.append(cap * torch.tanh(logit / cap) - logit)
        return added[0] - added[1]
