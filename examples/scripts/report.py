"""Score facts, trace one of them, and put both results on one HTML page.

python examples/scripts/report.py --model smollm2-135m --out report.html
"""

import argparse
import tempfile
from pathlib import Path

import hijacklens as hl
from hijacklens.report import write_report
from probes import logit_shift

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a hub id")
parser.add_argument("--limit", type=int, default=20, help="how many facts of the atlas")
parser.add_argument("--out", default="report.html", help="the page; an existing one is replaced")
options = parser.parse_args()

model = hl.load_model(options.model)
facts = hl.atlas().sample(options.limit, seed=0)
with tempfile.TemporaryDirectory() as folder:
    scores = hl.hijack(model, facts, doses=[0, 1, 2]).save(Path(folder) / "scores")
    # A shift needs targets that begin with different tokens.
    pair = next(pair for pair in hl.pairs(model, facts) if not pair.same_first_token)
    shift = logit_shift.trace(model, pair).save(Path(folder) / "trace")
    page = write_report([scores, shift], out=Path(options.out), overwrite=True)
print("written:", page)
