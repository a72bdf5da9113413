"""How fast an error falls with the length of a context: exponents, in nats per token.

The logits of a model with uniform attention are means over the tokens of a context, so the label y
loses to y' where a sum of independent gains X (what a token adds to the logit of y, less what it
adds to that of y') is not above 0. Chernoff's bound on that (1952) holds at every L: with the
token law p of the task and pi, that of the last token,

    P(error)  <=  sum over y' of E_p[exp(-s X)]^(L-1) E_pi[exp(-s X)]

for any s > 0 of each y'. We take the s that is best as L grows, so that the error falls at least
as exp(-L I), with

    I(y')  =  -min_s log E_p[exp(-s X)]        and I the least of them.

Two numbers of the task alone stand beside it. No rule has an exponent above the Chernoff
information of the nearest two labels; and that is at most the Kullback-Leibler divergence between
them, by which the paper argues in figure C.14, and which is infinite for omega = 1: a label never
stands in its own contexts, but in those of all others.

>>> from hijacklens.one_layer.task import ConceptTask
>>> task = ConceptTask(bits=1, omega=0.5)  # p(. | 0) = (1/4, 3/4) and p(. | 1) = (3/4, 1/4)
>>> round(label_divergence(task), 4), round(chernoff_information(task), 4)
(0.5493, 0.1438)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask

LARGEST_S = 60.0
"""Where the search for s ends, in units of 1 / (largest gain)."""


@dataclass(frozen=True, slots=True)
class ChernoffBound:
    """A bound on the error of a model at any L, for label 0: by symmetry the same for all."""

    exponents: Float[Tensor, " other"]
    """I(y') for every other label, in nats per token; 0 where nothing bounds the error."""
    last: Float[Tensor, " other"]
    """log E_pi[exp(-s X)]: the part of the last token, which is never noise."""

    @property
    def exponent(self) -> float:
        """I, the least over the other labels: what decides as L grows."""
        return float(self.exponents.min())

    def at(self, length: int) -> float:
        """The bound at context length L; above 1 it says nothing."""
        return float((self.last - (length - 1) * self.exponents).exp().sum())


def token_logits(model: OneLayerTransformer) -> Float[Tensor, "token label"]:
    """What one token adds to each logit under uniform attention (times L), in float64."""
    weights = model.weights()
    W_E, W_V = weights.W_E.detach().double(), weights.W_V.detach().double()
    return W_E @ W_V @ W_E.T


def chernoff_bound(task: ConceptTask, model: OneLayerTransformer) -> ChernoffBound:
    """Chernoff's bound on the error of a model with uniform attention, ties counted as errors.

    The task has to treat all labels alike, as it does with any of the named supports.
    """
    noisy, last = (law[0].log() for law in (task.token_distribution(), task.informative()))
    logits = token_logits(model)
    exponents, ends = [], []
    for other in range(1, task.vocab):
        gain = logits[:, 0] - logits[:, other]

        def log_moment(s: float, law: Tensor = noisy, gain: Tensor = gain) -> float:
            return float((law - s * gain).logsumexp(0))

        end = LARGEST_S / max(float(gain.abs().max()), 1e-300)
        best: Any = minimize_scalar(
            log_moment, bounds=(0.0, end), method="bounded", options={"xatol": 1e-8 * end}
        )
        s = best.x if best.fun < 0 else 0.0  # at s = 0 both parts are 0, a bound of 1
        exponents.append(-log_moment(s) if s else 0.0)
        ends.append(log_moment(s, last) if s else 0.0)
    return ChernoffBound(*(torch.tensor(found, dtype=torch.float64) for found in (exponents, ends)))


def chernoff_information(task: ConceptTask) -> float:
    """Max over s of -log sum_t p(t | y)^s p(t | y')^(1-s), in nats, for the nearest two labels.

    The exponent of the best rule between two labels (Cover and Thomas 2006, 11.9); label 0 stands
    for all.
    """
    chance = task.token_distribution()
    found = []
    for other in range(1, task.vocab):
        shared = (chance[0] > 0) & (chance[other] > 0)
        own, rival = chance[0, shared].log(), chance[other, shared].log()
        if not len(own):  # one token tells them apart
            found.append(math.inf)
            continue

        def log_overlap(s: float, own: Tensor = own, rival: Tensor = rival) -> float:
            return float((s * own + (1 - s) * rival).logsumexp(0))

        best: Any = minimize_scalar(log_overlap, bounds=(0.0, 1.0), method="bounded")
        found.append(-float(best.fun))
    return min(found)


def label_divergence(task: ConceptTask) -> float:
    """The least Kullback-Leibler divergence of p(. | y) from another p(. | y'), nats per token.

    Infinite where every other label lacks a token of y, as for omega = 1. Label 0 stands for all.
    """
    chance = task.token_distribution()
    own = chance[0]
    # 0 log 0 is 0; log 0 of the other label is an infinite divergence.
    terms = torch.where(own > 0, own * (own.log() - chance[1:].log()), 0.0)
    return float(terms.sum(1).min())
