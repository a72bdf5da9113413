"""Contexts per second of the sampler, against a Python loop over tokens and two torch functions.

    pytest -m benchmark -s tests/benchmarks/bench_sampler.py

All are timed in the same run, on one thread, by medians: the ratios are the result.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from draws import seeded
from torch.utils.benchmark import Timer

from hijacklens.one_layer.task import ConceptTask

pytestmark = pytest.mark.benchmark


def per_token_python(task: ConceptTask, batch: int) -> Callable[[], list[list[int]]]:
    """The obvious sampler: for each token flip a coin, then look up pi or the noise."""
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
            contexts.append([*context, bisect(row, draw.random())])
        return contexts

    return sample


def multinomial(task: ConceptTask, batch: int) -> Callable[[], torch.Tensor]:
    p, draw = task.token_distribution().float(), seeded()

    def sample() -> torch.Tensor:
        labels = torch.randint(task.vocab, (batch,), generator=draw)
        return torch.multinomial(p[labels], task.length, replacement=True, generator=draw)

    return sample


def inverse_cdf(task: ConceptTask, batch: int) -> Callable[[], torch.Tensor]:
    """One search for all tokens, by the symmetry of the support: token xor label."""
    cdf, draw = task.token_distribution()[0].cumsum(0).float(), seeded()

    def sample() -> torch.Tensor:
        labels = torch.randint(task.vocab, (batch, 1), generator=draw)
        return torch.searchsorted(cdf, torch.rand(batch, task.length, generator=draw)) ^ labels

    return sample


def seconds(sample: Callable[[], object]) -> float:
    """Median seconds of one call, on one thread."""
    return Timer("sample()", globals={"sample": sample}).blocked_autorange().median


@pytest.mark.parametrize("bits", [5, 8, 10])
@pytest.mark.parametrize(("batch", "length"), [(128, 256), (1024, 256)])
def test_sampler(bits, batch, length):
    task = ConceptTask(bits=bits, length=length)
    rule = ConceptTask(bits=bits, length=length, support=lambda a, b: (a + b) % 3 != 0)
    draw = seeded()
    samplers = {
        "hijacklens": lambda: task.sample(batch, draw),
        "hijacklens, a rule that is not symmetric": lambda: rule.sample(batch, draw),
        "hijacklens, mixed": lambda: task.sample_mixed(batch, 0.3, draw),
        "per-token Python": per_token_python(task, batch),
        "torch.multinomial": multinomial(task, batch),
        "torch.searchsorted": inverse_cdf(task, batch),
    }
    print(f"\nV = {task.vocab}, L = {length}, batch {batch}")
    medians = {name: seconds(sample) for name, sample in samplers.items()}
    for name, median in medians.items():
        print(
            f"  {name:42s} {batch / median:12,.0f} contexts/s "
            f"{median / batch / length * 1e9:8.1f} ns per token   "
            f"{median / medians['hijacklens']:8.2f} x"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [8, 10])
def test_sampler_on_a_gpu(bits):
    task = ConceptTask(bits=bits)
    draw = torch.Generator("cuda").manual_seed(0)
    median = seconds(lambda: task.sample(65_536, draw))  # the timer synchronises
    # The last write alone: 8 bytes per token.
    print(
        f"\nV = {task.vocab}, L = 256, batch 65,536 on {torch.cuda.get_device_name()}: "
        f"{65_536 / median:,.0f} contexts/s, {65_536 * 256 * 8 / median / 1e9:,.0f} GB/s of tokens"
    )
