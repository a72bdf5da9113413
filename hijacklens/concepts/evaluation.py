"""Accuracy and loss on fresh contexts, of several ways to answer them, on the same contexts.

A way to answer is a function from tokens [batch, pos] to scores [batch, vocab]: a model, a model
with another W_V, or the exact posterior. Its answer is the highest score, ties split evenly; its
loss is the cross-entropy of the scores, in nats.

Cost: that of the functions, in blocks of 4,096 contexts.

>>> from hijacklens.concepts.task import ConceptTask
>>> task = ConceptTask(bits=3, length=64)
>>> scores = evaluate(
...     {"bayes": partial(log_posterior, task)}, task, torch.Generator().manual_seed(0), count=512
... )
>>> scores["bayes"].accuracy.value > 0.9
True
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.concepts.task import ConceptTask
from hijacklens.errors import InputError
from hijacklens.statistics import Interval, share

BLOCK = 4096
"""Contexts scored at a time, which bounds the memory."""

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Score:
    """How well one way of answering did."""

    accuracy: Interval
    """Share of right answers with its 95% Wilson interval; ties split evenly."""
    loss: float
    """Mean cross-entropy of the label, in nats."""
