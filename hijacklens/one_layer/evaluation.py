"""Answers to fresh contexts: the exact posterior, models, and how often either is right.

Given a context x of the task, with a uniform prior over labels,

    log p(y | x)  =  sum_{l < L} log p(x_l | y)  +  log pi(x_L | y)  -  log p(x) + constant

in nats: the last token counts as informative, the others as noisy (reference page, 3.1 and 7.2).
Positions do not matter, so the sum is a product of token counts with the table of log p: batch V^2
operations, O(batch V) memory for any L. No rule is right more often than the largest posterior.

The answer to a context is the token of the largest score; scores within `tolerance` of the largest,
by default within rounding of it, share it. Where n tokens tie, `"split"` gives the context 1/n of a
hit if the label is one of them (the expectation of a fair draw), and `"label"` a full hit, which is
the reading of Lemma 2.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from hijacklens.errors import InputError, whole_number
from hijacklens.models.exclusive import exclusive
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.spans import layout
from hijacklens.one_layer.task import ConceptTask, Contexts, check_tokens, token_counts
from hijacklens.probe import Probe, check_probes, logits_at, spans_of
from hijacklens.statistics import Interval, fraction

Ties = Literal["split", "label"]
Name = TypeVar("Name", bound=Hashable)

CHUNK = 1 << 22
"""Largest number of entries of a [batch, vocab] or [batch, pos] tensor in `accuracy`."""
BLOCK = 4096
"""Contexts that `evaluate` scores at a time, which bounds its device memory."""
HOOKED_BLOCK = 256
"""Contexts that go through hooks at a time: their patterns are [batch, pos, pos]."""
ROUNDING = 64
"""Scores that differ by so many roundings of the largest are equal. Log posteriors are sums of the
same terms in another order (up to 36 roundings), logits of constructed memories often tie (12)."""


class BayesRule:
    """The exact log posterior of a task as a function of tokens on `device`; V x V tables.

    With `accuracy` it is the best of any rule: `accuracy(rule, task, ...)`.
    """

    def __init__(self, task: ConceptTask, *, device: torch.device | str | None = None) -> None:
        self.task = task
        # [token, label], so that counts multiply from the left.
        noisy = task.token_distribution().T.contiguous().to(device)
        # Without noise some tokens are impossible; with it none is.
        self._impossible = (noisy == 0).double() if task.omega == 1 else None
        self._log_noisy = noisy.log().masked_fill(noisy == 0, 0.0)
        self._log_last = task.informative().T.contiguous().to(device).log()

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch vocab"]:
        """Return the log posterior in nats, float64; -inf for labels that cannot give the context.

        Raises:
            InputError: No label of the task can give one of the contexts, or a token is none of
                the task's.
        """
        check_tokens("Bayes rule", tokens, self.task.vocab)
        counts = token_counts(tokens[:, :-1], self.task.vocab, dtype=torch.float64)
        scores = counts @ self._log_noisy
        if self._impossible is not None:  # apart from the sum, since 0 * -inf is not 0
            scores.masked_fill_(counts @ self._impossible > 0, -torch.inf)
        scores += self._log_last[tokens[:, -1]]
        impossible = (scores == -torch.inf).all(1).nonzero().flatten()
        if len(impossible):
            raise InputError(
                f"context {int(impossible[0])} has probability 0 under every label of "
                f"{self.task!r}: its last token must be in the support of a label"
                f"{', and so must all its tokens, as omega is 1' if self.task.omega == 1 else ''}."
                " Was it drawn from another task, or mixed from two labels?"
            )
        return scores.log_softmax(1)


def hits(
    scores: Float[Tensor, "*axes batch vocab"],
    labels: Int[Tensor, "*axes batch"],
    *,
    ties: Ties = "split",
    tolerance: float | None = None,
) -> Float[Tensor, "*axes batch"]:
    """Return whether the label has the largest score: 1, 0, or a fraction for a tie, in float64.

    Scores up to `tolerance` below the largest tie with it, None for `rounding`; `ties` is explained
    in the module docstring. A row with a NaN counts as wrong.
    """
    within = rounding(scores) if tolerance is None else tolerance
    tied = scores >= scores.amax(-1, keepdim=True) - within
    hit = tied.gather(-1, labels[..., None])[..., 0].double()
    return hit if ties == "label" else hit / tied.sum(-1).clamp(min=1)


def rounding(scores: Float[Tensor, "*axes vocab"]) -> Float[Tensor, "*axes 1"]:
    """Return up to which difference the scores of a row are equal: `ROUNDING` of the largest."""
    size = scores.abs().masked_fill(~scores.isfinite(), 0).amax(-1, keepdim=True)
    return ROUNDING * torch.finfo(scores.dtype).eps * size


@torch.no_grad()
def accuracy(
    scores_of: Callable[[Tensor], Tensor],
    task: ConceptTask,
    *,
    contexts_count: int,
    generator: torch.Generator,
    ties: Ties = "split",
    tolerance: float | None = None,
) -> Interval:
    """Return the fraction of fresh contexts on which the largest score is the label's.

    Contexts are drawn and scored in chunks, so that memory stays bounded (32 MiB per float64
    tensor). The same generator state gives the same contexts, whatever is scored. The interval is
    the 95% Wilson interval.

    Args:
        scores_of: Tokens [batch, pos] on the generator's device -> scores [batch, vocab], e.g.
            last-position logits.
        task: The task that the contexts are drawn from.
        contexts_count: Number of contexts.
        generator: Source of the contexts.
        ties: See `hits`, as for `tolerance`.
        tolerance: In the unit of the scores.

    Raises:
        InputError: `contexts_count` is below 1.
    """
    whole_number("contexts_count", contexts_count, least=1)
    chunk = max(1, CHUNK // max(task.vocab, task.length))
    correct = 0.0
    for contexts in _fresh(task, generator, contexts_count, chunk):
        scores = scores_of(contexts.tokens)
        correct += float(hits(scores, contexts.labels, ties=ties, tolerance=tolerance).sum())
    # Fractions of ties, added up, can exceed the count by a rounding error.
    return fraction(min(correct, contexts_count), contexts_count)


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy and loss of one answerer."""

    accuracy: Interval
    """Fraction of right answers with its 95% Wilson interval; ties split evenly."""
    loss: float
    """Mean cross-entropy of the label, in nats."""


@torch.no_grad()
def evaluate(
    answerers: Mapping[Name, Callable[[Tensor], Tensor]],
    task: ConceptTask,
    generator: torch.Generator,
    *,
    count: int,
) -> dict[Name, Score]:
    """Score several answerers on the same fresh contexts.

    An answerer is a function from tokens [batch, pos] on the generator's device to scores
    [batch, vocab]: a model (see `answers`), or the exact posterior.

    Raises:
        InputError: `count` is below 1.
    """
    whole_number("evaluation", count, least=1)
    right, loss = dict.fromkeys(answerers, 0.0), dict.fromkeys(answerers, 0.0)
    for contexts in _fresh(task, generator, count, BLOCK):
        for name, scores_of in answerers.items():
            scores = scores_of(contexts.tokens)
            right[name] += float(hits(scores, contexts.labels).sum())
            loss[name] += float(cross_entropy(scores, contexts.labels, reduction="sum"))
    # The ends are those of the nearest whole number of right answers.
    return {
        name: Score(
            replace(fraction(round(right[name]), count), value=right[name] / count),
            loss[name] / count,
        )
        for name in answerers
    }


def answers(
    model: OneLayerTransformer, task: ConceptTask, *, probes: Sequence[Probe] = ()
) -> Callable[[Tensor], Tensor]:
    """Return the model's answerer: tokens [batch, pos] to last-position logits, on the CPU.

    With probes the model runs with hooks; without, through the tables of `last_logits`.
    """
    pointed = check_probes(probes)
    spans = spans_of(pointed)

    def scores(tokens: Tensor) -> Tensor:
        tokens = tokens.to(model.W_E.device)
        if not pointed:
            return model.last_logits(tokens).cpu()
        blocks = []
        with exclusive(model):
            for block in tokens.split(HOOKED_BLOCK):
                rows = torch.arange(len(block), device=block.device)
                last = torch.full_like(rows, block.shape[1] - 1)
                context_layout = layout(task, block, spans=spans)
                blocks.append(logits_at(model, context_layout, rows, last, probes=pointed).cpu())
        return torch.cat(blocks)

    return scores


def _fresh(
    task: ConceptTask, generator: torch.Generator, count: int, block: int
) -> Iterator[Contexts]:
    """Draw fresh contexts in blocks."""
    for start in range(0, count, block):
        yield task.sample(min(block, count - start), generator)
