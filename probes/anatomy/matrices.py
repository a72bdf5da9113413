"""Value matrices and OV circuits, read from any hooked model.

All act on row vectors, as in TransformerLens: a value is `x @ W_V`, and a head writes
`x @ W_V @ W_O` for a token that it attends to fully. The paper writes tokens as columns, so its
W_V is the transpose. `x` is what the model feeds to W_V, with or without norm weights:

    residual -> normalised -> times the norm's weight, plus its bias -> x -> W_V
                              `-- attention_norm_weight; ones after folding --'

In a model as loaded (`load_model`) `x` is the weighted norm of the residual stream, and the matrix
is the one in its file. If norms were folded (`enable_compatibility_mode()`, or the usual processing
of a HookedTransformer), `x` is the bare normalised residual stream and the matrix is
`attention_norm_weight[:, None] * W_V` of the unfolded model; for a layer norm the mean over its
rows is subtracted (centred inputs do not depend on it). To compare two models, or a matrix with
embeddings, multiply that weight in. The one-layer model has no norm.

Under grouped-query attention a W_V belongs to a `kv_head` and serves `n_heads / n_kv_heads` query
heads; an OV circuit belongs to a (query) `head`.

Under latent attention (DeepSeek) keys and values are made from a latent, the norm of a compressed
x. W_V is then the map from the latent to the values of a head, [d_latent, d_head], x is the latent,
and an OV circuit is [d_latent, d_model].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformers.pytorch_utils import Conv1D

from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedModel
from hijacklens.sites import choose, head_count
from probes.anatomy.norms import norm_at, norm_before_attention

NEARLY = 0.02
"""Largest relative difference between a linear module and its measured matrix (bfloat16)."""


def value_matrix(model: HookedModel, layer: int, kv_head: int) -> Float[Tensor, "d_model d_head"]:
    """Return W_V of one key/value head; do not write to it, it may be the model's own tensor.

    Under latent attention it is [d_latent, d_head].

    Raises:
        InputError: The model has no such layer or key/value head, or its values do not come from
            one matrix per head.
    """
    choose(model, heads=[(layer, kv_head)], axis="kv_head")  # refuses sites that do not exist
    weights, _ = head_matrices(model, layer, "V")
    # A HookedTransformer repeats the matrix of a kv head for each query head that reads it.
    repeats = len(weights) / head_count(model, "kv_head")
    if not repeats.is_integer():
        raise InputError(
            f"layer {layer} has {len(weights)} key/value heads, and {model.cfg.model_name!r} has "
            f"{head_count(model, 'kv_head')} by its configuration; value probes need one number."
        )
    return weights[kv_head * int(repeats)]


def value_bias(model: HookedModel, layer: int, kv_head: int) -> Float[Tensor, " d_head"]:
    """Return b_V of one key/value head; zeros if the model has none.

    Raises:
        InputError: As for `value_matrix`.
    """
    W_V = value_matrix(model, layer, kv_head)
    bias = head_matrices(model, layer, "V")[1]
    if bias is None:
        return W_V.new_zeros(W_V.shape[1])
    by_head = bias.reshape(-1, W_V.shape[1])
    return by_head[kv_head * (len(by_head) // head_count(model, "kv_head"))]


def output_matrix(model: HookedModel, layer: int, head: int) -> Float[Tensor, "d_head d_model"]:
    """Return W_O of one query head; do not write to it, it may be the model's own tensor.

    Raises:
        InputError: The model has no such layer or head, or no output matrix per head.
    """
    choose(model, heads=[(layer, head)], axis="head")
    return head_matrices(model, layer, "O")[0][head]


def kv_head_of(model: HookedModel, head: int) -> int:
    """Return the key/value head of a query head: itself, without grouped-query attention."""
    return head * head_count(model, "kv_head") // head_count(model, "head")


def ov_circuit(model: HookedModel, layer: int, head: int) -> FactoredMatrix:
    """Return the OV circuit of one query head, W_V W_O [d_model, d_model] of rank d_head.

    It maps the input of W_V (see the module on norm weights) to what the head adds to the
    attention output, before the norm that Gemma-2 and -3 have after attention. It excludes biases:
    with them a head also adds `value_bias @ output_matrix`.

    Raises:
        InputError: As for `value_matrix` and `output_matrix`.
    """
    W_O = output_matrix(model, layer, head)
    W_V = value_matrix(model, layer, kv_head_of(model, head))
    return FactoredMatrix(W_V, W_O.to(W_V.device))


def attention_norm_weight(model: HookedModel, layer: int) -> Float[Tensor, " d_model"]:
    """Return the factors of the norm before attention (1 + w for Gemma), as measured.

    They are ones if they were folded into the matrices or no norm comes before attention.

    Raises:
        InputError: The model has no such layer, or what its W_V reads is not known.
    """
    choose(model, heads=[(layer, 0)], axis="head")
    path = norm_before_attention(model, layer)
    norm = None if path is None else norm_at(model, path)
    like = next(iter(model.parameters()))
    return like.new_ones(int(model.cfg.d_model)) if norm is None else norm.weight.to(like.dtype)


def _block(model: HookedModel, layer: int) -> Any:
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None:
        raise InputError(f"{type(model).__name__} has no blocks to read value matrices from.")
    return blocks[layer]


def is_latent(model: HookedModel, layer: int) -> bool:
    """Return whether the values of a layer are made from a latent (DeepSeek)."""
    return f"blocks.{layer}.attn.kv_b_proj.hook_in" in model.hook_dict


def head_matrices(
    model: HookedModel, layer: int, name: Literal["V", "O"]
) -> tuple[Float[Tensor, "head rows columns"], Tensor | None]:
    """Return W_V or W_O of all heads of a layer, and b_V or b_O, as the layer computes with them.

    Linear modules that do more than multiply by their weight, such as those with an adapter
    (LoRA), are measured on unit vectors.

    Raises:
        InputError: The layer has no such matrix for each head, or it is not a linear map.
    """
    attn: Any = getattr(_block(model, layer), "attn", None)
    if is_latent(model, layer):
        heads, width = attn.original_component.num_heads, attn.original_component.v_head_dim
        if name == "O":
            weight, bias = _linear(attn.o, f"W_O of layer {layer}")
            return weight.reshape(heads, width, -1), bias
        weight, _ = _linear(attn.kv_b_proj, f"W_V of layer {layer}")  # [latent, head * (k + v)]
        return weight.unflatten(1, (heads, -1))[:, :, -width:].transpose(0, 1), None
    part = getattr(attn, name.lower(), None)
    module = getattr(part, "original_component", None)
    try:
        weights, bias = getattr(attn, f"W_{name}", None), getattr(attn, f"b_{name}", None)
    except ValueError:  # a layer whose heads have another width than the configuration says
        weights = bias = None
    if isinstance(module, torch.nn.Module) and (weights is None or not _is_plain(module)):
        flat, bias = _linear(part, f"W_{name} of layer {layer}")  # [in, out]
        shape = (-1, int(getattr(attn.original_component, "head_dim", model.cfg.d_head)))
        if name == "V":
            return flat.unflatten(1, shape).transpose(0, 1), bias
        return flat.unflatten(0, shape), bias
    if not isinstance(weights, Tensor) or weights.ndim != 3:
        raise InputError(
            f"layer {layer} of {model.cfg.model_name!r} has no attention with one W_{name} per "
            "head (it is a layer of another kind); value probes cannot act on it."
        )
    return weights.detach(), None if bias is None else bias.detach()


def _is_plain(module: torch.nn.Module) -> bool:
    """Return whether a module multiplies by its weight and does nothing else."""
    changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in (torch.nn.Linear, Conv1D) and not changed


def _linear(part: Any, name: str) -> tuple[Float[Tensor, "rows columns"], Tensor | None]:
    """Return matrix and bias of a linear module of a bridge, on row vectors."""
    module, weight = part.original_component, part.weight
    bias = getattr(module, "bias", None)
    if type(module) is torch.nn.Linear and _is_plain(module):
        return weight.detach().T, None if bias is None else bias.detach()
    with torch.no_grad():
        layers = [part for part in module.modules() if isinstance(part, (torch.nn.Linear, Conv1D))]
        width = next(
            (part.weight.shape[isinstance(part, torch.nn.Linear)] for part in layers), None
        )
        if width is None:
            raise InputError(f"{name} cannot be read: its {type(module).__name__} has no matrix.")
        rows = torch.eye(width, dtype=weight.dtype, device=weight.device)
        bias = module(torch.zeros_like(rows[:1]))[0]
        matrix = module(rows) - bias
        tried = torch.linspace(-1, 1, 3 * len(rows), device=rows.device).sin().reshape(3, -1)
        got = module(tried.to(rows)).float() - bias.float()
        if (got - tried @ matrix.float()).norm() > NEARLY * got.norm() + 1e-6:
            raise InputError(
                f"{name} cannot be read: its {type(module).__name__} is not a linear map."
            )
    return matrix, bias
