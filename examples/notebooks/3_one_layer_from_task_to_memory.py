# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · The one-layer model: from task to memory
#
# To explain hijacking, the paper trains a transformer so small that one can hold it in the hand:
# one layer, one head, no residual stream (equation 4.1). Its task, *latent concept association*,
# is recall in a nutshell (section 4). We train it in half a minute and look where the knowledge is.

# %%
import torch

import hijacklens as hl
from hijacklens import views
from probes import attention, geometry, memory_fit, values

# %% [markdown]
# ## The task
#
# A token is m bits read as a number, here m = 5: tokens 0 to 31. A hidden *label* is drawn, and the
# context is made of tokens close to it in Hamming distance, mixed with noise. The model reads the
# context and must name the label, which it hardly ever sees itself.
#
# Why like recall? "Eiffel Tower" and "city of" are not "Paris", they are near it.

# %%
task = hl.ConceptTask(bits=5, omega=0.5, beta=1.0, length=64)
contexts = task.sample(3, torch.Generator().manual_seed(0))
for tokens, label in zip(contexts.tokens, contexts.labels, strict=True):
    head = " ".join(f"{int(token):05b}" for token in tokens[:8])
    print(f"label {int(label):05b}   context {head} ...")

# %% [markdown]
# ## Training
#
# Three seeds at two learning rates, all at once. `bayes_accuracy` is what the exact posterior
# reaches on the same contexts: nobody can do better.

# %%
trained = hl.train(task, d_model=16, seeds=3, steps=800, evaluation=2048, quiet=True)
trained.summary().round(3)

# %%
trained.plot()

# %% [markdown]
# ## Replace the memory
#
# The paper writes down a value matrix by hand (equation 5.1): a sum of outer products of the
# embeddings of tokens that belong together. Now for the heart of the matter: put it in place of
# the trained W_V, and in the same way a random matrix, the identity and nothing at all.

# %%
swaps = {
    "as trained": [],
    "equation 5.1": [values.replace(values.matched(values.memory(task)))],
    "identity": [values.replace(values.matched(values.identity()))],
    "random": [values.replace(values.random(seed=0))],
    "zero": [values.replace(values.zero())],
}
best = trained.best_learning_rate
for name, probes in swaps.items():
    table = trained.accuracy(probes=probes)
    mean = table.loc[table["lr"] == best, "accuracy"].mean()
    print(f"{name:14} {mean:.3f}")

# %% [markdown]
# Chance is 1/32 = .031. The hand-made matrix stands in for the trained one; a random matrix of the
# same size does not. That is what "W_V acts as an associative memory" means here (figure C.2).
#
# The identity is instructive. It can only say what the context says most, and the label is never
# among its own neighbours: here it does worse than chance. In larger models, trained on longer
# contexts, it does nearly as well as W_V, and then the *embeddings* hold the knowledge.
#
# How much of the trained matrix *is* equation 5.1? The memory fit asks for the cosine, the share of
# its norm, and whether its scores retrieve the associated tokens, each against chance.

# %%
model = trained.best()[0]
memory_fit.fit(model, task).summary()[["statistic", "value", "p_family"]].round(3)

# %% [markdown]
# ## The embeddings lie on a ruler
#
# Equation 5.2: after training, the inner product of two embeddings falls in a straight line with
# their Hamming distance, with a jump at distance 0.

# %%
geometry.fit(model, task).plot()

# %% [markdown]
# The line is rough in a model this small: the fit says how rough, and distances 1 and 2 may even
# change places. `hijacklens reproduce fig3b` asks at the paper's size.
#
# ## Attention picks the right cluster
#
# Give the task two clusters: only tokens with the same first bit as the label carry information
# (as in figure C.7). Does the last token look at its own cluster?

# %%
clustered = hl.ConceptTask(bits=4, support="first-bit", omega=0.5, length=24)
small = hl.train(clustered, d_model=16, seeds=1, steps=800, evaluation=1024, quiet=True)
picker = small.best()[0]
context = clustered.sample(1, torch.Generator().manual_seed(4)).tokens[0]
run = views.run(picker, context, task=clustered)
inside = [float(token // 8 == context[-1] // 8) for token in context]
cluster = run.coloured("Red: the tokens of the last token's cluster", inside)
views.Sheet((run.attended("last"), cluster))

# %%
share = run.patterns[0, 0, -1, list(run.positions("cluster"))].sum()
print(f"attention inside the cluster {share:.2f}, tokens inside it {sum(inside) / len(inside):.2f}")
for name, probes in {
    "as trained": [],
    "even over the cluster": [attention.redirect("last", "cluster")],
    "cluster hidden": [attention.knock_out("last", "cluster")],
}.items():
    print(f"{name:22} {small.accuracy(probes=probes)['accuracy'].max():.3f}")

# %% [markdown]
# ## What to conclude, and what not
#
# - In this model the value matrix can be written down by hand, and the embeddings and the
#   attention have the shape that the theory asks for.
# - How *far* W_V matters depends on size; see the identity in `docs/one-layer`.
# - m, L, steps and width are ours, small enough for a laptop. `hijacklens reproduce` runs the
#   figures at the sizes of the paper.
