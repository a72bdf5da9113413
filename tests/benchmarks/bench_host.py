"""What our own code costs besides the arithmetic: ratios in one run.

    pytest -s -m benchmark tests/benchmarks/bench_host.py      # ten minutes

A model with one layer of 16 dimensions and the vocabulary of GPT-2 spends its time on the
unembedding alone. It scores CounterFact with the real GPT-2 tokenizer, the generic scheme and doses
0 to 5, without the store:

    loop    multiplies as many rows with the unembedding, in batches of 128, and takes log-sum-exp,
            maximum and the requested entries
    plan    `forecast`, which runs no model
    run     `hijack`
    store   `hijack` with a new store

Each is a process with one thread, which times the processor, not the clock. HIJACKLENS_BENCH_ROUNDS
(1) repeats them in turns, and medians are printed. Peak memory is that of the process, less that of
a process that only loads the model and the facts. HIJACKLENS_BENCH_FACTS names other numbers of
facts (2000,4000,8000,16000,all).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark
SHARED = Path(os.environ.get("HIJACKLENS_SHARED", Path(__file__).parents[3] / "shared"))
COUNTS = os.environ.get("HIJACKLENS_BENCH_FACTS", "2000,4000,8000,16000,all").split(",")
ROUNDS = int(os.environ.get("HIJACKLENS_BENCH_ROUNDS", "1"))
SIDES = ("bare", "loop", "plan", "run", "store")


def work(side, count, folder):
    """Do one side; return seconds of the processor, and the peak memory in MiB."""
    import resource
    import time

    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    import hijacklens as hl
    from hijacklens.prompts.schemes import get_scheme
    from hijacklens.prompts.wordings import make_prompts
    from hijacklens.scoring.forecast import forecast
    from hijacklens.scoring.items import make_items

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2)).eval()
    weights = plain.lm_head.weight.detach()
    model = hl.load_model(plain, tokenizer=tokenizer, device="cpu")
    facts = hl.counterfact(SHARED / "counterfact" / "counterfact_21919.parquet")
    facts = facts if count == "all" else facts.limit(int(count), seed=0)

    def score(facts, store=False):
        return hl.hijack(model, facts, execution=hl.Execution(store=store), quiet=True)

    def loop():
        for rows, at, tokens in batches:
            logits = rows @ weights.T
            norm, top = logits.logsumexp(-1), logits.max(-1)
            (logits[at, tokens] - norm[at]).tolist()
            (top.values - norm).tolist(), top.indices.tolist()

    if side == "loop":
        prompts, _ = make_prompts(facts, get_scheme("do-not-think"), range(6), tokenizer, seed=0)
        requests = make_items(prompts, tokenizer, context_length=1024)[0].requests
        wanted = torch.tensor([list(requests[prefix])[:2] for prefix in requests])
        batches = [
            (torch.randn(len(part), 16), torch.arange(len(part)).repeat_interleave(2), part.ravel())
            for part in wanted.split(128)
        ]
    score(facts.limit(8))  # what happens once is not timed
    start = time.process_time()
    if side == "loop":
        loop()
    elif side == "plan":
        forecast(tokenizer, facts, quiet=True)
    elif side != "bare":
        score(facts, Path(folder) / f"{count}.sqlite" if side == "store" else False)
    seconds = time.process_time() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(side, count, folder):
    """Return the result of `work` in a separate process."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_host; "
        f"print(json.dumps(bench_host.work({side!r}, {count!r}, {str(folder)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs CounterFact and a tokenizer in {SHARED}")
def test_host(tmp_path):
    print("\nfacts      loop s  plan/loop  run/loop  store/run  plan MiB  run MiB  store MiB")
    for count in COUNTS:
        found = {side: [] for side in SIDES}
        for i in range(ROUNDS):
            (tmp_path / str(i)).mkdir(exist_ok=True)
            for side in SIDES:
                found[side].append(measured(side, count, tmp_path / str(i)))
        seconds, peak = (
            {side: statistics.median(row[k] for row in rows) for side, rows in found.items()}
            for k in (0, 1)
        )
        print(
            f"{count:>6} {seconds['loop']:10.1f} {seconds['plan'] / seconds['loop']:10.2f} "
            f"{seconds['run'] / seconds['loop']:9.2f} {seconds['store'] / seconds['run']:10.2f}"
            + "".join(f" {peak[x] - peak['bare']:9.0f}" for x in ("plan", "run", "store"))
        )
