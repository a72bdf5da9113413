"""The account of 100 facts against zeroing one head after the other: ratios in one run.

    make bench          # or: pytest -s -m benchmark tests/benchmarks/bench_account.py

Three processes with one thread each and the same packaged model, in CPU seconds: ours accounts
for the bare and the hijacked prompts of 100 facts; scoring reads the same prompts with no account;
the naive way zeroes one head's output at a time with a hook, a forward pass for every head and
prompt, as most scripts do. The last runs on a few facts only and is scaled up by the number of
prompts. The two do not measure the same thing (zeroing shows what a head does through later layers
too, the account splits by attended token), so only their costs are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hijacklens.models.packaged import PACKAGED

pytestmark = pytest.mark.benchmark
N_FACTS = 100
N_NAIVE = 1
"""Facts of the naive way: hundreds of forward passes for each."""

FACTS = """
import hijacklens as hl
model = hl.load_model({name!r}, device="cpu")
facts = hl.atlas().sample({n}, seed=0)[:{few}]
"""
OURS = """
from probes import logit_shift
start = time.process_time()
pairs = hl.pairs(model, facts)
found = logit_shift.average(model, pairs, quiet=True)
seconds = time.process_time() - start
check = found.facts["shift"].head({naive}).tolist()
residual = found.residual
"""
SCORING = """
start = time.process_time()
items = hl.hijack(model, facts, doses=[1], quiet=True).items
seconds = time.process_time() - start
check, residual = [], 0.0
"""
NAIVE = """
from functools import partial
items = [item for pair in hl.pairs(model, facts) for item in pair.items]
def zero(head, z, hook):
    z[:, -1, head] = 0
    return z
def difference(item, hooks):
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([item.ids]), fwd_hooks=hooks)[0, -1]
    return float(logits[item.false[0][1]] - logits[item.true[0][1]])
start = time.process_time()
wholes = []
for item in items:
    wholes.append(difference(item, []))
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            difference(item, [("blocks.%d.attn.hook_z" % layer, partial(zero, head))])
seconds = time.process_time() - start
check = [after - before for before, after in zip(wholes[::2], wholes[1::2])]
residual = 0.0
"""
FRAME = """
import json, resource, time
import torch
torch.set_num_threads(1)
{body}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(dict(seconds=seconds, peak=peak, check=check, residual=residual)))
"""


def measure(body: str, name: str, few: int) -> dict[str, object]:
    body = FACTS.format(name=name, n=N_FACTS, few=few) + body.replace("{naive}", str(N_NAIVE))
    code = FRAME.replace("{body}", body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_account_against_zeroing_one_head_at_a_time(name):
    PACKAGED[name].folder()  # unpacked before anything is timed
    ours, scoring = (measure(body, name, N_FACTS) for body in (OURS, SCORING))
    naive = measure(NAIVE, name, N_NAIVE)
    assert ours["check"] == pytest.approx(naive["check"], abs=1e-3)
    scaled = naive["seconds"] * N_FACTS / N_NAIVE
    print(
        f"\n{name}, {N_FACTS} atlas facts, doses 0 and 1, 1 thread: "
        f"account {ours['seconds']:.1f} s, {ours['peak']:.0f} MiB, "
        f"largest residual {ours['residual']:.1e} logits; "
        f"scoring alone {scoring['seconds']:.1f} s, {scoring['peak']:.0f} MiB; "
        f"one head at a time {naive['seconds']:.1f} s for {N_NAIVE} fact, {scaled:.0f} s scaled; "
        f"{scaled / ours['seconds']:.0f} times the account, which costs "
        f"{ours['seconds'] / scoring['seconds']:.2f} times scoring"
    )
