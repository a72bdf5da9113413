"""The source of a reading: all that a stored log-probability depends on beside its prefix.

Stored readings go by `Source.key`. Into it go every weight, the configuration that says what is
computed with them (rotary base, windows, soft caps, ...), the tokenizer, the probes and the spans
that symbols mark, and the arithmetic: the dtype, and for float32 whether matrix products are
rounded below it (TF32) or autocast is on. The name of the model does not, so a model that was
moved or renamed finds its readings. Neither do device, batch size and attention kernel: in
float32 they change a reading by less than 1e-4 nats (contract 1), in bfloat16 and float16 by no
more than the dtype rounds.

Hooks that someone else has put on the model cannot be named, so nothing is stored under them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.models.identity import ModelIdentity
from hijacklens.probe import Probe

BLOCK = 2**20
"""Words of a weight that are summed at once: 8 MiB."""

WORD = 8
"""Bytes of a word."""

_NOT_COMPUTED_WITH = {
    "_commit_hash",
    "_name_or_path",
    "device",
    "dtype",
    "model_name",
    "tokenizer_name",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Which model said something, with what on it, in which arithmetic."""

    model: str
    """The name it was loaded by; for people, not part of the key."""
    revision: str | None
    """Not part of the key: the weights are."""
    architecture: str
    parameters: int
    arithmetic: str
    """The dtype, and what lowers it: `float32`, `float32, matmul high`, ..."""
    weights: str
    """Checksum of every value of every parameter."""
    configuration: str
    """SHA-256 of what the architecture is configured to compute."""
    tokenizer: str
    """SHA-256, as `hijacklens.models.identity.identify` gives it."""
    probes: tuple[str, ...]
    """Their keys, in their order."""
    spans: tuple[str, ...]
    """What the bits of a symbol stand for."""
    versions: str
    """Of torch and TransformerLens, at the first reading; not part of the key."""

    @property
    def key(self) -> str:
        """SHA-256 over all that readings depend on."""
        parts = (
            self.architecture,
            self.parameters,
            self.arithmetic,
            self.weights,
            self.configuration,
            self.tokenizer,
            self.probes,
            self.spans,
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def source_of(
    model: HookedModel,
    identity: ModelIdentity,
    *,
    probes: Sequence[Probe] = (),
    spans: Sequence[str] = (),
) -> Source:
    """The source that a model is now, with its present weights and settings.

    Args:
        model: A hooked model.
        identity: As `hijacklens.models.identity.identify` gives it.
        probes: Those the model will be run with, in their order.
        spans: The spans that symbols mark.

    Note:
        Costs one pass over the weights, on their device.
    """
    return Source(
        model=identity.name,
        revision=identity.revision,
        architecture=identity.architecture,
        parameters=identity.parameters,
        arithmetic=_arithmetic(identity.dtype, device_of(model)),
        weights=weights_checksum(model.named_parameters()),
        configuration=_configuration(model),
        tokenizer=identity.tokenizer_hash,
        probes=tuple(probe.key for probe in probes),
        spans=tuple(spans),
        versions=_versions(),
    )


def weights_checksum(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A checksum of every value of named parameters; equal ones on any device have the same.

    A change of one value always shows: words of 64 bits are multiplied by an odd number of their
    own and added up modulo 2^64, block by block.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        octets = parameter.detach().reshape(-1).view(torch.uint8)
        if octets.storage_offset() % WORD:
            octets = octets.clone()  # a word has to start where one can
        whole = len(octets) - len(octets) % WORD
        digest.update(bytes(octets[whole:].tolist()))
        words = octets[:whole].view(torch.int64)
        factors = _factors(words.device)
        sums = [(block * factors[: len(block)]).sum() for block in words.split(BLOCK)]
        digest.update(repr(torch.stack(sums).tolist()).encode())
    return digest.hexdigest()


@cache
def _factors(device: torch.device) -> Tensor:
    """An odd 64-bit number for each place of a block."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (BLOCK,), generator=generator)
    return (drawn | 1).to(device)


def _configuration(model: HookedModel) -> str:
    """A hash of what the model is configured to compute, whatever it is called."""
    config: Any = getattr(getattr(model, "original_model", None), "config", model.cfg)
    fields = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    kept = {str(key): value for key, value in fields.items() if key not in _NOT_COMPUTED_WITH}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _arithmetic(dtype: str, device: torch.device) -> str:
    notes = [dtype]
    precision = _matmul_precision(device)
    if precision != "highest":
        notes.append(f"matmul {precision}")
    if torch.is_autocast_enabled(device.type):
        lower = torch.get_autocast_dtype(device.type)
        notes.append(f"autocast {str(lower).removeprefix('torch.')}")
    return ", ".join(notes)


def _matmul_precision(device: torch.device) -> str:
    """How float32 matrix products are rounded: `highest`, or what was set in its place."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the names that torch 2.9 brought, which do not mix with this one
        backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        precision = str(backend.matmul.fp32_precision)
        return "highest" if precision in ("none", "ieee") else precision


def _versions() -> str:
    return f"torch {torch.__version__}, transformer-lens {metadata.version('transformer-lens')}"
