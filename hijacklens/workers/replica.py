"""A replica: a copy of a model in another process, and how that process loads it.

A hooked model cannot be sent to another process, so a `ModelLoader` is sent: the arguments of
`load_model`. Every replica loads the model by itself and describes it, down to a hash of all
weights.

>>> ModelLoader("gpt2", dtype="bfloat16")
ModelLoader(source='gpt2', dtype='bfloat16', device=None, devices=1, revision=None,
            trust_remote_code=False)
"""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from hijacklens.engine.engine import read
from hijacklens.engine.reading import Readings, ReadOptions, Requests
from hijacklens.errors import InputError
from hijacklens.files import expand_home
from hijacklens.models.hooked import HookedModel, device_of
from hijacklens.models.identity import ModelIdentity, identify
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import PACKAGED
from hijacklens.store.fingerprint import Fingerprint, fingerprint_of


@dataclass(frozen=True, slots=True)
class ModelLoader:
    """How a model is loaded: the arguments of `hijacklens.load_model`, which can be sent."""

    source: str
    """A packaged model's short name, a folder that every worker can read, or a hub id."""
    dtype: str = "float32"
    device: str | None = None
    """`cpu` or `cuda`; by default the GPU if the worker has one."""
    devices: int = 1
    """How many GPUs one copy of the model is spread over."""
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, model: HookedModel) -> ModelLoader:
        """Return how a model in this process was loaded.

        Raises:
            InputError: It was made in memory, not loaded from a name or folder.
        """
        config: Any = getattr(getattr(model, "original_model", None), "config", None)
        name, path = str(model.cfg.model_name), str(getattr(config, "_name_or_path", "") or "")
        packaged = name in PACKAGED
        if not (packaged or path):
            raise InputError(
                f"workers cannot load the model {name!r}: it was made in memory. Save it and its "
                "tokenizer with save_pretrained, and load that folder."
            )
        spread = set(getattr(getattr(model, "original_model", None), "hf_device_map", {}).values())
        local = packaged or Path(path).is_dir()
        return cls(
            source=name if packaged else path,
            dtype=str(next(iter(model.parameters())).dtype).removeprefix("torch."),
            device=None if len(spread) > 1 else device_of(model).type,
            devices=max(1, len(spread)),
            revision=None if local else getattr(config, "_commit_hash", None),
        )

    def sent(self) -> ModelLoader:
        """Return the same loader for any working directory."""
        folder = expand_home(self.source)
        if self.source in PACKAGED or not folder.is_dir():
            return self
        return replace(self, source=str(folder.resolve()))

    def load(self) -> TransformerBridge:
        """Load the model in this process, as `load_model` does."""
        arguments = asdict(self)
        return load_model(arguments.pop("source"), **arguments)


@dataclass(frozen=True, slots=True)
class Description:
    """What a replica reports about itself."""

    identity: ModelIdentity
    fingerprint: Fingerprint
    """Without probes."""
    tokenizer: Any
    node: str
    """The name of the machine."""


class Replica:
    """A model in a separate process."""

    def __init__(self, loader: ModelLoader, threads: int) -> None:
        """Load nothing yet: an error would end the process instead of being an answer."""
        self._loader = loader
        torch.set_num_threads(threads)

    def describe(self) -> Description:
        """Load the model and describe it, which costs one pass over its weights."""
        identity = identify(self._model)
        fingerprint = fingerprint_of(self._model, identity)
        return Description(identity, fingerprint, self._model.tokenizer, socket.gethostname())

    def read(self, options: ReadOptions, requests: Requests) -> Readings:
        """Read a part (`hijacklens.engine.engine.read`)."""
        return read(self._model, requests, options)

    @cached_property
    def _model(self) -> TransformerBridge:
        return self._loader.load()
