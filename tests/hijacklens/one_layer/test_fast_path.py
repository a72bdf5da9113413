"""The fast path: logits and hand-written gradients against autograd through the hooked model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hijacklens.one_layer.architecture import OneLayerConfig, OneLayerWeights
from hijacklens.one_layer.fast_path import (
    ContextBatch,
    log_counts,
    loss_and_gradients,
    table_orders,
)
from hijacklens.one_layer.model import OneLayerTransformer

ORDERS = {
    # (scores by table, values by table): vocab, batch, d_model
    (False, False): (32, 16, 8),
    (True, False): (16, 20, 2),
    (False, True): (16, 16, 64),
    (True, True): (8, 64, 8),
}


def models(count: int, vocab: int, d_model: int, *, d_attn: int = 5) -> list[OneLayerTransformer]:
    # A start of scale 1 makes attention sharp, so that no part of the gradient is negligible.
    return [
        OneLayerTransformer(
            OneLayerConfig(
                vocab=vocab,
                d_model=d_model,
                d_attn=d_attn,
                init_scale=0.6,
                dtype="float64",
                seed=seed,
            )
        )
        for seed in range(count)
    ]


def draw(vocab: int, batch: int, *, pos: int = 9, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (batch, pos), generator=generator)
    return tokens, torch.randint(vocab, (batch,), generator=generator)


def batch_of(tokens: torch.Tensor, labels: torch.Tensor, vocab: int) -> ContextBatch:
    return ContextBatch(log_counts(tokens, vocab, dtype=torch.float64), tokens[:, -1], labels)


def stacked(of: list[OneLayerTransformer]) -> OneLayerWeights:
    return OneLayerWeights.stack([model.weights() for model in of]).map(torch.detach)


def empty(like: OneLayerWeights) -> OneLayerWeights:
    return like.map(lambda weight: torch.full_like(weight, torch.nan))


def test_log_counts_by_hand() -> None:
    counts = log_counts(torch.tensor([[3, 1, 3, 0], [2, 2, 2, 2]]), 4)
    assert counts.exp().tolist() == [[1, 1, 0, pytest.approx(2)], [0, 0, pytest.approx(4), 0]]
    assert counts[0, 2] == -torch.inf


def test_each_order_of_the_products_is_covered() -> None:
    for orders, (vocab, batch, d_model) in ORDERS.items():
        assert table_orders(batch, vocab, d_model) == orders


@pytest.mark.parametrize("shape", ORDERS.values(), ids=str)
def test_gradients_equal_those_of_the_hooked_path(shape: tuple[int, int, int]) -> None:
    vocab, batch, d_model = shape
    runs = models(3, vocab, d_model)
    contexts = [draw(vocab, batch, seed=seed) for seed in range(3)]
    together = ContextBatch.stack([batch_of(*drawn, vocab) for drawn in contexts])
    weights = stacked(runs)
    gradients = empty(weights)
    losses = loss_and_gradients(together, weights, gradients)
    for i, (model, (tokens, labels)) in enumerate(zip(runs, contexts, strict=True)):
        logits = model(tokens)[:, -1]
        torch.testing.assert_close(model.last_logits(tokens), logits, atol=1e-12, rtol=0)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        assert float(losses[i]) == pytest.approx(loss.item(), abs=1e-12)
        head = model.attention
        expected = {
            "W_E": model.embed.W_E.grad,
            **{name: getattr(head, name).grad[0] for name in ("W_Q", "W_K", "W_V")},
        }
        for name, gradient in gradients.items():
            assert float(expected[name].abs().max()) > 1e-4  # there is something to compare
            torch.testing.assert_close(gradient[i], expected[name], atol=1e-12, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_any_shape_agrees_with_autograd_of_the_fast_path(
    vocab: int, batch: int, d_model: int, seed: int
) -> None:
    (model,) = models(1, vocab, d_model, d_attn=3)
    tokens, labels = draw(vocab, batch, pos=4, seed=seed)
    weights = stacked([model])
    gradients = empty(weights)
    loss = loss_and_gradients(
        ContextBatch.stack([batch_of(tokens, labels, vocab)]), weights, gradients
    )
    expected = torch.nn.functional.cross_entropy(model.last_logits(tokens), labels)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), abs=1e-11)
    torch.testing.assert_close(gradients.W_E[0], model.embed.W_E.grad, atol=1e-11, rtol=0)


@pytest.mark.parametrize("shape", ORDERS.values(), ids=str)
@pytest.mark.parametrize(
    "names", [("W_V",), ("W_E",), ("W_Q", "W_K"), ("W_E", "W_V")], ids="+".join
)
def test_only_the_wanted_gradients_are_written(
    shape: tuple[int, int, int], names: tuple[str, ...]
) -> None:
    vocab, batch, d_model = shape
    weights = stacked(models(2, vocab, d_model))
    together = ContextBatch.stack([batch_of(*draw(vocab, batch, seed=s), vocab) for s in range(2)])
    everything, some = empty(weights), empty(weights)
    loss_and_gradients(together, weights, everything)
    loss_and_gradients(together, weights, some, names=names)
    for name, gradient in some.items():
        if name in names:
            assert torch.equal(gradient, getattr(everything, name))
        else:
            assert gradient.isnan().all()


def test_weights_are_not_touched() -> None:
    weights = stacked(models(1, 8, 8))
    before = {name: weight.clone() for name, weight in weights.items()}
    together = ContextBatch.stack([batch_of(*draw(8, 64), 8)])
    counts = together.log_counts.clone()
    loss_and_gradients(together, weights, empty(weights))
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
    assert torch.equal(together.log_counts, counts)
