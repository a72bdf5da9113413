"""The fingerprint of a reading: everything besides its prefix that a log-probability depends on.

Stored readings are keyed by `Fingerprint.key`. It covers the values of all parameters, buffers and
other tensors, what the model computes with them (`hijacklens.models.computation`: classes and code,
settings, configurations, adapters), the tokenizer, the probes, the spans that symbols mark, and the
arithmetic: the dtype, and for float32 whether matrix products are rounded below it (TF32) or
autocast is on. It does not cover the name of the model, so a model that was moved or renamed finds
its readings. Nor does it cover device or batch size: in float32 they change a reading by less than
1e-4 nats (contract 1), in bfloat16 and float16 by no more than the rounding of the dtype.

Hooks and replaced methods have no key, so nothing is stored while they are on the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import torch

from hijacklens.models.computation import computation_of
from hijacklens.models.devices import arithmetic
from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.models.identity import ModelIdentity
from hijacklens.probe import Probe

KEYED = (
    *("architecture", "parameters", "arithmetic", "weights", "computation", "tokenizer"),
    *("probes", "spans"),
)
"""The fields that the key of a fingerprint covers, in the order in which they are hashed."""


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
    """SHA-256 of the values of all tensors."""
    computation: str
    """SHA-256 of what the model computes with them."""
    tokenizer: str
    """SHA-256, from `hijacklens.models.identity.identify`."""
    probes: tuple[str, ...]
    """Their keys, in order."""
    spans: tuple[str, ...]
    """The spans that the bits of a symbol mark."""
    versions: str
    """Versions of torch and TransformerLens at the first reading; not part of the key."""
    unkeyed: tuple[str, ...] = ()
    """What is on the model and has no key, a phrase each; nothing is stored if there is any."""

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
    """Return the fingerprint of a model with its present settings.

    Args:
        model: The model.
        identity: Its present identity, with the hash of its weights.
        probes: The probes that act on it.
        spans: The spans that they look up.
    """
    computation = computation_of(model)
    return Fingerprint(
        model=identity.name,
        revision=identity.revision,
        architecture=identity.architecture,
        parameters=identity.parameters,
        arithmetic=arithmetic(identity.dtype, device_of(model)),
        weights=identity.weights_hash,
        computation=computation.digest,
        tokenizer=identity.tokenizer_hash,
        probes=tuple(probe.key for probe in probes),
        spans=tuple(spans),
        versions=f"torch {torch.__version__}, "
        f"transformer-lens {metadata.version('transformer-lens')}",
        unkeyed=computation.unkeyed,
    )
