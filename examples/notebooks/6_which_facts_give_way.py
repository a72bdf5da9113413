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
# # 6 · Which facts give way: laws of the shift
#
# One sentence moves some facts by fifteen nats and others not at all. Can we say which, before the
# model reads the sentence? This notebook compares eight laws that answer this question, first where
# the answer is known, then on a language model.
#
# The *margin* is log p(o_) − log p(o\*): above zero, the false target wins. The *shift* is the
# margin after the hijack minus that of the bare query. A law is a formula for the shift. It may use
# only what is known without the hijacked run.

# %%
import hijacklens as hl
from analyses import law

# %% [markdown]
# ## Step 1: where the answer is known
#
# In the task of latent concept association the posterior can be computed. A sentence of three
# tokens of another label precedes a query of twelve, once or three times. The exact posterior
# *adds* the evidence of every sentence, so that the law `posterior` holds exactly, and nothing else
# does.

# %%
table = law.exact(hl.ConceptTask(bits=4, length=12), facts=100, doses=[1, 3])
known = law.compare(table, folds=3, quiet=True)
print("selected:", known.selected())
known

# %% [markdown]
# The ceiling, a ridge regression on all predictors, has the same information, but it is linear.
#
# ## Step 2: a language model
#
# Two runs of the model are needed for the predictors: the bare query, and the sentence alone. A
# third run, the hijacked one, is only used to measure the shift. SmolLM2 adds no BOS, so every
# prompt gets a neutral opening.

# %%
model = hl.load_model("smollm2-135m")
facts = hl.atlas().sample(150, seed=0).with_opening("Well.")
run = hl.hijack(model, facts, schemes=["do-not-think"], doses=[0, 1], quiet=True)
predictors = law.predictors(model, facts, ["do-not-think"], quiet=True)
table = law.measured(run, predictors)
shift = table["shift"]
print(f"{len(table)} facts shift by {shift.mean():.1f} nats (standard deviation {shift.std():.1f})")

# %%
result = law.compare(table, folds=5, quiet=True)
result

# %% [markdown]
# Every law was fitted on some relations and predicted the others. R² of the constant law is at most
# 0: it predicts the same shift for all facts. Its AUC is high all the same, since a fact with a
# small margin flips first whatever the law. So compare laws by R², and by their paired differences:

# %%
gains = result.differences.query("measure == 'r2' and other == 'ceiling'")
gains[["reference", "difference", "difference_low", "difference_high", "p"]].round(3)

# %% [markdown]
# With 150 facts the intervals are wide. The study in `docs/law` has 2,000 facts and both packaged
# models.

# %%
result.plot(what="predicted", law="ceiling")

# %% [markdown]
# ## Step 3: one fact
#
# `explain` fits a law on all other relations and splits its prediction into parts: what the
# prediction would change by if one predictor had its value instead of its mean.

# %%
case = int(result.surprises("ceiling", count=1)["case_id"].iloc[0])
explained = result.explain(case)
print(explained.name)
explained.round(2).head(9)

# %% [markdown]
# The fact above is the one that the ceiling predicts worst. Read the largest surprises before you
# trust a law: they show what it does not know.

# %%
result.surprises("ceiling", count=5).round(2).drop(columns=["model", "scheme", "case_id"])
