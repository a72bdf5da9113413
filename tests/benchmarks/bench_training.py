"""Training the one-layer model: the fast step against the hooked path, stacked against single runs.

    make bench          # or: python tests/benchmarks/bench_training.py

Every step draws its contexts, runs forward and backward and takes an AdamW step. The hooked path is
`OneLayerTransformer.forward` and autograd at all positions, the usual way to train TransformerLens
models. All are timed in turns in one process with one thread, and ratios are of medians. Under
pytest the file runs itself in a process without type checks, which would be timed too.

On a machine with a GPU it also prints the steps per second of 1 and of 64 runs for m = 8, 9, 10,
and the fraction of the memory bandwidth, which is measured with a copy on the same device.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.recipe import Recipe, Run
from hijacklens.one_layer.stacked_runs import StackedRuns, generator_for
from hijacklens.one_layer.task import ConceptTask

pytestmark = pytest.mark.benchmark
FOREVER = 10**6
SEEDS = 10


def runs_of(task: ConceptTask, d_model: int, seeds: int) -> list[Run]:
    return Recipe(d_model=d_model, seeds=seeds, learning_rates=(0.001,)).runs(task)


def autograd_step(run: Run, batch: int, *, hooked: bool) -> Callable[[], None]:
    """A step of torch.optim.AdamW on the model, through its hooks or through `last_logits`."""
    model = OneLayerTransformer(run.model)
    adamw = torch.optim.AdamW(model.parameters(), lr=run.lr, fused=True)
    draw = generator_for(0, "training", "cpu")

    def step() -> None:
        contexts = run.task.sample(batch, draw)
        logits = model(contexts.tokens)[:, -1] if hooked else model.last_logits(contexts.tokens)
        adamw.zero_grad()
        torch.nn.functional.cross_entropy(logits, contexts.labels).backward()
        adamw.step()

    return step


def in_turns(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each piece of work; they take turns, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def fast_against_hooked() -> None:
    task, batch, steps = ConceptTask(bits=8, length=64), 256, 20
    runs = runs_of(task, 256, 1)
    stacked = StackedRuns(runs, steps=FOREVER, batch=batch)
    works = {
        "hooked path, autograd": autograd_step(runs[0], batch, hooked=True),
        "token tables, autograd": autograd_step(runs[0], batch, hooked=False),
        "token tables, by hand": lambda: stacked.advance(steps),
    }
    medians = in_turns(works, rounds=9)
    medians["token tables, by hand"] /= steps
    print(f"\none step, V = d = 256, L = 64, batch {batch}, one run")
    for name, seconds in medians.items():
        ratio = medians["hooked path, autograd"] / seconds
        print(f"  {name:24}{1e3 * seconds:9.2f} ms {1 / seconds:9.1f} steps/s {ratio:7.1f}x")


def together_against_one_by_one() -> None:
    print(f"\n{SEEDS} stacked seeds against one after the other, batch 128, per step of all")
    print("   m    d    L   one by one    together   ratio")
    for bits, d_model, length in ((5, 16, 64), (6, 32, 256), (7, 64, 256), (8, 128, 256)):
        runs = runs_of(ConceptTask(bits=bits, length=length), d_model, SEEDS)
        stacked = StackedRuns(runs, steps=FOREVER)
        single = [StackedRuns([run], steps=FOREVER) for run in runs]
        steps = max(4, 2**9 >> bits)

        def one_by_one(single: list[StackedRuns] = single, steps: int = steps) -> None:
            for alone in single:
                alone.advance(steps)

        works = {"one": one_by_one, "all": lambda s=stacked, n=steps: s.advance(n)}
        one, both = (1e3 * median / steps for median in in_turns(works, rounds=7).values())
        print(f"  {bits:2} {d_model:4} {length:4} {one:9.2f} ms {both:8.2f} ms {one / both:6.2f}x")


def bytes_per_step(vocab: int, d_model: int, batch: int) -> int:
    """Bytes that one step of one run has to move in float32: every operand of every kernel once."""
    wide, narrow = batch * vocab, batch * d_model
    embedding, square = vocab * d_model, d_model * d_model
    products = 9 * (2 * narrow + square) + 9 * (narrow + embedding + wide)
    pointwise = 19 * wide  # two softmaxes, the counts, and what lies between them
    adamw = 7 * (embedding + 3 * square)  # reads weight, gradient, two moments; writes three
    return 4 * (products + pointwise + adamw)


def on_a_gpu() -> None:
    size = 2**30
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * size / in_turns({"copy": lambda: finished(target.copy_, source)}, 20)["copy"]
    del source, target
    print(f"\n{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    print("d = V / 2, L = 256, batch 128")
    print("   m  runs  steps/s  run-steps/s   TB/s  of the copy")
    for bits in (8, 9, 10):
        task = ConceptTask(bits=bits, length=256)
        d_model = task.vocab // 2
        for count in (1, 64):
            stacked = StackedRuns(runs_of(task, d_model, count), steps=FOREVER, device="cuda")
            works = {"steps": lambda s=stacked: finished(s.advance, 64)}
            seconds = in_turns(works, 5)["steps"] / 64
            moved = count * bytes_per_step(task.vocab, d_model, 128) / seconds
            print(
                f"  {bits:2} {count:5} {1 / seconds:8.1f} {count / seconds:12.1f} "
                f"{moved / 1e12:6.2f} {moved / bandwidth:12.0%}"
            )


def finished(work: Callable[..., object], *arguments: object) -> None:
    """Do some work on the GPU and wait for it."""
    work(*arguments)
    torch.cuda.synchronize()


def main() -> None:
    torch.set_num_threads(1)
    fast_against_hooked()
    together_against_one_by_one()
    if torch.cuda.is_available():
        on_a_gpu()


def test_training_speed() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, __file__], cwd=root, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()
