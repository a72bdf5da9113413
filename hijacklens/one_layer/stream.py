"""The contexts that a training run sees, from its seed alone.

Contexts are drawn for up to `CYCLE` steps at a time, since a call costs as much as a small batch.

>>> task = ConceptTask(bits=3, length=16)
>>> stream = Stream(task, seed=0, batch=4, dtype="float32", device=torch.device("cpu"))
>>> tuple(stream.step().log_counts.shape)
(4, 8)
"""

from __future__ import annotations

import numpy as np
import torch

from hijacklens.one_layer.architecture import DTYPES
from hijacklens.one_layer.fast_path import Batch
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.token_tables import log_counts

CYCLE = 64
"""Most steps that a stream draws ahead. All streams are empty after each multiple of it, so that a
sweep can be saved and continued there."""


def generator_for(seed: int, purpose: str, device: torch.device | str) -> torch.Generator:
    """The generator of a run's contexts, for `"training"` or `"evaluation"`: never the same."""
    branch = {"training": 1, "evaluation": 2}[purpose]
    state = int(np.random.SeedSequence([seed, branch]).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)


class Stream:
    """The training contexts of one task and seed, step after step."""

    def __init__(
        self, task: ConceptTask, seed: int, *, batch: int, dtype: str, device: torch.device
    ) -> None:
        self.task, self.batch = task, batch
        self.dtype = DTYPES[dtype]
        self.generator = generator_for(seed, "training", device)
        # Long enough that calls cost little beside their work, short enough to stay in the cache.
        budget = 2**16 if device.type == "cpu" else 2**19
        steps = max(1, min(CYCLE, budget // (batch * max(task.length, task.vocab))))
        self.ahead = 1 << (steps.bit_length() - 1)  # a power of two: it divides the cycle
        self._left: list[Batch] = []

    def step(self) -> Batch:
        """The next batch, without the axis `run`."""
        if not self._left:
            contexts = self.task.sample(self.ahead * self.batch, self.generator)
            counts = log_counts(contexts.tokens, self.task.vocab, dtype=self.dtype)
            last = contexts.tokens[:, -1]
            split = zip(
                counts.split(self.batch),
                last.split(self.batch),
                contexts.labels.split(self.batch),
                strict=True,
            )
            self._left = [Batch(*parts) for parts in split][::-1]
        return self._left.pop()
