"""What value probes are compared with: plain Hugging Face models whose weights were edited.

Hugging Face keeps W_V as rows of `v_proj` (transposed) or, for GPT-2, as the last third of the
columns of `c_attn`; W_O as columns of `o_proj` or rows of `c_proj`. Everything here is read from
and written to those, never through TransformerLens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from tiny_models import tiny_tokenizer
from torch import Tensor

from hijacklens.models.loading import load_model
from hijacklens.probe import probed
from hijacklens.prompts.layout import Layout

Matrices = Mapping[tuple[int, int], Tensor]
TEXT = "Do not think of Guam. The Eiffel Tower is in the city of"


def draw(*shape: int, seed: int = 0) -> Tensor:
    """A Gaussian matrix about as large as those of tiny models."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def ids_of(family: str) -> Tensor:
    """The tokens of `TEXT` [1, pos]."""
    return torch.tensor([tiny_tokenizer(family)(TEXT).input_ids])


def load(plain: Any, family: str) -> Any:
    """A copy of a plain model, with hooks."""
    return load_model(copy.deepcopy(plain), tokenizer=tiny_tokenizer(family), device="cpu")


def run(model: Any, ids: Tensor, *probes: Any) -> Tensor:
    """Logits with probes on."""
    with torch.no_grad(), probed(model, probes, Layout(ids, {})):
        return model(ids)


def same(got: Tensor, wanted: Tensor, *, normalised: bool = False) -> None:
    """Assert that logits agree, up to a constant if they are normalised."""
    if normalised:
        got, wanted = got.log_softmax(-1), wanted.log_softmax(-1)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


class PlainValues:
    """The value and output matrices of a plain model, on row vectors."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config
        self.gpt2 = config.model_type == "gpt2"
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.d_model = config.hidden_size
        self.d_head = getattr(config, "head_dim", None) or self.d_model // self.heads

    def kv_of(self, head: int) -> int:
        return head // (self.heads // self.kv_heads)

    def block(self, layer: int) -> Any:
        return (self.model.transformer.h if self.gpt2 else self.model.model.layers)[layer]

    def attention(self, layer: int) -> Any:
        block = self.block(layer)
        return block.attn if self.gpt2 else block.self_attn

    def value(self, layer: int, kv_head: int) -> Tensor:
        """W_V [d_model, d_head]: a view, so that it can be written to."""
        cut = slice(kv_head * self.d_head, (kv_head + 1) * self.d_head)
        if self.gpt2:
            return self.attention(layer).c_attn.weight.data[:, 2 * self.d_model :][:, cut]
        return self.attention(layer).v_proj.weight.data[cut].T

    def bias(self, layer: int, kv_head: int) -> Tensor:
        """b_V [d_head] of GPT-2, a view."""
        values = self.attention(layer).c_attn.bias.data[2 * self.d_model :]
        return values[kv_head * self.d_head : (kv_head + 1) * self.d_head]

    def output(self, layer: int, head: int) -> Tensor:
        """W_O [d_head, d_model], a view."""
        cut = slice(head * self.d_head, (head + 1) * self.d_head)
        if self.gpt2:
            return self.attention(layer).c_proj.weight.data[cut]
        return self.attention(layer).o_proj.weight.data[:, cut].T

    def norm(self, layer: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the norm before attention."""
        if self.gpt2:
            norm = self.block(layer).ln_1
            return norm.weight.data, norm.bias.data
        weight = self.block(layer).input_layernorm.weight.data
        if self.model.config.model_type.startswith("gemma"):
            weight = 1 + weight
        return weight, torch.zeros_like(weight)


def with_values(plain: Any, matrices: Matrices, *, drop_bias: bool = False) -> Any:
    """A copy with other value matrices {(layer, kv_head): [d_model, d_head]}."""
    edited = PlainValues(copy.deepcopy(plain))
    for (layer, kv_head), matrix in matrices.items():
        edited.value(layer, kv_head).copy_(matrix)
        if drop_bias:
            edited.bias(layer, kv_head).zero_()
    return edited.model


def with_outputs(plain: Any, matrices: Matrices) -> Any:
    """A copy with other output matrices {(layer, head): [d_head, d_model]}."""
    edited = PlainValues(copy.deepcopy(plain))
    for (layer, head), matrix in matrices.items():
        edited.output(layer, head).copy_(matrix)
    return edited.model


def with_circuits(plain: Any, matrices: Matrices, *, keep_bias: bool = True) -> Any:
    """A copy with other OV circuits {(layer, head): [d_model, d_model]}, which may have full rank.

    The output matrix of the head becomes zero, and a hook on the whole attention module adds the
    head's pattern, as the module returns it, times its input times the matrix.
    """
    edited = PlainValues(copy.deepcopy(plain))
    edited.model.set_attn_implementation("eager")
    for (layer, head), matrix in matrices.items():
        output = edited.output(layer, head)
        constant = torch.zeros(edited.d_model)
        if edited.gpt2 and keep_bias:
            constant = edited.bias(layer, head) @ output
        output.zero_()
        edited.attention(layer).register_forward_hook(
            _adding(head, matrix, constant), with_kwargs=True
        )
    return edited.model


def _adding(head: int, matrix: Tensor, constant: Tensor) -> Any:
    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        written, pattern = output[:2]
        return (written + pattern[:, head] @ (x @ matrix) + constant, pattern, *output[2:])

    return hook
