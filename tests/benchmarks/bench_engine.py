"""The engine against what others do, on the same facts and model: ratios in one run.

    pytest -s -m benchmark tests/benchmarks/bench_engine.py            # a few facts
    HIJACKLENS_BENCH_FACTS=500 HIJACKLENS_BENCH_ROUNDS=3 pytest -s -m benchmark ...

Facts are random ones of CounterFact (the atlas, where the whole set is not at hand) and, apart, as
many of relation P103 (`all` takes every fact), under the generic scheme at doses 0 to 5. Against

    one       one prompt at a time through plain Hugging Face, all positions unembedded
    padded    plain Hugging Face on length-sorted, right-padded batches; only the positions that
              are read are unembedded
    harness   lm-evaluation-harness's Hugging Face backend, given the same requests. It is used
              where it can be imported; HIJACKLENS_LM_EVAL names a folder it was installed into:
              pip install --no-deps --target FOLDER lm-eval
    bare      the plain model on as many tokens as the engine computed, in rows of 48, with as
              many positions unembedded and nothing around it: what is beyond the arithmetic

Sides take turns within one process, so that both see the same machine; times are medians over the
rounds of wall time, and of the time this process computed, which other programs disturb less. Peak
memory is measured in a process for each side.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark
MODEL = "smollm2-135m"
FACTS = os.environ.get("HIJACKLENS_BENCH_FACTS", "8")
ROUNDS = int(os.environ.get("HIJACKLENS_BENCH_ROUNDS", "2"))
SIDES = os.environ.get("HIJACKLENS_BENCH_SIDES", "engine,padded,bare,one,harness").split(",")
THREADS = int(os.environ.get("HIJACKLENS_BENCH_THREADS", "1"))
BATCH_TOKENS = 1_024
ONE_AT_A_TIME = 40
"""Requests of the slowest side, at most; its time is scaled to all of them."""
HARNESS = os.environ.get("HIJACKLENS_LM_EVAL", "")
COUNTERFACT = Path(os.environ.get("HIJACKLENS_SHARED", Path(__file__).parents[3] / "shared"))


def chosen_facts(name):
    """The facts, or None where CounterFact is needed and not there."""
    import hijacklens as hl

    path = COUNTERFACT / "counterfact" / "counterfact_21919.parquet"
    if not path.exists():
        return hl.atlas().limit(int(FACTS), seed=0) if name == "random" else None
    facts = hl.counterfact(path)
    if name == "P103":
        facts = facts.where(relation=["P103"])
    return facts if FACTS == "all" else facts.limit(int(FACTS), seed=0)


class Bench:
    """One set of facts, its requests, and the sides that answer them."""

    def __init__(self, name):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hijacklens.packaged import PACKAGED
        from hijacklens.schemes import get_scheme
        from hijacklens.scoring.items import make_items, make_prompts, wanted

        torch.set_num_threads(THREADS)
        folder = PACKAGED[MODEL].folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts, _ = make_prompts(chosen_facts(name), get_scheme("do-not-think"), range(6), seed=0)
        self.items, _ = make_items(prompts, self.tokenizer, context_length=2048)
        self.wanted = wanted(self.items)
        self.steps = [side for item in self.items for side in (item.true, item.false)]
        self.load = lambda kind: AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=kind
        ).eval()
        self.plain = self.hooked = self.backend = None

    def prepare(self, side):
        """Load what a side needs, before anything is timed."""
        if side == "engine":
            from hijacklens.models import load_model

            self.hooked = self.hooked or load_model(MODEL, device="cpu")
        elif side == "harness":
            from lm_eval.models.huggingface import HFLM

            self.backend = HFLM(
                pretrained=self.load("sdpa"),
                tokenizer=self.tokenizer,
                batch_size=BATCH_TOKENS // 48,
            )
        elif self.plain is None:
            self.plain = self.load("sdpa")  # what transformers takes by itself

    def run(self, side):
        """Answer all requests: the sum of their log-probabilities, and the share of them it was."""
        return getattr(self, side)()

    def warm(self, side):
        """Answer the first requests, so that what is done once is not timed."""
        whole = self.wanted, self.steps
        self.steps = self.steps[:12]
        self.wanted = {p: whole[0][p] for steps in self.steps for p, _ in steps}
        self.run(side)
        self.wanted, self.steps = whole

    def total(self, logprobs):
        return sum(logprobs[prefix, token] for steps in self.steps for prefix, token in steps)

    def engine(self):
        from hijacklens.scoring.engine import read

        self.readings = read(self.hooked, self.wanted)
        found = {(p, t): v for p, r in self.readings.items() for t, v in r.logprobs.items()}
        return self.total(found), 1.0

    def one(self):
        import torch

        total, few = 0.0, self.steps[:ONE_AT_A_TIME]
        for steps in few:
            ids = steps[-1][0]
            with torch.inference_mode():
                logprobs = self.plain(torch.tensor([ids])).logits[0].log_softmax(-1)
            total += sum(float(logprobs[len(prefix) - 1, token]) for prefix, token in steps)
        return total, len(few) / len(self.steps)

    def padded(self):
        import torch

        from hijacklens.scoring.trie import Trie

        trie = Trie.of(self.wanted)
        order = sorted(range(len(trie.leaves)), key=lambda i: -len(trie.leaves[i]))
        found = {}
        while order:
            width = len(trie.leaves[order[0]])
            count = max(1, BATCH_TOKENS // width)
            batch, order = order[:count], order[count:]
            rows = [trie.leaves[i] for i in batch]
            ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
            reads = [(row, p) for row, i in enumerate(batch) for p in trie.reads[i]]
            with torch.inference_mode():
                hidden = self.plain.model(input_ids=ids, use_cache=False).last_hidden_state
                places = [row for row, _ in reads], [len(prefix) - 1 for _, prefix in reads]
                logprobs = self.plain.lm_head(hidden[places]).float().log_softmax(-1)
            for i, (_, prefix) in enumerate(reads):
                for token in self.wanted[prefix]:
                    found[prefix, token] = float(logprobs[i, token])
        return self.total(found), 1.0

    def bare(self):
        import torch

        ids = torch.randint(0, 1000, (BATCH_TOKENS // 48, 48))
        passes = max(1, round(self.readings.accounting.forward_tokens / ids.numel()))
        with torch.inference_mode():
            for _ in range(passes):
                hidden = self.plain.model(input_ids=ids, use_cache=False).last_hidden_state
                self.plain.lm_head(hidden.flatten(0, 1)[: len(self.wanted) // passes])
        return None, passes * ids.numel() / self.readings.accounting.forward_tokens

    def harness(self):
        # Its own entry point for requests that are tokenised already.
        requests = [
            (("", ""), list(steps[0][0]), [token for _, token in steps]) for steps in self.steps
        ]
        found = self.backend._loglikelihood_tokens(requests, disable_tqdm=True)
        return sum(logprob for logprob, _ in found), 1.0


def available(side):
    if side == "harness":
        if HARNESS and HARNESS not in sys.path:
            sys.path.append(HARNESS)
        try:
            import lm_eval.models.huggingface  # noqa: F401
        except ImportError:
            return False
    return True


def peak_memory(name, side):
    """MiB that a process needs which does one side alone, its imports and model included."""
    code = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import bench_engine\n"
        f"bench_engine.available({side!r})\n"
        f"bench = bench_engine.Bench({name!r})\n"
        f"bench.prepare({side!r}); bench.run({side!r})\n"
        "from hijacklens.scoring.memory import peak_bytes\n"
        "import torch\n"
        "print(json.dumps(peak_bytes(torch.device('cpu')) / 2**20))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["random", "P103"])
def test_engine(name):
    if chosen_facts(name) is None:
        pytest.skip("needs the whole CounterFact (HIJACKLENS_SHARED)")
    bench = Bench(name)
    left_out = [side for side in SIDES if not available(side)]
    sides = [side for side in SIDES if side not in left_out]
    wall = {side: [] for side in sides}
    cpu = {side: [] for side in sides}
    sums = {}
    for side in sides:
        bench.prepare(side)
        bench.warm(side)
    for _ in range(ROUNDS):
        for side in sides:
            before = time.perf_counter(), time.process_time()
            sums[side], share = bench.run(side)
            after = time.perf_counter(), time.process_time()
            wall[side].append((after[0] - before[0]) / share)
            cpu[side].append((after[1] - before[1]) / share)
    for side in ("padded", "harness"):
        if side in sides:
            assert sums[side] == pytest.approx(sums["engine"], abs=1e-4 * len(bench.steps))
    done = bench.readings.accounting
    ratio = done.naive_tokens / done.forward_tokens
    print(
        f"\n{MODEL}, {name}: {len(bench.items) // 6} facts, doses 0-5, {THREADS} thread, "
        f"{ROUNDS} rounds\n  {done.way}: {done.forward_tokens:,} tokens ({done.padded_tokens:,} "
        f"with padding) of {done.naive_tokens:,}, ratio {ratio:.2f}, bound {done.trie_tokens:,}"
    )
    for side in sides:
        seconds, busy = statistics.median(wall[side]), statistics.median(cpu[side])
        times, times_busy = (
            seconds / statistics.median(wall["engine"]),
            busy / statistics.median(cpu["engine"]),
        )
        memory = "" if side == "bare" else f", peak {peak_memory(name, side):,.0f} MiB"
        print(
            f"  {side:8s} {seconds:8.1f} s wall ({times:.2f} x engine), "
            f"{busy:8.1f} s busy ({times_busy:.2f} x){memory}"
        )
    for side in left_out:
        print(f"  {side}: not installed")
