"""The direct path of a head: token vectors and OV circuits with all norms multiplied in.

A head that attends only to token s, and whose input is the embedding of s alone, writes x_s W. It
adds x_s W y_o / scale to the logit of o, relative to the average token of the vocabulary:

    x_s = C E(s) / rms      direction of the embedding; C subtracts the mean for a layer norm
    W   = C diag(w1) W_V W_O diag(w2) C
                            w1: the norm before attention, w2: one after it (Gemma-2 and -3)
    y_o = C diag(wf) (W_U(o) - mean over the vocabulary)
                            wf: the final norm, without its scale

Positions, biases and the epsilons of norms are left out. x, W and y do not depend on how the
weights were processed. The one-layer model has no norm: x = y = W_E(t), W = W_V, nothing centred.

>>> from hijacklens.one_layer.architecture import OneLayerConfig
>>> model = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=16))
>>> path = DirectPath.of(model)
>>> tuple(path.read([1, 2]).shape), tuple(path.write([7]).shape)
((2, 4), (1, 4))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel
from hijacklens.one_layer.model import OneLayerTransformer
from probes.account import Norm
from probes.memory_fit.outer_products import Factors
from probes.values.matrices import ov_circuit


@dataclass(frozen=True, slots=True)
class DirectPath:
    """A model with its norms."""

    model: Any
    before: tuple[Norm | None, ...]
    """Layer -> the norm before attention; None if the layer has no such norm."""
    after: tuple[Norm | None, ...]
    """Layer -> the norm on the output of attention; None if the layer has no such norm."""
    final: Norm | None
    one_layer: bool

    @classmethod
    def of(cls, model: HookedModel) -> DirectPath:
        """Return the direct path of any hooked model."""
        modules: Any = model
        blocks = [(i, modules.blocks[i]) for i in range(int(model.cfg.n_layers))]
        return cls(
            model=model,
            before=tuple(_norm(model, b, "ln1", f"blocks.{i}.ln1") for i, b in blocks),
            after=tuple(_norm(model, b, "ln1_post", f"blocks.{i}.ln1_post") for i, b in blocks),
            final=_norm(model, modules, "ln_final", "ln_final"),
            one_layer=isinstance(model, OneLayerTransformer),
        )

    def read(self, tokens: Sequence[int]) -> Float64[Tensor, "token d_model"]:
        """Return x: what a head reads of each token.

        Raises:
            InputError: The model does not have such a token.
        """
        W_E = self.model.W_E
        _check(tokens, len(W_E), "W_E")
        x = _double(W_E[list(tokens)])
        first = self.before[0]
        if first is None:
            return x
        if first.centred:
            x = x - x.mean(-1, keepdim=True)
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def write(self, tokens: Sequence[int]) -> Float64[Tensor, "token d_model"]:
        """Return y: the direction of a head's output that raises each token's logit.

        Raises:
            InputError: The model does not have such a token.
        """
        W_U = self.model.W_U  # [d_model, vocab]
        _check(tokens, W_U.shape[1], "W_U")
        y = _double(W_U[:, list(tokens)].T)
        if not self.one_layer:
            y = y - _double(W_U.detach().float().mean(1))
        return y if self.final is None else self.final.pull(y).double()

    def circuit(self, layer: int, head: int) -> Factors:
        """Return W of a query head, as factors [d_model, d_head] and [d_head, d_model].

        Raises:
            InputError: The model has no such head, or no matrices per head.
        """
        circuit = ov_circuit(self.model, layer, head)
        A, B = _double(circuit.A), _double(circuit.B)
        if (norm := self.before[layer]) is not None:
            A = _double(norm.weight)[:, None] * A
            A = A - A.mean(0) if norm.centred else A
        if (norm := self.after[layer]) is not None:
            B = B * _double(norm.weight)
        if self.final is not None and self.final.centred:
            B = B - B.mean(1, keepdim=True)
        return A, B


def _norm(model: HookedModel, owner: Any, name: str, path: str) -> Norm | None:
    if f"{path}.hook_scale" not in model.hook_dict:
        return None
    return Norm.of(getattr(owner, name), int(model.cfg.d_model), next(iter(model.parameters())))


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _check(tokens: Sequence[int], size: int, name: str) -> None:
    if not 0 <= min(tokens) <= max(tokens) < size:
        raise InputError(
            f"token ids run from {min(tokens)} to {max(tokens)}; {name} of this model has 0 to "
            f"{size - 1}. Make the associations with this model's tokenizer."
        )
