"""Training the one-layer model: the fast step against the hooked path, sweeps against single runs.

    make bench          # or: python tests/benchmarks/bench_training.py

Every step draws its contexts, runs forward and backward and takes an AdamW step. The hooked path is
`OneLayerTransformer.forward` and autograd, all positions, as TransformerLens models are trained; it
and the others are timed in turns in one process with one thread, and ratios are of medians. Under
pytest the file runs itself without the type checks, which would be timed too.

With a GPU at hand it also prints steps per second of 1 and of 64 runs for m = 8, 9, 10, with the
share of the memory bandwidth that was measured with a copy on the same device.
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

from hijacklens.one_layer.architecture import OneLayerConfig
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.recipe import Run
from hijacklens.one_layer.stacked_runs import StackedRuns, generator_for
from hijacklens.one_layer.task import ConceptTask

pytestmark = pytest.mark.benchmark
FOREVER = 10**6
SEEDS = 10


def run_of(task: ConceptTask, d_model: int, seed: int) -> Run:
    shape = {"vocab": task.vocab, "d_model": d_model, "length": task.length}
    return Run(task=task, model=OneLayerConfig(**shape, seed=seed), lr=0.001)


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
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def fast_against_hooked() -> None:
    task, batch, many = ConceptTask(bits=8, length=64), 256, 20
    run = run_of(task, 256, 0)
    sweep = StackedRuns([run], steps=FOREVER, batch=batch)
    works = {
        "hooked path, autograd": autograd_step(run, batch, hooked=True),
        "token tables, autograd": autograd_step(run, batch, hooked=False),
        "token tables, by hand": lambda: sweep.advance(many),
    }
    taken = in_turns(works, rounds=9)
    taken["token tables, by hand"] /= many
    print(f"\none step, V = d = 256, L = 64, batch {batch}, one run")
    for name, seconds in taken.items():
        ratio = taken["hooked path, autograd"] / seconds
        print(f"  {name:24}{1e3 * seconds:9.2f} ms {1 / seconds:9.1f} steps/s {ratio:7.1f}x")


def together_against_one_by_one() -> None:
    print(f"\n{SEEDS} seeds in one sweep against one after the other, batch 128, per step of all")
    print("   m    d    L   one by one    together   ratio")
    for bits, d_model, length in ((5, 16, 64), (6, 32, 256), (7, 64, 256), (8, 128, 256)):
        task = ConceptTask(bits=bits, length=length)
        runs = [run_of(task, d_model, seed) for seed in range(SEEDS)]
        sweep, single = (
            StackedRuns(runs, steps=FOREVER),
            [StackedRuns([run], steps=FOREVER) for run in runs],
        )
        many = max(4, 2**9 >> bits)

        def one_by_one(sweeps: list[StackedRuns] = single, steps: int = many) -> None:
            for alone in sweeps:
                alone.advance(steps)

        works = {"one": one_by_one, "all": lambda s=sweep, n=many: s.advance(n)}
        taken = in_turns(works, rounds=7)
        one, both = (1e3 * taken[name] / many for name in ("one", "all"))
        print(f"  {bits:2} {d_model:4} {length:4} {one:9.2f} ms {both:8.2f} ms {one / both:6.2f}x")


def bytes_per_step(task: ConceptTask, d_model: int, batch: int) -> int:
    """Bytes that one step of one run has to move in float32: every operand of every kernel once."""
    wide, narrow = batch * task.vocab, batch * d_model
    embedding, square = task.vocab * d_model, d_model * d_model
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
            runs = [run_of(task, d_model, seed) for seed in range(count)]
            sweep = StackedRuns(runs, steps=FOREVER, device="cuda")
            taken = in_turns({"step": lambda s=sweep: finished(s.advance, 64)}, 5)["step"] / 64
            moved = count * bytes_per_step(task, d_model, 128) / taken
            print(
                f"  {bits:2} {count:5} {1 / taken:8.1f} {count / taken:12.1f} {moved / 1e12:6.2f} "
                f"{moved / bandwidth:12.0%}"
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
