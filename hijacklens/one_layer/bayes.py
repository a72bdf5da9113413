"""The exact solution of the task: the posterior of the label, and the best accuracy there is.

Given a context x of the task, with a uniform prior over labels,

    log p(y | x)  =  sum_{l < L} log p(x_l | y)  +  log pi(x_L | y)  -  log p(x) + constant

in nats: the last token counts as informative, the others as noisy (reference page, 3.1 and 7.2).
Positions do not matter, so the sum is a product of token counts with the table of log p: batch V^2
operations on a matrix product, and O(batch V) memory, whatever L.

Ties. A prediction is the token of the largest score. Where several share it, `"split"` gives the
context 1/n of a hit if the label is one of the n (the expectation of a fair draw among them);
`"label"` gives it a whole hit, which is how Lemma 2 has to be read. Scores within `tolerance` of
the largest share it.

>>> import torch
>>> from hijacklens.one_layer.task import ConceptTask
>>> task = ConceptTask(bits=5, length=64)
>>> print(bayes_accuracy(task, contexts_count=4096, generator=torch.Generator().manual_seed(0)))
0.9... [0.9..., 0.9...]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.one_layer.task import ConceptTask, token_counts
from hijacklens.statistics import Interval, share

Ties = Literal["split", "label"]

CHUNK = 1 << 22
"""Largest number of entries of a [batch, vocab] or [batch, pos] tensor in an evaluation."""
TIE_NATS = 1e-9
"""Log posteriors this close are equal: they are sums of the same terms, in another order."""


class BayesRule:
    """The exact log posterior of a task as a function of tokens; holds its V x V tables.

    Args:
        task: The task that the contexts come from.
        device: Where its tables are kept, and the contexts have to be.
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
        """The log posterior in nats, float64; -inf for labels that cannot give the context.

        Raises:
            InputError: No label of the task can give one of the contexts.
        """
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


def log_posterior(
    task: ConceptTask, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch vocab"]:
    """The log posterior in nats for contexts of the task (not for mixed ones), in float64.

    For many batches make one `BayesRule` and call it.
    """
    return BayesRule(task, device=tokens.device)(tokens)


def hits(
    scores: Float[Tensor, "*axes batch vocab"],
    labels: Int[Tensor, "*axes batch"],
    *,
    ties: Ties = "split",
    tolerance: float = 0.0,
) -> Float[Tensor, "*axes batch"]:
    """Whether the label has the largest score: 1, 0, or a share of a tie; the sum counts them.

    Args:
        scores: Logits or any other scores.
        labels: What is right.
        ties: See the module.
        tolerance: How far below the largest score a token still ties with it.

    Returns:
        float64 in [0, 1]. A row with a NaN counts as wrong.
    """
    best = scores.amax(-1, keepdim=True) - tolerance
    tied = scores >= best
    hit = tied.gather(-1, labels[..., None])[..., 0].double()
    return hit if ties == "label" else hit / tied.sum(-1).clamp(min=1)


def accuracy(
    scores_of: Callable[[Tensor], Tensor],
    task: ConceptTask,
    *,
    contexts_count: int,
    generator: torch.Generator,
    ties: Ties = "split",
    tolerance: float = 0.0,
) -> Interval:
    """The share of fresh contexts on which the largest score is the label's.

    Contexts are drawn and scored in chunks, so that memory stays bounded (32 MiB per float64
    tensor). The same generator state gives the same contexts, whatever is scored.

    Args:
        scores_of: Tokens [batch, pos] -> scores [batch, vocab], e.g. last-position logits.
        task: What the contexts are drawn from.
        contexts_count: How many contexts.
        generator: Where they come from; `scores_of` gets them on its device.
        ties: See the module.
        tolerance: See `hits`.

    Returns:
        The share and its 95% Wilson interval.

    Raises:
        InputError: `contexts_count` is below 1.
    """
    if contexts_count < 1:
        raise InputError(f"contexts_count must be at least 1, got {contexts_count!r}.")
    chunk = max(1, CHUNK // max(task.vocab, task.length))
    correct = 0.0
    for start in range(0, contexts_count, chunk):
        contexts = task.sample(min(chunk, contexts_count - start), generator)
        with torch.no_grad():
            scores = scores_of(contexts.tokens)
        correct += float(hits(scores, contexts.labels, ties=ties, tolerance=tolerance).sum())
    # Shares of ties, added up, can pass the count by a rounding error.
    return share(min(correct, contexts_count), contexts_count)


def bayes_accuracy(
    task: ConceptTask, *, contexts_count: int, generator: torch.Generator
) -> Interval:
    """The accuracy of the Bayes rule, the best of any rule, with ties split evenly.

    Cost: contexts_count V^2 operations; 32 MiB per temporary at any size, plus tables of V^2.
    """
    rule = BayesRule(task, device=generator.device)
    return accuracy(
        rule, task, contexts_count=contexts_count, generator=generator, tolerance=TIE_NATS
    )
