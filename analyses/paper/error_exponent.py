"""Error exponents: how fast an error falls with the length of a context, in nats per token.

The logits of a model with uniform attention are means over the tokens of a context. So the label y
loses to y' if a sum of independent gains X is not above 0, where X is what a token adds to the
logit of y minus what it adds to the logit of y'. Chernoff's bound on this event (1952) holds at
every L: with the token distribution p of the task and pi, that of the last token,

    P(error)  <=  sum over y' of E_p[exp(-s X)]^(L-1) E_pi[exp(-s X)]

for any s > 0, chosen for each y'. We take the s that is best as L grows, so that the error falls at
least as fast as exp(-L I), with

    I(y')  =  -min_s log E_p[exp(-s X)]        and I the smallest of them.

Two numbers depend on the task alone. No rule has an exponent above the Chernoff information of the
two nearest labels. This is at most the Kullback-Leibler divergence between them, which the paper
uses in figure C.14 and which is infinite for omega = 1, since a label never occurs in its own
contexts but occurs in those of all other labels.
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
"""Upper end of the search for s, in units of 1 / (largest gain)."""


@dataclass(frozen=True, slots=True)
class ChernoffBound:
    """A bound on the error of a model at any L for label 0, and by symmetry for every label."""

    exponents: Float[Tensor, " other"]
    """I(y') for every other label, in nats per token; 0 if nothing bounds the error."""
    last: Float[Tensor, " other"]
    """log E_pi[exp(-s X)]: the contribution of the last token, which is never noise."""

    @property
    def exponent(self) -> float:
        """I, the smallest exponent over the other labels, which decides as L grows."""
        return float(self.exponents.min())

    def at(self, length: int) -> float:
        """Return the bound at context length L; above 1 it says nothing."""
        return float((self.last - (length - 1) * self.exponents).exp().sum())


def token_logits(model: OneLayerTransformer) -> Float[Tensor, "token label"]:
    """Return what one token adds to each logit under uniform attention (times L), in float64."""
    weights = model.weights()
    W_E, W_V = weights.W_E.detach().double(), weights.W_V.detach().double()
    return W_E @ W_V @ W_E.T


def chernoff_bound(task: ConceptTask, model: OneLayerTransformer) -> ChernoffBound:
    """Return Chernoff's bound on the error of a model with uniform attention; ties are errors.

    The task must treat all labels alike, as it does with any of the named supports.
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
    return ChernoffBound(*(torch.tensor(part, dtype=torch.float64) for part in (exponents, ends)))


def chernoff_information(task: ConceptTask) -> float:
    """Return max over s of -log sum_t p(t | y)^s p(t | y')^(1-s) for the two nearest labels.

    It is the exponent, in nats per token, of the best rule between two labels (Cover and Thomas
    2006, 11.9). Label 0 represents all labels.

    >>> task = ConceptTask(bits=1, omega=0.5)  # p(. | 0) = (1/4, 3/4) and p(. | 1) = (3/4, 1/4)
    >>> round(chernoff_information(task), 4), round(label_divergence(task), 4)
    (0.1438, 0.5493)
    """
    chance = task.token_distribution()
    information = []
    for other in range(1, task.vocab):
        shared = (chance[0] > 0) & (chance[other] > 0)
        first, second = chance[0, shared].log(), chance[other, shared].log()
        if not len(first):  # one token distinguishes them
            information.append(math.inf)
            continue

        def log_overlap(s: float, first: Tensor = first, second: Tensor = second) -> float:
            return float((s * first + (1 - s) * second).logsumexp(0))

        best: Any = minimize_scalar(log_overlap, bounds=(0.0, 1.0), method="bounded")
        information.append(-float(best.fun))
    return min(information)


def label_divergence(task: ConceptTask) -> float:
    """Return the smallest Kullback-Leibler divergence of p(. | y) from another p(. | y').

    It is in nats per token, and infinite if every other label lacks a token of y, as for omega = 1.
    Label 0 represents all labels.
    """
    chance = task.token_distribution()
    label = chance[0]
    # 0 log 0 is 0; log 0 of the other label is an infinite divergence.
    terms = torch.where(label > 0, label * (label.log() - chance[1:].log()), 0.0)
    return float(terms.sum(1).min())
