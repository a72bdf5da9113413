"""Score facts under two schemes: efficacy rises, retention falls.

python examples/scripts/score.py --model smollm2-135m --limit 40
"""

import argparse

import hijacklens as hl

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a hub id")
parser.add_argument("--limit", type=int, default=20, help="how many facts of the atlas")
parser.add_argument("--out", help="a folder for tables, curve and provenance")
options = parser.parse_args()

model = hl.load_model(options.model)
facts = hl.atlas().sample(options.limit, seed=0)
result = hl.hijack(model, facts, schemes=["do-not-think", "do-not-think-true"], doses=range(3))
print(result.summary().round(3).to_string())
if options.out:
    print("written to", result.save(options.out))
