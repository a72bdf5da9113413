"""Split the logit shift of one fact into the parts that tokens, layers and heads wrote.

python examples/scripts/trace.py --model smollm2-135m --case 57 --out shift.png
"""

import argparse
from pathlib import Path

import hijacklens as hl
from hijacklens import plots
from probes import logit_shift

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a hub id")
parser.add_argument("--case", type=int, default=57, help="the case id of a fact of the atlas")
parser.add_argument("--scheme", default="do-not-think")
parser.add_argument("--out", help="a PNG or SVG file for the map of tokens and layers")
options = parser.parse_args()

model = hl.load_model(options.model)
facts = hl.atlas().where(case_ids=[options.case])
pair = hl.pairs(model, facts, scheme=options.scheme, dose=1)[0]
account, fact = logit_shift.trace(model, pair), pair.fact
print(account.prompt.text)
print(
    f"{fact.target_false!r} gains {account.shift:+.2f} logits on {fact.target_true!r};",
    end=" ",
)
print(f"the parts leave {account.residual:+.1e} unexplained")
print(account.biggest(8).round(2).to_string(index=False))
if options.out:
    plots.write(account.plot(by=("token", "layer")), Path(options.out))
