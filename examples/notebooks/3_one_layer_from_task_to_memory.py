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
# To explain hijacking, the paper trains a minimal transformer: one layer, one head, no residual
# stream (equation 4.1). Its task, *latent concept association*, is a simple model of recall
# (section 4). We train it in half a minute and find out which weights store the associations.

# %%
import torch

import hijacklens as hl
from hijacklens import views
from probes import attention, geometry, memory_fit, values

# %% [markdown]
# ## The task
#
# A token is a number of m bits; here m = 5, so there are tokens 0 to 31. A hidden *label* is drawn,
# and the context consists of tokens close to it in Hamming distance, mixed with noise. The model
# reads the context and must name the label, which rarely occurs in the context.
#
# This resembles recall: "Eiffel Tower" and "city of" are associated with "Paris" without naming it.

# %%
task = hl.ConceptTask(bits=5, omega=0.5, beta=1.0, length=64)
contexts = task.sample(3, torch.Generator().manual_seed(0))
for tokens, label in zip(contexts.tokens, contexts.labels, strict=True):
    head = " ".join(f"{int(token):05b}" for token in tokens[:8])
    print(f"label {int(label):05b}   context {head} ...")

# %% [markdown]
# ## Training
#
# We train three seeds at two learning rates at the same time. `bayes_accuracy` is the accuracy of
# the exact posterior on the same contexts; no model can be better on average.

# %%
trained = hl.train(task, d_model=16, seeds=3, steps=800, evaluation=2048, quiet=True)
trained.summary().round(3)

# %%
trained.plot()

# %% [markdown]
# ## Replace the memory
#
# The paper constructs a value matrix explicitly (equation 5.1): a sum of outer products of the
# embeddings of associated tokens. We now replace the trained W_V by this matrix and, for
# comparison, by the identity, a random matrix and zero.

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
# Chance is 1/32 = .031. The constructed matrix works nearly as well as the trained one; a random
# matrix of the same norm does not. This is the sense in which "W_V acts as an associative memory"
# (figure C.2).
#
# With the identity the model answers with the tokens that the context contains most often, and the
# label is never among its own neighbours, so here the accuracy is below chance. In larger models,
# trained on longer contexts, the identity works nearly as well as W_V: there the *embeddings* store
# the associations.
#
# How similar is the trained matrix to equation 5.1? The memory fit computes the cosine, the
# fraction of the squared norm in the span of the associations, and how often the scores retrieve
# the associated tokens, each compared with chance.

# %%
model = trained.best()[0]
memory_fit.fit(model, task).summary()[["statistic", "value", "p_family"]].round(3)

# %% [markdown]
# ## Inner products fall linearly with distance
#
# According to equation 5.2, after training the inner product of two embeddings is a falling linear
# function of their Hamming distance, with a jump at distance 0.

# %%
geometry.fit(model, task).plot()

# %% [markdown]
# In a model this small the relation is only roughly linear: the fit reports how well it holds, and
# the values at distances 1 and 2 may even be in the wrong order. `hijacklens reproduce fig3b` tests
# it at the paper's size.
#
# ## Attention picks the right cluster
#
# We give the task two clusters: only tokens with the same first bit as the label carry information
# (as in figure C.7). Does the last token attend to its own cluster?

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
# - In this model an explicit construction can replace the value matrix, and the embeddings and the
#   attention have the structure that the theory predicts.
# - How *much* W_V matters depends on the size of the model; see the identity in `docs/one-layer`.
# - We chose m, L, the steps and the width so that everything runs on a laptop. `hijacklens
#   reproduce` runs the figures at the sizes of the paper.
