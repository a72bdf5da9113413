"""The identity of a language model, as results record it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hijacklens.models.computation import tensors_of
from hijacklens.models.hooked import HookedLanguageModel, device_of, require_text, vocabulary_of
from hijacklens.models.packaged import quiet_transformers

OWN_TOKENIZER = "_hijacklens_own_tokenizer"
"""Attribute of a bridge whose tokenizer keeps the defaults that it was given with."""
SAMPLE = "Do not think of Guam. Zürich is"

BLOCK = 2**25
"""Bytes of a tensor that are hashed at once."""


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
    """SHA-256 over the names, shapes and values of all tensors that the model computes with; in
    results of version 0.1.0, over up to 256 values of every parameter."""
    tokenizer_hash: str
    """SHA-256 of the tokenizer's vocabulary and of its tokens for a sample text."""
    adds_bos: bool
    """Whether prompts start with a beginning-of-sequence token."""
    context_length: int
    tokenizer_note: str = ""
    """How the tokenizer differs from the model's own; empty if it does not, or that is unknown."""
    vocabulary: int | None = None
    """Number of token ids that the model knows; None in results of version 0.1.0."""

    @property
    def title(self) -> str:
        """The name, with the dtype unless that is float32."""
        return self.name if self.dtype == "float32" else f"{self.name} ({self.dtype})"


def identify(model: HookedLanguageModel) -> ModelIdentity:
    """Identify a loaded model by the present values of its tensors.

    Raises:
        InputError: The model has no tokenizer.

    Note:
        Costs a hash of every tensor (`hash_of_tensors`).
    """
    require_text(model, operation="scoring facts")
    plain = getattr(model, "original_model", model)
    config = getattr(plain, "config", None)
    architectures = getattr(config, "architectures", None) or [type(plain).__name__]
    own = dict(_own_parameters(model))
    tokenizer = model.tokenizer
    sample = tokenizer(SAMPLE).input_ids
    vocabulary = sorted(tokenizer.get_vocab().items())
    return ModelIdentity(
        name=str(model.cfg.model_name),
        revision=getattr(config, "_commit_hash", None),
        architecture=architectures[0],
        parameters=sum(parameter.numel() for parameter in own.values()),
        dtype=str([*own.values()][-1].dtype).removeprefix("torch."),
        device=str(device_of(model)),
        weights_hash=hash_of_tensors(tensors_of(model)),
        tokenizer_hash=hashlib.sha256(repr((vocabulary, sample)).encode()).hexdigest(),
        adds_bos=bool(sample) and sample[0] == tokenizer.bos_token_id,
        context_length=int(model.cfg.n_ctx),
        vocabulary=vocabulary_of(model),
        tokenizer_note="" if vars(model).get(OWN_TOKENIZER) else _tokenizer_note(tokenizer, sample),
    )


def _tokenizer_note(tokenizer: Any, sample: Sequence[int]) -> str:
    """Compare the first token of a text with that of the model's own tokenizer, read again."""
    if not sample or sample[0] != tokenizer.bos_token_id:
        return ""
    try:
        with quiet_transformers():
            own = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
        if own(SAMPLE).input_ids[0] == sample[0]:
            return ""
    except Exception:  # a model in memory has no files; each library fails in its own way
        return ""
    return (
        "its tokenizer starts prompts with a BOS, which the model's own tokenizer does not by "
        "default; hl.load_model keeps that default"
    )


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, the same on every device.

    Note:
        Costs about 1 s per GB and core, on up to 8 cores. A tensor is hashed in blocks of 32 MiB,
        so at most that much is copied per core; a tensor that is not contiguous is copied.
    """
    parts: dict[tuple[Any, ...], list[Tensor]] = {}
    names: dict[str, tuple[Any, ...]] = {}
    for name, tensor in sorted(tensors.items()):
        same = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        names[name] = same = same if tensor.device.type != "meta" else (name,)
        if same not in parts:  # tied weights are hashed once
            parts[same] = _blocks(tensor)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing runs in parallel
        blocks = pool.map(_hash_of_block, (block for blocks in parts.values() for block in blocks))
        hashes = {same: [next(blocks) for _ in own] for same, own in parts.items()}
    digest = hashlib.sha256()
    for name, same in names.items():
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(b"".join(hashes[same]))
    return digest.hexdigest()


def _blocks(tensor: Tensor) -> list[Tensor]:
    """Return the bytes of a tensor in blocks; none if its values are not in memory."""
    if tensor.device.type == "meta":
        return []
    dense = tensor.detach().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # a single value may have any stride
    return list(flat.view(torch.uint8).split(BLOCK))


def _hash_of_block(block: Tensor) -> bytes:
    octets: Any = block.cpu().numpy()
    return hashlib.sha256(octets).digest()


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
