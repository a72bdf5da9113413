"""The identity of a language model, as results record it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hijacklens.models.hooked import HookedLanguageModel, device_of, require_text


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What a result records about a model: enough to distinguish two models."""

    name: str
    revision: str | None
    """Commit of a hub model, or version and file hash of a packaged one; None if unknown."""
    architecture: str
    parameters: int
    dtype: str
    device: str
    weights_hash: str
    """SHA-256 over the names, shapes and up to 256 evenly spaced values of every parameter."""
    tokenizer_hash: str
    """SHA-256 of the tokenizer's vocabulary and of its tokens for a sample text."""
    adds_bos: bool
    """Whether prompts start with a beginning-of-sequence token."""
    context_length: int


def identify(model: HookedLanguageModel) -> ModelIdentity:
    """Identify a loaded model by a few values of each parameter.

    Raises:
        InputError: The model has no tokenizer.
    """
    require_text(model, operation="scoring facts")
    plain = getattr(model, "original_model", model)
    config = getattr(plain, "config", None)
    architectures = getattr(config, "architectures", None) or [type(plain).__name__]
    digest, count, dtype = hashlib.sha256(), 0, "float32"
    for label, parameter in _own_parameters(model):
        flat = parameter.detach().reshape(-1)
        positions = torch.linspace(0, flat.numel() - 1, min(256, flat.numel()), dtype=torch.float64)
        values = flat[positions.round().long().to(flat.device)]
        digest.update(f"{label} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.float().cpu().numpy().tobytes())
        count += flat.numel()
        dtype = str(parameter.dtype).removeprefix("torch.")
    tokenizer = model.tokenizer
    sample = tokenizer("Do not think of Guam. Zürich is").input_ids
    vocabulary = sorted(tokenizer.get_vocab().items())
    return ModelIdentity(
        name=str(model.cfg.model_name),
        revision=getattr(config, "_commit_hash", None),
        architecture=architectures[0],
        parameters=count,
        dtype=dtype,
        device=str(device_of(model)),
        weights_hash=digest.hexdigest(),
        tokenizer_hash=hashlib.sha256(repr((vocabulary, sample)).encode()).hexdigest(),
        adds_bos=bool(sample) and sample[0] == tokenizer.bos_token_id,
        context_length=int(model.cfg.n_ctx),
    )


def _own_parameters(model: HookedLanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the parameters of the model, without those that TransformerLens adds.

    The bridge adds copies `q`, `k` and `v` to a fused `qkv`, and in
    TransformerLens 3.9 a bias of zeros to every unembedding.
    """
    named = {
        name.replace("._original_component", ""): parameter
        for name, parameter in model.named_parameters()
    }
    for name, parameter in named.items():
        split = re.fullmatch(r"(.*\.)[qkv](\.\w+)", name)
        if split and f"{split[1]}qkv{split[2]}" in named:
            continue
        if name == "lm_head.bias" and not parameter.any():
            continue
        yield name, parameter
