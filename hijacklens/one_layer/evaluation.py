"""Accuracy and loss on fresh contexts, of several ways to answer them, on the same contexts.

A way to answer is a function from tokens [batch, pos] to scores [batch, vocab]: a model, a model
with another W_V, or the exact posterior. Its answer is the highest score, ties split evenly; its
loss is the cross-entropy of the scores, in nats.

Cost: that of the functions, in blocks of 4,096 contexts.

>>> from hijacklens.one_layer.bayes import BayesRule
>>> from hijacklens.one_layer.task import ConceptTask
>>> task = ConceptTask(bits=3, length=64)
>>> draw = torch.Generator().manual_seed(0)
>>> evaluate({"bayes": BayesRule(task)}, task, draw, count=512)["bayes"].accuracy.value > 0.9
True
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hijacklens.errors import InputError
from hijacklens.one_layer.bayes import TIE_NATS, hits
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.spans import layout as context_layout
from hijacklens.one_layer.task import ConceptTask
from hijacklens.probe import Probe, check_probes, logits_at, spans_of
from hijacklens.statistics import Interval, share

BLOCK = 4096
"""Contexts scored at a time, which bounds the memory."""
HOOKED_BLOCK = 256
"""Contexts that go through hooks at a time: their patterns are [batch, pos, pos]."""

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Score:
    """How well one way of answering did."""

    accuracy: Interval
    """Share of right answers with its 95% Wilson interval; ties split evenly."""
    loss: float
    """Mean cross-entropy of the label, in nats."""


def evaluate(
    ways: Mapping[Name, Callable[[Tensor], Tensor]],
    task: ConceptTask,
    generator: torch.Generator,
    *,
    count: int,
) -> dict[Name, Score]:
    """Score every way of answering on the same fresh contexts.

    Args:
        ways: Name -> tokens [batch, pos] to scores [batch, vocab].
        task: What the contexts are drawn from.
        generator: Where they come from; the functions get them on its device.
        count: How many contexts.

    Raises:
        InputError: `count` is below 1.
    """
    if count < 1:
        raise InputError(f"evaluation is {count}; give at least 1 context to evaluate on.")
    right, loss = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for start in range(0, count, BLOCK):
        contexts = task.sample(min(BLOCK, count - start), generator)
        for name, scores_of in ways.items():
            with torch.no_grad():
                scores = scores_of(contexts.tokens)
            # The tolerance is for log posteriors, whose ties are sums in another order.
            right[name] += float(hits(scores, contexts.labels, tolerance=TIE_NATS).sum())
            loss[name] += float(cross_entropy(scores, contexts.labels, reduction="sum"))
    return {name: Score(interval(right[name], count), loss[name] / count) for name in ways}


def answers(
    model: OneLayerTransformer, task: ConceptTask, *, probes: Sequence[Probe] = ()
) -> Callable[[Tensor], Tensor]:
    """The way in which a model answers: tokens [batch, pos] to last-position logits, on the CPU.

    With probes it runs with hooks; without, through the tables of `last_logits`.
    """
    pointed = check_probes(probes)
    spans = spans_of(pointed)

    def scores(tokens: Tensor) -> Tensor:
        return model.last_logits(tokens.to(model.W_E.device)).cpu()

    def probed_scores(tokens: Tensor) -> Tensor:
        found = []
        for block in tokens.to(model.W_E.device).split(HOOKED_BLOCK):
            rows = torch.arange(len(block), device=block.device)
            last = torch.full_like(rows, block.shape[1] - 1)
            where = context_layout(task, block, spans=spans)
            found.append(logits_at(model, where, rows, last, probes=pointed).cpu())
        return torch.cat(found)

    return probed_scores if pointed else scores


def interval(right: float, count: int) -> Interval:
    """An accuracy with its interval, which is that of the nearest whole number of right answers."""
    ends = share(round(right), count)
    return Interval(right / count, ends.low, ends.high)
