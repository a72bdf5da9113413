"""Use two probes: hide the hijack from the last token, and reduce the rank of late value matrices.

python examples/scripts/probe.py --model smollm2-135m
"""

import argparse

import hijacklens as hl
from probes import attention, values

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a hub id")
parser.add_argument("--limit", type=int, default=20, help="how many facts of the atlas")
options = parser.parse_args()

model = hl.load_model(options.model)
facts = hl.atlas().sample(options.limit, seed=0)
late = range(model.cfg.n_layers // 2, model.cfg.n_layers)
probes = {
    "nothing": [],
    "last token sees no hijack": [attention.knock_out("last", "hijack")],
    "... in the late half": [attention.knock_out("last", "hijack", layers=late)],
    "late W_V of rank 8": [values.replace(values.low_rank(8), layers=late)],
}
print(f"{'probe':28} bare  hijacked   (efficacy: fraction of facts whose false target wins)")
for name, chosen in probes.items():
    table = hl.hijack(model, facts, doses=[0, 1], probes=chosen, quiet=True).summary()
    bare, hijacked = table["efficacy"]
    print(f"{name:28} {bare:.2f}  {hijacked:.2f}")
