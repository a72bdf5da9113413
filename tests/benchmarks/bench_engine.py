"""The engine against what others do, on the same facts and model: ratios in one run.

    pytest -s -m benchmark tests/benchmarks/bench_engine.py            # a few facts
    HIJACKLENS_BENCH_FACTS=500 HIJACKLENS_BENCH_ROUNDS=3 pytest -s -m benchmark ...

Facts are random ones of CounterFact (the atlas without CounterFact) and, separately, as many of
relation P103 (`all` takes every fact), under the generic scheme at doses 0 to 5, compared with

    one       one prompt at a time through plain Hugging Face, all positions unembedded
    padded    plain Hugging Face on length-sorted, right-padded batches; only the positions that
              are read are unembedded
    harness   lm-evaluation-harness's Hugging Face backend, given the same requests, if it can be
              imported; HIJACKLENS_LM_EVAL names a folder it was installed into:
              pip install --no-deps --target FOLDER lm-eval
    bare      the plain model on as many tokens as the engine computed, in rows of 48, with as
              many positions unembedded and nothing around it: the arithmetic alone

Sides take turns within one process, so that both see the same machine; times are medians over the
rounds of wall time, and of the time this process computed, which other programs disturb less. Peak
memory is measured in a process for each side, which costs one more run of all but `bare`. A side
that is not installed, or fails, is named and left out. HIJACKLENS_BENCH_OUT names a JSON file for
times, ratios and versions, HIJACKLENS_BENCH_SETS one of the sets.

share       time compared with `padded`, over the ratio of forward tokens (1 for nothing lost)
over bare   time beyond that of `bare`
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.benchmark
MODEL = "smollm2-135m"
FACTS = os.environ.get("HIJACKLENS_BENCH_FACTS", "8")
ROUNDS = int(os.environ.get("HIJACKLENS_BENCH_ROUNDS", "2"))
SIDES = os.environ.get("HIJACKLENS_BENCH_SIDES", "engine,padded,bare,one,harness").split(",")
THREADS = int(os.environ.get("HIJACKLENS_BENCH_THREADS", "1"))
SETS = os.environ.get("HIJACKLENS_BENCH_SETS", "random,P103").split(",")
BATCH_TOKENS = 1_024
ONE_AT_A_TIME = 40
"""Requests of the slowest side, at most; its time is scaled to all of them."""
HARNESS = os.environ.get("HIJACKLENS_LM_EVAL", "")
OUT = os.environ.get("HIJACKLENS_BENCH_OUT", "")
PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "lm-eval")
COUNTERFACT = Path(os.environ.get("HIJACKLENS_SHARED", Path(__file__).parents[3] / "shared"))


def chosen_facts(name):
    """The facts, or None if CounterFact is needed and missing."""
    import hijacklens as hl

    path = COUNTERFACT / "counterfact" / "counterfact_21919.parquet"
    if not path.exists():
        return hl.atlas().limit(int(FACTS), seed=0) if name == "random" else None
    facts = hl.counterfact(path)
    if name == "P103":
        facts = facts.where(relation=["P103"])
    return facts if FACTS == "all" else facts.limit(int(FACTS), seed=0)


def padded_logprobs(plain, requests, batch_tokens):
    """Answer requests by a plain model on length-sorted, right-padded batches."""
    import torch

    from hijacklens.engine.trie import Trie
    from hijacklens.prompts.prefixes import prefix_of, symbols_of

    trie = Trie.of(map(prefix_of, requests))
    leaves = [symbols_of(leaf) for leaf in trie.leaves]
    lengths, first = trie.reads[:, 0], trie.first_read
    order = sorted(range(len(leaves)), key=lambda i: -len(leaves[i]))
    unembed, device = plain.get_output_embeddings(), plain.device
    found = {}
    while order:
        width = len(leaves[order[0]])
        count = max(1, batch_tokens // width)
        batch, order = order[:count], order[count:]
        rows = [leaves[i] for i in batch]
        ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)
        reads = [
            (row, leaves[i][:n])
            for row, i in enumerate(batch)
            for n in lengths[first[i] : first[i + 1]]
        ]
        pairs = [(i, token) for i, (_, prefix) in enumerate(reads) for token in requests[prefix]]
        with torch.inference_mode():
            hidden = plain.base_model(input_ids=ids, use_cache=False).last_hidden_state
            places = [row for row, _ in reads], [len(prefix) - 1 for _, prefix in reads]
            logprobs = unembed(hidden[places]).float().log_softmax(-1)
            values = logprobs[[i for i, _ in pairs], [token for _, token in pairs]].tolist()
        for (i, token), value in zip(pairs, values, strict=True):
            found[reads[i][1], token] = value
    return found


class Bench:
    """One set of facts, its requests, and the sides that answer them."""

    def __init__(self, name):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hijacklens.models.packaged import PACKAGED
        from hijacklens.prompts.schemes import get_scheme
        from hijacklens.prompts.wordings import make_prompts
        from hijacklens.scoring.items import make_items

        torch.set_num_threads(THREADS)
        folder = PACKAGED[MODEL].folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        facts, scheme = chosen_facts(name), get_scheme("do-not-think")
        prompts, _ = make_prompts(facts, scheme, range(6), self.tokenizer, seed=0)
        self.items, _ = make_items(prompts, self.tokenizer, context_length=2048)
        self.requests = self.items.requests
        self.steps = [side for item in self.items for side in (item.true, item.false)]
        self.load = lambda kind: AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=kind
        ).eval()
        self.plain = self.hooked = self.backend = None

    def prepare(self, side):
        """Load what a side needs, before anything is timed."""
        if side == "engine":
            from hijacklens.models.loading import load_model

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
        """Answer requests: the sum of log-probabilities, and the fraction that was answered."""
        return getattr(self, side)()

    def warm(self, side):
        """Answer the first requests, so that one-time work is not timed."""
        whole = self.requests, self.steps
        self.steps = self.steps[:12]
        self.requests = {p: whole[0][p] for steps in self.steps for p, _ in steps}
        self.run(side)
        self.requests, self.steps = whole

    def total(self, logprobs):
        return sum(logprobs[prefix, token] for steps in self.steps for prefix, token in steps)

    def engine(self):
        from hijacklens.engine.engine import read

        self.readings = read(self.hooked, self.requests)
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
        return self.total(padded_logprobs(self.plain, self.requests, BATCH_TOKENS)), 1.0

    def bare(self):
        import torch

        ids = torch.randint(0, 1000, (BATCH_TOKENS // 48, 48))
        passes = max(1, round(self.readings.accounting.forward_tokens / ids.numel()))
        with torch.inference_mode():
            for _ in range(passes):
                hidden = self.plain.model(input_ids=ids, use_cache=False).last_hidden_state
                self.plain.lm_head(hidden.flatten(0, 1)[: len(self.requests) // passes])
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
        "from hijacklens.models.device_memory import peak_bytes\n"
        "import torch\n"
        "print(json.dumps(peak_bytes(torch.device('cpu')) / 2**20))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else None


def measure(name):
    """All sides on one set of facts, as a record for JSON."""
    bench = Bench(name)
    left_out = {side: "not installed" for side in SIDES if not available(side)}
    rounds = {side: {"wall": [], "busy": []} for side in SIDES if side not in left_out}
    sums = {}

    def attempt(side, work):
        """Run a side; a side of another project may fail without ending the benchmark."""
        try:
            return work(side)
        except Exception as error:
            if side == "engine":
                raise
            left_out[side] = f"{type(error).__name__}: {error}"
            return None

    for side in rounds:
        attempt(side, bench.prepare)
        if side not in left_out:
            attempt(side, bench.warm)
    for _ in range(ROUNDS):
        for side, times in rounds.items():
            before = time.perf_counter(), time.process_time()
            answered = None if side in left_out else attempt(side, bench.run)
            after = time.perf_counter(), time.process_time()
            if answered is not None:
                sums[side], share = answered
                times["wall"].append((after[0] - before[0]) / share)
                times["busy"].append((after[1] - before[1]) / share)
    rounds = {side: times for side, times in rounds.items() if side not in left_out}
    for side in {"padded", "harness"} & set(rounds):
        assert sums[side] == pytest.approx(sums["engine"], abs=1e-4 * len(bench.steps))
    return {
        "facts": name,
        "n": len(bench.items) // 6,
        "reads": len(bench.requests),
        "engine": bench.readings.accounting.record(),
        "rounds": rounds,
        "ratios": ratios(rounds, bench.readings.accounting),
        "peak_mib": {side: peak_memory(name, side) for side in rounds if side != "bare"},
        "left_out": left_out,
    }


def ratios(rounds, accounting):
    """Times against those of the engine, and what the goals are stated in."""
    tokens = accounting.naive_tokens / accounting.forward_tokens
    found = {"tokens": tokens}
    for clock in ("wall", "busy"):
        middle = {side: statistics.median(times[clock]) for side, times in rounds.items()}
        against = {side: seconds / middle["engine"] for side, seconds in middle.items()}
        found[clock] = {"seconds": middle, "against_engine": against}
        if "padded" in against:
            found[clock]["share"] = against["padded"] / tokens
        if "bare" in against:
            found[clock]["over_bare"] = 1 / against["bare"] - 1
    return found


def versions():
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **installed}


def table(records):
    """A row for each set of facts and side."""
    rows = []
    for record in records:
        found = record["ratios"]
        for side in record["rounds"]:
            peak = record["peak_mib"].get(side)
            seconds, times = (
                {clock: found[clock][what][side] for clock in ("wall", "busy")}
                for what in ("seconds", "against_engine")
            )
            rows.append(
                {
                    "facts": record["facts"],
                    "side": side,
                    "wall s": f"{seconds['wall']:.1f}",
                    "busy s": f"{seconds['busy']:.1f}",
                    "x engine (wall)": f"{times['wall']:.2f}",
                    "x engine (busy)": f"{times['busy']:.2f}",
                    "peak MiB": f"{peak:,.0f}" if peak else "",
                }
            )
    return pd.DataFrame(rows).to_string(index=False)


def summary(record):
    """What was computed, and the ratios that goals are stated in."""
    done, found = record["engine"], record["ratios"]
    lines = [
        f"{record['facts']}: {record['n']} facts, doses 0-5, {record['reads']:,} reads; "
        f"{done['sharing']}: {done['forward_tokens']:,} tokens ({done['padded_tokens']:,} with "
        f"padding) of {done['naive_tokens']:,}, ratio {found['tokens']:.2f}, "
        f"bound {done['trie_tokens']:,}"
    ]
    for clock in ("wall", "busy"):
        said = [
            f"{label} {found[clock][key]:{form}}"
            for key, label, form in (("share", "share", ".3f"), ("over_bare", "over bare", "+.1%"))
            if key in found[clock]
        ]
        lines.append(f"  {clock}: {', '.join(said) or 'nothing to compare with'}")
    lines += [f"  {side} left out: {why}" for side, why in record["left_out"].items()]
    return "\n".join(lines)


def test_engine():
    names = [name for name in SETS if chosen_facts(name) is not None]
    whole = {"model": MODEL, "threads": THREADS, "n_rounds": ROUNDS}
    records = []
    for name in names:
        records.append(measure(name))
        whole["versions"] = versions()  # after what HIJACKLENS_LM_EVAL adds to the path
        if OUT:  # after each set, as the next may take long
            Path(OUT).write_text(json.dumps({**whole, "sets": records}, indent=2))
    print(f"\n{MODEL}, {THREADS} thread, {ROUNDS} rounds\n{table(records)}\n")
    print("\n".join(map(summary, records)))
    if len(names) < len(SETS):
        print("P103 needs the whole CounterFact (HIJACKLENS_SHARED)")
