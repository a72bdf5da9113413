"""What a score costs with a probe on, against the same score without: ratios in one run.

    make bench          # or: pytest -s -m benchmark tests/benchmarks/bench_probes.py

One process with one thread scores the same atlas facts on a packaged model, plainly and under each
probe in turn, several rounds; CPU seconds, medians of the rounds. HIJACKLENS_BENCH_FACTS sets the
number of facts (20).

A second benchmark compares forward passes with hooks in four layers: the other layers as plain
modules, as the engine runs them, and with hook points.
"""

from __future__ import annotations

import os
import statistics
import time

import pytest
import torch

import hijacklens as hl
from hijacklens.models.agreement import plain_blocks_of
from hijacklens.models.packaged import PACKAGED
from hijacklens.models.unhooked import NO_PLAIN_BLOCKS
from hijacklens.probe import HookProbe, logits_at
from hijacklens.prompts.layout import Layout
from probes import specification

pytestmark = pytest.mark.benchmark
ROUNDS = 3
PROBES = (
    "none",
    "knock-out:source=last,target=hijack",
    "knock-out:source=last,target=hijack,layers=8-11",
    "low-rank-value:rank=8",
    "ablate:heads=1.0+2.0,kind=zero",
)


@pytest.mark.parametrize("name", PACKAGED)
def test_cost_of_a_probe(name):
    facts = hl.atlas().sample(int(os.environ.get("HIJACKLENS_BENCH_FACTS", "20")), seed=0)
    model = hl.load_model(name, device="cpu")
    execution = hl.Execution(store=False)
    seconds: dict[str, list[float]] = {text: [] for text in PROBES}
    for _ in range(ROUNDS):
        for text in PROBES:
            probes = [] if text == "none" else [specification.parse(text).probe(model=model)]
            start = time.process_time()
            hl.hijack(model, facts, doses=range(3), probes=probes, execution=execution, quiet=True)
            seconds[text].append(time.process_time() - start)
    plain = statistics.median(seconds["none"])
    print(f"\n{name}, {len(facts)} facts, doses 0-2, one thread")
    for text, found in seconds.items():
        median = statistics.median(found)
        print(f"  {text:44} {median:6.2f} s CPU, {median / plain:.2f} of no probe")


def test_cost_of_hook_points():
    torch.set_num_threads(1)
    model = hl.load_model("smollm2-135m", device="cpu")
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(8, 12)]
    idle = HookProbe("idle", [(name, lambda value, hook: None) for name in names])
    end = torch.tensor([0])
    print(f"\nsmollm2-135m, hooks in 4 of {model.cfg.n_layers} layers, one thread")
    for length in (30, 256, 1_024, 2_048):
        prompts = torch.randint(model.cfg.d_vocab, (max(1, 512 // length), length))
        sides = {"plain elsewhere": plain_blocks_of(model), "hook points": NO_PLAIN_BLOCKS}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(ROUNDS):
            for side, blocks in sides.items():
                start = time.process_time()
                logits_at(model, Layout(prompts, {}), end, end, probes=[idle], plain_blocks=blocks)
                seconds[side].append(time.process_time() - start)
        few, all_layers = (statistics.median(found) for found in seconds.values())
        print(
            f"  {length:5} tokens: {few:6.2f} s, {few / all_layers:.2f} of hook points everywhere"
        )
