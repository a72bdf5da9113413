"""Attention probes on the one-layer model, with numbers worked out by hand, and its contexts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from hijacklens.one_layer import spans
from hijacklens.one_layer.architecture import OneLayerWeights
from hijacklens.one_layer.evaluation import answers
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.probe import logits_at, probed, spans_of
from probes import attention


@pytest.fixture(scope="module")
def counting() -> OneLayerTransformer:
    """Every token attends to tokens 0, 1 and 2 as 1 : 2 : 5; logits are the weights themselves."""
    keys = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    return OneLayerTransformer.from_weights(
        OneLayerWeights(W_E=torch.eye(3), W_Q=torch.ones(3, 1), W_K=keys, W_V=torch.eye(3))
    )


A = attention
BY_HAND = {
    "nothing": ([], [1 / 8, 2 / 8, 5 / 8]),
    "knock out": ([A.knock_out("last", "token:2")], [1 / 3, 2 / 3, 0]),
    "knock out after": ([A.knock_out("last", "token:2", when="after")], [1 / 3, 2 / 3, 0]),
    "knock out, not renormalised": (
        [A.knock_out("last", "token:2", when="after", renormalise=False)],
        [1 / 8, 2 / 8, 0],
    ),
    "knock out everything": ([A.knock_out("last", "all")], [0, 0, 0]),
    "knock out everything after": ([A.knock_out("last", "all", when="after")], [0, 0, 0]),
    "weights doubled": ([A.rescale(2, "last", "token:2")], [1 / 13, 2 / 13, 10 / 13]),
    "weights doubled, not renormalised": (
        [A.rescale(2, "last", "token:2", renormalise=False)],
        [1 / 8, 2 / 8, 10 / 8],
    ),
    "scores doubled": (
        [A.rescale(2, "last", "token:2", when="before")],
        [1 / 28, 2 / 28, 25 / 28],
    ),
    "scores to zero": ([A.rescale(0, "last", "all", when="before")], [1 / 3, 1 / 3, 1 / 3]),
    "weights to zero": ([A.rescale(0, "last", "all")], [0, 0, 0]),
    "redirect": ([A.redirect("last", "token:0+at:1")], [1 / 2, 1 / 2, 0]),
    "redirect in proportion": (
        [A.redirect("last", "token:0+at:1", split="proportional")],
        [1 / 3, 2 / 3, 0],
    ),
    "redirect to nothing": ([A.redirect("last", "token:9")], [1 / 8, 2 / 8, 5 / 8]),
    "other source": ([A.knock_out("context", "all")], [1 / 8, 2 / 8, 5 / 8]),
    "two knock-outs": (
        [A.knock_out("last", "token:2"), A.knock_out("last", "token:1")],
        [1, 0, 0],
    ),
    "all keys in two steps": (
        [A.knock_out("last", "context"), A.knock_out("last", "token:2", when="after")],
        [0, 0, 0],
    ),
    "knock out, then rescale": (
        [A.knock_out("last", "token:2"), A.rescale(2, "last", "token:1")],
        [1 / 5, 4 / 5, 0],
    ),
    "scores doubled twice": (
        [A.rescale(2, "last", "token:1", when="before")] * 2,
        [1 / 22, 16 / 22, 5 / 22],
    ),
    "redirect, then knock out": (
        [A.redirect("last", "token:1+token:2"), A.knock_out("last", "token:2")],
        [0, 1, 0],
    ),
    "redirect, then rescale": (
        [A.redirect("last", "token:1+token:2"), A.rescale(3, "last", "token:2")],
        [0, 1 / 4, 3 / 4],
    ),
    "rescale, then redirect": (
        [A.rescale(3, "last", "token:2"), A.redirect("last", "token:1+token:2")],
        [0, 1 / 2, 1 / 2],
    ),
    "knock out, then redirect there": (
        [A.knock_out("last", "token:2"), A.redirect("last", "token:1+token:2")],
        [0, 1, 0],
    ),
    "half of what is knocked out": (
        [
            A.rescale(0.5, "last", "token:2", renormalise=False),
            A.knock_out("last", "token:1", when="after"),
        ],
        [1 / 8 / (3.5 / 8) * (5.5 / 8), 0, 2.5 / 8 / (3.5 / 8) * (5.5 / 8)],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_numbers_by_hand(counting, name):
    probes, expected = BY_HAND[name]
    task = ConceptTask(bits=2, length=3)
    layout = spans.layout(task, torch.tensor([[0, 1, 2]]), spans=spans_of(probes))
    (logits,) = logits_at(counting, layout, torch.tensor([0]), torch.tensor([2]), probes=probes)
    assert_close(logits, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def task() -> ConceptTask:
    return ConceptTask(bits=3, support="first-bit", length=12)


@pytest.fixture(scope="module")
def contexts(task):
    return task.sample(64, torch.Generator().manual_seed(0)).tokens


@pytest.fixture(scope="module")
def random_model(task) -> OneLayerTransformer:
    return OneLayerTransformer.from_weights(random_weights(task.vocab, torch.float32))


def random_weights(vocab: int, dtype: torch.dtype) -> OneLayerWeights:
    draw = torch.Generator().manual_seed(1)
    names = {"W_E": vocab, "W_Q": 6, "W_K": 6, "W_V": 6}
    return OneLayerWeights(
        **{
            name: torch.randn(rows, 6, generator=draw, dtype=torch.float64).to(dtype)
            for name, rows in names.items()
        }
    )


def read_out(model, weights, tokens):
    """Last-position logits when the last token attends with these weights [batch, key]."""
    matrices = model.weights()
    values = matrices.W_E[tokens] @ matrices.W_V
    return torch.einsum("bk,bkd->bd", weights, values) @ matrices.W_E.T


def test_knocking_out_the_cluster(task, contexts, random_model):
    matrices = random_model.weights()
    embedded = matrices.W_E[contexts]
    query, keys = embedded[:, -1] @ matrices.W_Q, embedded @ matrices.W_K
    scores = torch.einsum("be,bke->bk", query, keys) / matrices.W_Q.shape[1] ** 0.5
    cluster = (contexts >> (task.bits - 1)) == (contexts[:, -1:] >> (task.bits - 1))
    assert 0.2 < float(cluster.float().mean()) < 0.9
    weights = scores.masked_fill(cluster, -torch.inf).softmax(-1)
    weights = weights.nan_to_num(0.0)  # contexts of the last token's cluster alone
    got = answers(random_model, task, probes=[attention.knock_out("last", "cluster")])(contexts)
    assert_close(got, read_out(random_model, weights, contexts).detach(), atol=1e-5, rtol=0)


def test_redirecting_attention_to_the_cluster(task, contexts, random_model):
    cluster = spans.clusters(task)[contexts[:, -1:], contexts].float()
    weights = cluster / cluster.sum(1, keepdim=True)
    got = answers(random_model, task, probes=[attention.redirect("last", "cluster")])(contexts)
    assert_close(got, read_out(random_model, weights, contexts).detach(), atol=1e-5, rtol=0)


def test_float64_stays_float64(task, contexts):
    model = OneLayerTransformer.from_weights(random_weights(task.vocab, torch.float64))
    layout = spans.layout(task, contexts)
    probe = attention.rescale(0.3, "last", "cluster")
    with torch.no_grad():
        _, bare = model.run_with_cache(layout.tokens)
        with probed(model, [probe], layout):
            _, cache = model.run_with_cache(layout.tokens)
    old = bare["pattern", 0][:, 0, -1]
    new = torch.where(layout.key("cluster"), 0.3 * old, old)
    new = new / new.sum(-1, keepdim=True)
    assert_close(cache["pattern", 0][:, 0, -1], new, atol=1e-14, rtol=0)


def test_gradients_pass_through(counting):
    layout = spans.layout(ConceptTask(bits=2, length=3), torch.tensor([[0, 1, 2]]))
    with probed(counting, [attention.knock_out("last", "token:2")], layout):
        counting(layout.tokens)[0, -1, 1].backward()
    slope = counting.attention.W_K.grad
    counting.zero_grad()
    # d(2/3)/d(score 1) = 2/3 (1 - 2/3), and the score of token 2 has no say.
    assert_close(slope[0, :, 0], torch.tensor([-2 / 9, 2 / 9, 0.0]), atol=1e-6, rtol=0)
