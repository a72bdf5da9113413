"""lm-evaluation-harness with our engine and with its own backend, on tasks that share prefixes.

    pytest -s -m benchmark tests/benchmarks/bench_lm_eval.py          # two minutes

SmolLM2 135M answers the same requests through both on one thread, in turns: multiple choice with
four examples before each question, and our generic hijack. Times are of the processor.
HIJACKLENS_BENCH_FACTS (50) is the number of questions of each.
"""

from __future__ import annotations

import os
import time

import pytest
import torch

pytestmark = pytest.mark.benchmark
COUNT = int(os.environ.get("HIJACKLENS_BENCH_FACTS", "50"))


def test_harness():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    import hijacklens as hl
    from analyses.adapters.lm_eval import HijacklensLM
    from hijacklens.models.packaged import PACKAGED

    torch.set_num_threads(1)
    model = hl.load_model("smollm2-135m", device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(PACKAGED["smollm2-135m"].folder()).float().eval()
    backends = {
        "ours": HijacklensLM(model),
        "theirs": HFLM(pretrained=plain, tokenizer=model.tokenizer, device="cpu", batch_size=16),
    }
    facts = list(hl.atlas().sample(COUNT + 4, seed=0))
    shots = " ".join(f"{fact.prompt} {fact.target_true}." for fact in facts[:4])
    formats = {
        "four examples": [f"{shots} {fact.prompt}" for fact in facts[4:]],
        "generic hijack": [f"Do not think of {x.target_false}. {x.prompt}" for x in facts[4:]],
    }
    print(f"\n{COUNT} questions, two answers each\n  task             ours s   theirs s   ratio")
    for name, contexts in formats.items():
        pairs = [
            (context, f" {target}")
            for context, fact in zip(contexts, facts[4:], strict=True)
            for target in (fact.target_true, fact.target_false)
        ]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        seconds, answers = {}, {}
        for side, lm in backends.items():
            lm.loglikelihood(asked[:8], disable_tqdm=True)  # what happens once
            start = time.process_time()
            answers[side] = [x[0] for x in lm.loglikelihood(asked, disable_tqdm=True)]
            seconds[side] = time.process_time() - start
        assert answers["ours"] == pytest.approx(answers["theirs"], abs=1e-4)
        ratio = seconds["theirs"] / seconds["ours"]
        print(f"  {name:15} {seconds['ours']:7.1f} {seconds['theirs']:10.1f} {ratio:7.2f}")
