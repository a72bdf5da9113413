"""Scoring against one prompt at a time through plain Hugging Face: ratios in one run.

    make bench          # or: pytest -s -m benchmark tests/benchmarks/bench_scoring.py

Both sides score the same facts under the generic scheme at doses 0 to 5 with the same packaged
model and the same number of threads, in separate processes so that peak memory can be compared.
The plain side runs each prompt with each target by itself and unembeds all positions, as the
evaluation code of the data set does.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hijacklens.models.packaged import PACKAGED

pytestmark = pytest.mark.benchmark
N_FACTS = 20

OURS = """
import hijacklens as hl
model = hl.load_model({name!r}, device="cpu")
facts = hl.atlas().sample({n}, seed=0)
start = time.perf_counter()
items = hl.hijack(model, facts, quiet=True).items
seconds = time.perf_counter() - start
check = float(items["sum_true"].sum() + items["sum_false"].sum())
"""
PLAIN = """
import hijacklens as hl
from hijacklens.models.packaged import PACKAGED
from hijacklens.prompts.prompt import make_prompt
from hijacklens.prompts.schemes import get_scheme
from hijacklens.prompts.tokens import continuation
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = PACKAGED[{name!r}].folder()
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
scheme = get_scheme("do-not-think")
facts = hl.atlas().sample({n}, seed=0)
check = 0.0
start = time.perf_counter()
for fact in facts:
    sentence = scheme.sentence(fact)
    for dose in range(6):
        text = make_prompt(fact, sentence=sentence, dose=dose, scheme="x").text
        before = tuple(tokenizer(text).input_ids)
        for target in (fact.target_true, fact.target_false):
            both = continuation(before, tuple(tokenizer(text + " " + target).input_ids))
            ids = both.context + both.target
            with torch.no_grad():
                logprobs = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            n = len(both.context)
            check += sum(float(logprobs[n - 1 + i, t]) for i, t in enumerate(both.target))
seconds = time.perf_counter() - start
"""
FRAME = """
import json, resource, time
import torch
torch.set_num_threads({threads})
{body}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(dict(seconds=seconds, peak=peak, check=check)))
"""


def measure(body: str, name: str, threads: int) -> dict[str, float]:
    code = FRAME.format(threads=threads, body=body.format(name=name, n=N_FACTS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_scoring_against_one_prompt_at_a_time(name):
    threads = 1
    PACKAGED[name].folder()  # unpacked before anything is timed
    ours, plain = (measure(body, name, threads) for body in (OURS, PLAIN))
    assert ours["check"] == pytest.approx(plain["check"], abs=1e-3 * N_FACTS)
    print(
        f"\n{name}, {N_FACTS} atlas facts, doses 0-5, {threads} thread: "
        f"hijacklens {N_FACTS / ours['seconds']:.2f} facts/s, {ours['peak']:.0f} MiB; "
        f"plain {N_FACTS / plain['seconds']:.2f} facts/s, {plain['peak']:.0f} MiB; "
        f"speed ratio {plain['seconds'] / ours['seconds']:.2f}, "
        f"memory ratio {ours['peak'] / plain['peak']:.2f}"
    )
