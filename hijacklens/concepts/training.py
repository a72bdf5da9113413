"""Training the one-layer model on latent concept association, and what came of it.

`train` trains seeds x learning rates as one sweep (`hijacklens.concepts.sweep`), evaluates every
model on fresh contexts beside the Bayes-optimal rule and beside itself with the memory of equation
5.1 in place of the trained W_V, and returns a `TrainingResult`. The recipe is section 7.6 of the
reference page: the paper states the architecture and the learning rates it chose between, not the
rest (`OUR_DEFAULTS`).

Cost: one step of one run at V = 256, d = 128, L = 256, batch 128 takes 2 ms on one CPU core, so
the default 4,000 steps of 10 runs take one and a half minutes; 10 seconds at V = 32, d = 16.

>>> from hijacklens.concepts.task import ConceptTask
>>> task = ConceptTask(bits=3, length=64)
>>> trained = train(task, dim=8, seeds=2, steps=64, learning_rates=(0.01,), quiet=True)
>>> list(trained.summary().columns)
['seed', 'lr', 'accuracy', 'accuracy_low', 'accuracy_high', 'bayes_accuracy',
 'constructed_accuracy', 'loss']
"""

from __future__ import annotations
