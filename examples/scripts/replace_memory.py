"""Put the constructed memory of equation 5.1 and other matrices in place of a trained W_V.

python examples/scripts/replace_memory.py            # trains a small model first
python examples/scripts/replace_memory.py --trained runs/one-layer
"""

import argparse

import hijacklens as hl
from probes import values

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--trained", help="a folder that train_one_layer.py --out wrote")
parser.add_argument("--steps", type=int, default=300, help="training steps without --trained")
options = parser.parse_args()

if options.trained:
    trained = hl.load_result(options.trained)
else:
    task = hl.ConceptTask(bits=5, omega=0.5, beta=1.0, length=64)
    trained = hl.train(task, d_model=16, seeds=2, steps=options.steps, evaluation=1024, quiet=True)
memory = values.matched(values.memory(trained.task))  # scaled to the norm of the trained matrix
swaps = {
    "as trained": [],
    "equation 5.1": [values.replace(memory)],
    "rank 4": [values.replace(values.low_rank(4))],
    "random": [values.replace(values.random(seed=0))],
}
for name, probes in swaps.items():
    table = trained.accuracy(probes=probes)
    best = table.loc[table["lr"] == trained.best_learning_rate, "accuracy"]
    print(f"{name:14} accuracy {best.mean():.3f}   by seed {best.round(3).tolist()}")
