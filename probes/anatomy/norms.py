"""Norms of a model, and the input of W_V that they make of a token.

What a norm does, and whether one lies between the residual stream and W_V, is measured: families
differ in names, offsets and places of norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.errors import InputError
from hijacklens.models.exclusive import made_for_run
from hijacklens.models.hooked import HookedModel, NamedHook, device_of, hooked, vocabulary_of

PROBE_SIZE = 16.0
"""Large enough that a norm's epsilon is negligible (1e-5 of 256), small enough for float16."""
NORM_AFTER = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
"""Architectures in whose HookedTransformer the first norm follows attention."""
INPUTS = ("v", "kv_a_proj_with_mqa")
"""Parts of attention that read what values are made of."""
SAME_SUM, SAME = 1e-3, 0.02
"""Largest relative difference of equal activations: of the same sum, and of different ones in
bfloat16."""
ROWS = 128
"""Tokens in a pass over embeddings."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm or RMS norm without its scale: `norm(x) = weight * (C x) / scale + bias`.

    C subtracts the mean for a layer norm and is the identity for an RMS norm.

    >>> norm = Norm(weight=torch.tensor([1.0, 2.0]), bias=torch.zeros(2), centred=True)
    >>> norm.pull(torch.tensor([[3.0, 2.0]]))     # (3, 4) without its mean
    tensor([[-0.5000,  0.5000]])
    """

    weight: Float[Tensor, " d_model"]
    """The effective weight: 1 + w for Gemma, ones if the weight is folded into the next matrix."""
    bias: Float[Tensor, " d_model"]
    centred: bool

    @classmethod
    def of(cls, module: Any, width: int, like: Tensor) -> Norm:
        """Measure what a norm module does by applying it to three vectors [1, 1, width].

        This works whatever the name, offset or folding of the weight. The vectors have the dtype of
        `like`, a tensor of the model.
        """
        device = next(iter(module.parameters()), like).device
        signs = torch.ones(width, dtype=like.dtype, device=device)
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

    def apply(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return `weight * (C x)`: the output times the scale, without the bias."""
        centred = x - x.mean(-1, keepdim=True) if self.centred else x
        return centred * self.weight.to(x.device)

    def pull(self, direction: Float[Tensor, "read d_model"]) -> Float[Tensor, "read d_model"]:
        """Map a direction on the output to the one on the input that reads the same times scale.

        The norm's bias is left out.
        """
        weighted = direction * self.weight.to(direction.device)
        return weighted - weighted.mean(-1, keepdim=True) if self.centred else weighted


def norm_at(model: HookedModel, path: str) -> Norm | None:
    """Measure the norm of a hooked model at a path; None if it has none there."""
    if not {f"{path}.hook_scale", f"{path}.hook_out"} & set(model.hook_dict):
        return None
    part, width = _part(model, path), int(model.cfg.d_model)
    like = next(iter(model.parameters())).new_empty(0, device=device_of(model))
    device = next(iter(part.parameters()), like).device
    row = torch.arange(1, width + 1, device=device).to(like.dtype)[None, None] / width
    with torch.inference_mode():
        if all(torch.equal(part(x), x) for x in (row, 2 * row)):
            return None  # the first norm of ModernBERT's decoder is the identity
    return Norm.of(part, width, like)


def norm_before_attention(model: HookedModel, layer: int) -> str | None:
    """Return the path of the norm between the residual stream and W_V, or None.

    Raises:
        InputError: W_V of the layer reads neither the stream nor one norm of it.

    Note:
        Costs a forward pass over eight tokens, once in a run.
    """
    path = f"blocks.{layer}.ln1"
    if not isinstance(model, TransformerBridge):
        after = getattr(model.cfg, "original_architecture", None) in NORM_AFTER
        return None if after or f"{path}.hook_scale" not in model.hook_dict else path
    made = made_for_run(model)
    if (seen := made.get("inputs of attention")) is None:
        seen = made["inputs of attention"] = _inputs(model)
    stream = seen.get(f"blocks.{layer}.hook_in")
    for part in INPUTS:
        x = seen.get(f"blocks.{layer}.attn.{part}.hook_in")
        if _same(x, stream):
            return None
        normed = _same(seen.get(f"{path}.hook_out"), x)
        if normed and _same(seen.get(f"{path}.hook_in"), stream):
            return path
    raise InputError(
        f"W_V of layer {layer} of {model.cfg.model_name!r} reads neither the residual stream nor a "
        "norm of it, as far as hooks show, so what it reads of a token is not known."
    )


def normed(model: HookedModel, layer: int, stream: Tensor) -> Float[Tensor, "token d_model"]:
    """Return what the attention of a layer is given if the residual stream is `stream`."""
    path = norm_before_attention(model, layer)
    if path is None:
        return stream.float()
    dtype = next(iter(model.parameters())).dtype
    with torch.no_grad():
        return _part(model, path)(stream.to(dtype)[None])[0].float()


def embedded(model: HookedModel, tokens: Sequence[int]) -> Float[Tensor, "token d_model"]:
    """Return the residual stream that tokens enter with, without their positions.

    It is read in a pass of the model, with all that the model does to its embeddings.

    Raises:
        InputError: Positions are not simply added.

    Note:
        Costs what the model computes before its first layer.
    """
    hooks = model.hook_dict
    start = "blocks.0.hook_in" if "blocks.0.hook_in" in hooks else "blocks.0.hook_resid_pre"
    if start not in hooks:
        raise InputError(f"no hook of {model.cfg.model_name!r} shows its residual stream.")
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        seen["embedded"] = value.detach().float()

    def without(value: Any, hook: Any) -> Tensor | None:
        return torch.zeros_like(value) if isinstance(value, Tensor) else None

    def stop(value: Tensor, hook: Any) -> None:
        seen["stream"] = value.detach().float()
        raise _Stopped

    named = (("hook_embed", keep), ("hook_pos_embed", without), (start, stop))
    wanted: list[NamedHook] = [(name, hook) for name, hook in named if name in hooks]
    found = []
    for at in range(0, len(tokens), ROWS):
        # Two positions of each token, and other tokens, tell what a position does.
        ids = [*tokens[at : at + ROWS], *some_tokens(model, 2)]
        rows = torch.tensor(ids, device=device_of(model))[:, None].expand(-1, 2)
        with torch.no_grad(), hooked(model, wanted), suppress(_Stopped):
            model(rows)
        stream, alone = seen["stream"], seen["embedded"]
        if not _same(stream[:, 1], stream[:, 0], up_to=SAME_SUM):
            added = stream - alone if stream.shape == alone.shape else stream
            if not _same(alone + added[:1], stream):
                raise InputError(
                    f"{model.cfg.model_name!r} does more with positions than to add them, so its "
                    "embeddings have no value without them."
                )
            stream = alone
        found.append(stream[: len(ids) - 2, 0])
    return torch.cat(found)


def some_tokens(model: HookedModel, count: int) -> list[int]:
    """Return token ids that are spread over the vocabulary."""
    size = vocabulary_of(model)
    return [i * size // count for i in range(count)]


class _Stopped(Exception):
    """Ends a pass early."""


def _inputs(model: HookedModel) -> dict[str, Tensor]:
    """Return what the hooks around the input of attention see, by name."""
    ends = ("hook_in", "ln1.hook_in", "ln1.hook_out", *(f"attn.{x}.hook_in" for x in INPUTS))
    names = {f"blocks.{i}.{end}" for i in range(int(model.cfg.n_layers)) for end in ends}
    seen: dict[str, Tensor] = {}

    def keep(value: Any, hook: Any) -> None:
        if isinstance(value, Tensor):
            seen[hook.name] = value.detach().float().cpu()

    row = torch.tensor([some_tokens(model, 8)], device=device_of(model))
    with torch.inference_mode(), hooked(model, [(n, keep) for n in names & set(model.hook_dict)]):
        model(row)
    return seen


def _same(got: Tensor | None, expected: Tensor | None, *, up_to: float = SAME) -> bool:
    if got is None or expected is None or got.numel() != expected.numel():
        return False
    return bool((got.reshape(expected.shape) - expected).norm() <= up_to * expected.norm())


def _part(model: HookedModel, path: str) -> Any:
    modules: Any = model
    return modules.get_submodule(path)
