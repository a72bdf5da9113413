"""Contexts per second of the sampler, against a Python loop over tokens and two torch functions.

    pytest -m benchmark -s tests/benchmarks/bench_sampler.py

All are timed in the same run, on one thread, best of some rounds: the ratios are the result.
"""

from __future__ import annotations

import random
import time
from bisect import bisect
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch

from hijacklens.one_layer.task import ConceptTask

pytestmark = pytest.mark.benchmark


def per_token_python(task: ConceptTask, batch: int) -> Callable[[], list[list[int]]]:
    """What one writes first: for each token flip a coin, then look pi or the noise up."""
    cumulative = [list(accumulate(row)) for row in task.informative().tolist()]
    draw = random.Random(0)

    def sample() -> list[list[int]]:
        contexts = []
        for _ in range(batch):
            row = cumulative[draw.randrange(task.vocab)]
            context = [
                bisect(row, draw.random())
                if draw.random() < task.omega
                else draw.randrange(task.vocab)
                for _ in range(task.length - 1)
            ]
            context.append(bisect(row, draw.random()))
            contexts.append(context)
        return contexts

    return sample


def multinomial(task: ConceptTask, batch: int) -> Callable[[], torch.Tensor]:
    p, generator = task.token_distribution().float(), torch.Generator().manual_seed(0)

    def sample() -> torch.Tensor:
        labels = torch.randint(task.vocab, (batch,), generator=generator)
        return torch.multinomial(p[labels], task.length, replacement=True, generator=generator)

    return sample


def inverse_cdf(task: ConceptTask, batch: int) -> Callable[[], torch.Tensor]:
    """One search for all tokens, by the symmetry of the support: token xor label."""
    cdf = task.token_distribution()[0].cumsum(0).float()
    generator = torch.Generator().manual_seed(0)

    def sample() -> torch.Tensor:
        labels = torch.randint(task.vocab, (batch, 1), generator=generator)
        uniform = torch.rand(batch, task.length, generator=generator)
        return torch.searchsorted(cdf, uniform) ^ labels

    return sample


def seconds(sample: Callable[[], object], *, least: float = 0.2, rounds: int = 5) -> float:
    """Best time of one call over some rounds of at least `least` seconds in all."""
    sample()
    start = time.perf_counter()
    sample()
    calls = max(1, int(least / rounds / (time.perf_counter() - start)))
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            sample()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [5, 8, 10])
@pytest.mark.parametrize(("batch", "length"), [(128, 256), (1024, 256)])
def test_sampler(bits, batch, length, one_thread):
    task = ConceptTask(bits=bits, length=length)
    rule = ConceptTask(bits=bits, length=length, support=lambda a, b: (a + b) % 3 != 0)
    generator = torch.Generator().manual_seed(0)
    ours = seconds(lambda: task.sample(batch, generator))
    print(f"\nV = {task.vocab}, L = {length}, batch {batch}")
    rows = {
        "hijacklens": ours,
        "hijacklens, a rule that is not symmetric": seconds(lambda: rule.sample(batch, generator)),
        "hijacklens, mixed": seconds(lambda: task.sample_mixed(batch, 0.3, generator)),
        "per-token Python": seconds(per_token_python(task, batch), rounds=2),
        "torch.multinomial": seconds(multinomial(task, batch)),
        "torch.searchsorted": seconds(inverse_cdf(task, batch)),
    }
    for name, took in rows.items():
        print(
            f"  {name:42s} {batch / took:12,.0f} contexts/s {took / batch / length * 1e9:8.1f} ns "
            f"per token   {took / ours:8.2f} x"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [8, 10])
def test_sampler_on_a_gpu(bits):
    task = ConceptTask(bits=bits)
    generator = torch.Generator("cuda").manual_seed(0)

    def sample() -> None:
        task.sample(65_536, generator)
        torch.cuda.synchronize()

    took = seconds(sample)
    # The last write alone: 8 bytes per token.
    print(
        f"\nV = {task.vocab}, L = 256, batch 65,536 on {torch.cuda.get_device_name()}: "
        f"{65_536 / took:,.0f} contexts/s, {65_536 * 256 * 8 / took / 1e9:,.0f} GB/s of tokens"
    )
