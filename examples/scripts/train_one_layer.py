"""Train the paper's one-layer model on latent concept association.

python examples/scripts/train_one_layer.py --bits 5 --length 64 --steps 800
"""

import argparse

import hijacklens as hl

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--bits", type=int, default=5, help="m: the vocabulary has 2^m tokens")
parser.add_argument("--length", type=int, default=64, help="L, tokens of a context")
parser.add_argument("--d-model", type=int, default=16)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--out", help="a folder for the models, tables and curves")
options = parser.parse_args()

task = hl.ConceptTask(bits=options.bits, omega=0.5, beta=1.0, length=options.length)
trained = hl.train(
    task, d_model=options.d_model, seeds=options.seeds, steps=options.steps, evaluation=2048
)
print(trained.summary().round(3).to_string(index=False))
if options.out:
    print("written to", trained.save(options.out))
