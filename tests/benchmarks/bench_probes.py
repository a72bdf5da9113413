"""What a score costs with a probe on, against the same score without: ratios in one run.

    make bench          # or: pytest -s -m benchmark tests/benchmarks/bench_probes.py

One process with one thread scores the same atlas facts on a packaged model, plainly and under each
probe in turn, several rounds; CPU seconds, medians of the rounds. HIJACKLENS_BENCH_FACTS sets the
number of facts (20).
"""

from __future__ import annotations

import os
import statistics
import time

import pytest

import hijacklens as hl
from hijacklens.models.packaged import PACKAGED
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
