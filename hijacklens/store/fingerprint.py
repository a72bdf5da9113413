"""The fingerprint of a reading: everything besides its prefix that a log-probability depends on.

Stored readings are keyed by `Fingerprint.key`. It covers every weight, the configuration that says
what is computed with them (rotary base, windows, soft caps, ...), the tokenizer, the probes, the
spans that symbols mark, and the arithmetic: the dtype, and for float32 whether matrix products are
rounded below it (TF32) or autocast is on. It does not cover the name of the model, so a model that
was moved or renamed finds its readings. Nor does it cover device, batch size or attention kernel:
in float32 they change a reading by less than 1e-4 nats (contract 1), in bfloat16 and float16 by no
more than the rounding of the dtype.

Hooks that are not probes have no key, so nothing is stored while they are on the model.
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

from hijacklens.models.devices import arithmetic
from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.models.identity import ModelIdentity
from hijacklens.probe import Probe

BLOCK = 2**20
"""Number of 8-byte words of a weight that are summed at once (8 MiB)."""

WORD = 8
"""Bytes of a word."""

KEYED = (
    *("architecture", "parameters", "arithmetic", "weights", "configuration", "tokenizer"),
    *("probes", "spans"),
)
"""The fields that the key of a fingerprint covers, in the order in which they are hashed."""

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
class Fingerprint:
    """Which model, with which probes, in which arithmetic."""

    model: str
    """The name it was loaded by; for people, not part of the key."""
    revision: str | None
    """Not part of the key, since the weights are."""
    architecture: str
    parameters: int
    arithmetic: str
    """The dtype, and what lowers its precision: `float32`, `float32, matmul high`, ..."""
    weights: str
    """Checksum of every value of every parameter."""
    configuration: str
    """SHA-256 of the settings that determine the architecture's computation."""
    tokenizer: str
    """SHA-256, from `hijacklens.models.identity.identify`."""
    probes: tuple[str, ...]
    """Their keys, in order."""
    spans: tuple[str, ...]
    """The spans that the bits of a symbol mark."""
    versions: str
    """Versions of torch and TransformerLens at the first reading; not part of the key."""

    @property
    def key(self) -> str:
        """SHA-256 over everything that readings depend on."""
        parts = [getattr(self, name) for name in KEYED]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint_of(
    model: HookedModel,
    identity: ModelIdentity,
    *,
    probes: Sequence[Probe] = (),
    spans: Sequence[str] = (),
) -> Fingerprint:
    """Return the fingerprint of a model with its present weights and settings.

    Costs one pass over the weights, on their device.
    """
    return Fingerprint(
        model=identity.name,
        revision=identity.revision,
        architecture=identity.architecture,
        parameters=identity.parameters,
        arithmetic=arithmetic(identity.dtype, device_of(model)),
        weights=weights_checksum(model.named_parameters()),
        configuration=_configuration(model),
        tokenizer=identity.tokenizer_hash,
        probes=tuple(probe.key for probe in probes),
        spans=tuple(spans),
        versions=f"torch {torch.__version__}, "
        f"transformer-lens {metadata.version('transformer-lens')}",
    )


def weights_checksum(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return a checksum of every value of named parameters, the same on every device.

    Any change of one value changes it: in each block, every 64-bit word is multiplied by its own
    odd number before the words are added modulo 2^64.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        octets = parameter.detach().reshape(-1).view(torch.uint8)
        if octets.storage_offset() % WORD:
            octets = octets.clone()  # words must be aligned in memory
        in_words = len(octets) - len(octets) % WORD
        digest.update(bytes(octets[in_words:].tolist()))
        words = octets[:in_words].view(torch.int64)
        factors = _factors(words.device)
        sums = [(block * factors[: len(block)]).sum() for block in words.split(BLOCK)]
        digest.update(repr(torch.stack(sums).tolist()).encode())
    return digest.hexdigest()


@cache
def _factors(device: torch.device) -> Tensor:
    """Return an odd 64-bit number for each word of a block."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (BLOCK,), generator=generator)
    return (drawn | 1).to(device)


def _configuration(model: HookedModel) -> str:
    """Return a hash of the settings that determine the computation, without the model's name."""
    config: Any = getattr(getattr(model, "original_model", None), "config", model.cfg)
    fields = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    computed = {str(key): value for key, value in fields.items() if key not in _NOT_COMPUTED_WITH}
    return hashlib.sha256(json.dumps(computed, sort_keys=True, default=str).encode()).hexdigest()
