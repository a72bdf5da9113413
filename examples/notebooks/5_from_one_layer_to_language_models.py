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
# # 5 · From the one-layer model to language models
#
# We understand the one-layer model, but not a language model. The paper argues from the first to
# the second by analogy. Here we ask the same four questions about both, with the same functions,
# and note where the analogy holds and where it fails. (The paper makes no such comparison; these
# are ours.)

# %%
import pandas as pd
import torch

import hijacklens as hl
from hijacklens import plots, views
from probes import attention, memory_fit, values
from probes.memory_fit import associations

MODEL = "smollm2-135m"
model = hl.load_model(MODEL)
facts = hl.atlas().sample(30, seed=3)

task = hl.ConceptTask(bits=5, support="first-bit", omega=0.5, length=64)
trained = hl.train(task, d_model=16, seeds=2, steps=800, evaluation=1024, quiet=True)
small = trained.best()[0]
trained.summary()[["seed", "lr", "accuracy", "bayes_accuracy"]].round(3)

# %% [markdown]
# ## 1. More cues, more hijack?
#
# In a language model the dose is the number of hijacking sentences. In the one-layer model a
# context can be *mixed* from two labels (figure C.13), and the mixing rate plays the role of the
# dose. In both models efficacy is the fraction of cases in which the other target wins, and it
# *rises*.

# %%
draw = torch.Generator().manual_seed(0)
rates = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
mixed = []
for rate in rates:
    contexts = task.sample_mixed(1024, rate, draw)
    logits = small.last_logits(contexts.tokens)
    wins = logits.gather(1, contexts.second[:, None]) > logits.gather(1, contexts.first[:, None])
    mixed.append(float(wins.float().mean()))
curve = hl.hijack(model, facts, doses=range(5), quiet=True).summary()

with plots.canvas(1, 2, share_y=True) as (figure, axes):
    axes[0].plot(rates, mixed, marker="o")
    axes[0].set(title="one layer", xlabel="mixing rate", ylabel="efficacy")
    axes[1].plot(curve["dose"], curve["efficacy"], marker="s", color=plots.COLOURS[1])
    axes[1].set(title=MODEL, xlabel="dose (hijacking sentences)", xticks=range(5))
figure

# %% [markdown]
# Both curves rise, but in different ways. Mixing *removes* evidence for the first label and adds
# evidence for the second, in proportion to the rate. A sentence only adds evidence, and the first
# sentence has nearly the full effect: repetitions of the same cue add little. This is the first
# limit of the analogy.
#
# ## 2. Does the answer need that attention?
#
# The same probe works on both models: it hides the tokens that give the last token its evidence. In
# the one-layer model these are the cluster of the last token, in the language model the hijacking
# sentence.

# %%
cut = {"one layer": attention.knock_out("last", "cluster")}
cut[MODEL] = attention.knock_out("last", "hijack")
before = trained.accuracy()["accuracy"].max()
after = trained.accuracy(probes=[cut["one layer"]])["accuracy"].max()
print(f"one layer: accuracy {before:.3f} -> {after:.3f} without the cluster (chance 0.031)")
plain = curve.set_index("dose")["efficacy"]
scores = hl.hijack(model, facts, doses=[0, 1], probes=[cut[MODEL]], quiet=True).summary()
blind = scores.set_index("dose")["efficacy"]
print(f"{MODEL}: efficacy at dose 1 {plain[1]:.3f} -> {blind[1]:.3f} without the sentence")
print(f"    (bare query: {plain[0]:.3f})")

# %% [markdown]
# The same view shows for both models which tokens the last token attends to.

# %%
context = task.sample(1, torch.Generator().manual_seed(1)).tokens[0]
below = views.attended(small, context, task=task)
half = model.cfg.n_layers // 2
late = range(half, model.cfg.n_layers)
above = views.attended(model, facts[0], scheme="do-not-think", layers=late, without="at:0")
views.Sheet((below, above))

# %% [markdown]
# ## 3. How much of the value matrices is needed?
#
# We replace every W_V by its best approximation of low rank. If the memory of the paper explained
# everything, a few directions might be enough. (In the one-layer model 16 is the full rank. In the
# language model it is 64 per head, and all layers are replaced at once.)

# %%
rows = []
for rank in (2, 8, 16):
    low = [values.replace(values.low_rank(rank))]
    right = trained.accuracy(probes=low)["accuracy"].max()
    scores = hl.hijack(model, facts, doses=[0, 1], probes=low, quiet=True).summary()
    rows.append((rank, right, *scores["efficacy"]))
columns = ["rank", "one layer: accuracy", "efficacy at dose 0", "efficacy at dose 1"]
pd.DataFrame(rows, columns=columns).set_index("rank").round(3)

# %% [markdown]
# Look at dose 0 first. If efficacy on the bare query is near one half, the model has lost its
# *knowledge*, and efficacy at dose 1 says nothing about hijacking.
#
# ## 4. Is a head a sum of outer products?
#
# In the one-layer model, W_V is mostly the matrix of equation 5.1. What fraction of a head's OV
# circuit is a sum of outer products of subjects and their targets? `p_family` is the probability of
# at least this value with shuffled associations or random matrices, corrected for the number of
# tests.

# %%
fits = memory_fit.fit(small, task).summary()
fits[["statistic", "value", "p_family"]].round(3)

# %%
pairs = associations.of_facts(facts, model.tokenizer)
last = model.cfg.n_layers - 1
heads = [(last, 0), (last, 1), (last, 2), (last // 2, 0)]
fits = memory_fit.fit(model, pairs, heads=heads).summary()
fits[["layer", "head", "statistic", "value", "p_family"]].round(4)

# %% [markdown]
# For each statistic the summary names the head with the highest value. `recall` is the fraction of
# wrong answers that score below the right one, so chance is one half. A head can retrieve some of
# the associations although they make up hardly any of its matrix, which serves many other purposes.

# %% [markdown]
# ## What to conclude, and what not
#
# - The analogy holds for attention: cues add up at the last token through attention, and without
#   that attention both models lose the effect.
# - It fails in three ways. The language model saturates after one sentence. Its knowledge is spread
#   over many layers and MLPs, which the one-layer model does not have. And outer products of these
#   facts are a tiny fraction of a head's matrix. (This does not prove that there is no memory: a
#   late layer reads the residual stream at its depth, not the embeddings.)
# - An analogy suggests hypotheses; they still have to be tested. `hijacklens reproduce --list`
#   lists our tests.
