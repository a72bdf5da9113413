"""Patch attention outputs of the bare run into the hijacked one, layer by layer and span by span.

python examples/scripts/patching_sweep.py --model smollm2-135m --out sweep.png
"""

import argparse
from pathlib import Path

import hijacklens as hl
from hijacklens import plots
from probes import patching

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a hub id")
parser.add_argument("--limit", type=int, default=6, help="how many facts of the atlas")
parser.add_argument("--site", default="attn_out", help="what is patched, such as resid_pre")
parser.add_argument("--out", help="a PNG or SVG file for the map")
options = parser.parse_args()

model = hl.load_model(options.model)
facts = hl.atlas().sample(options.limit, seed=0)
pairs = hl.pairs(model, facts, scheme="do-not-think", dose=1)
sweep = patching.sweep(model, pairs, patching.BySpan(site=options.site, spans=("subject", "last")))
table = sweep.summary().sort_values("share", ascending=False).head(6)
print(
    table[["layer", "span", "clean", "hijacked", "patched", "share"]]
    .round(2)
    .to_string(index=False)
)
print(
    "logit o_ - logit o*, mean over facts; share: the fraction of the shift that the patch undoes"
)
if options.out:
    plots.write(sweep.plot(), Path(options.out))
