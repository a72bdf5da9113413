"""Find the heads that carry the hijack on half of the facts, and test them on the other half.

python examples/scripts/head_search.py --model smollm2-135m --limit 24
"""

import argparse

import hijacklens as hl
from probes import heads

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="smollm2-135m", help="a name, a folder or a hub id")
parser.add_argument("--limit", type=int, default=24, help="how many facts of the atlas")
parser.add_argument("--size", type=int, default=3, help="how many heads to choose")
parser.add_argument("--random-sets", type=int, default=2, help="sets to compare with, of each kind")
options = parser.parse_args()

model = hl.load_model(options.model)
searched, unseen = heads.halves(hl.atlas().sample(options.limit, seed=0), seed=0)
late = range(model.cfg.n_layers // 2, model.cfg.n_layers)  # early heads break recall itself
pairs = hl.pairs(model, searched, scheme="do-not-think", dose=1)
found = heads.search(model, pairs, size=options.size, candidates=2 * options.size, layers=late)
print("heads:", ", ".join(f"{layer}.{head}" for layer, head in found.heads))
trial = found.test(unseen, random_sets=options.random_sets)
table = trial.summary().query("relations == 'all'")
columns = ["measure", "n", "bare", "none", "chosen", "recovered", "layers_mean", "harm_mean"]
print(table[columns].round(2).to_string(index=False))
print("none: hijacked, nothing ablated; layers_mean, harm_mean: random sets instead of the chosen")
