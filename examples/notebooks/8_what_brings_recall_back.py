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
# # 8 · What brings recall back, and what it costs
#
# A model gives way, and you want it to stop. This notebook compares three defences on equal terms:
# what each undoes, and what it costs. It also adds one of your own.

# %%
import hijacklens as hl
from analyses import defence
from probes import attention

model = hl.load_model("smollm2-135m")
facts = hl.atlas().sample(150, seed=0).with_opening("Well.")

# %% [markdown]
# ## Step 1: a method of your own
#
# A method changes the prompt, adds probes, or combines two distributions. This one halves the
# attention that the query pays to the named word. Its placebo does the same to another token: a
# method helps only if it beats its placebo.

# %%
mine = defence.Method(
    name="half-mention",
    source="this notebook",
    changes="probes",
    needs="span of the distraction",
    make=lambda learned: [attention.rescale(0.5, "query", "mention")],
    placebo=lambda learned: [attention.rescale(0.5, "query", "at:1")],
)

# %% [markdown]
# ## Step 2: the comparison
#
# A fifth of the relations is for learning, a fifth chooses settings, and the others test. `nothing`
# and `oracle`, which reads the query without its context, are always there.

# %%
result = hl.defend(
    model,
    facts,
    schemes=["do-not-think"],
    methods=["separator", "against-context", mine],
    protocol=defence.Protocol(tuning=20),
    quiet=True,
)
result

# %% [markdown]
# `undone` is the fraction of the rise in efficacy that a method undoes. `bare` is the change of
# retention on bare queries, and `helpful` that under contexts that help. The oracle undoes
# everything, and loses the answers that only the context has: to drop the context is no defence.

# %%
result.plot()

# %% [markdown]
# The shaded corner has what undoes at least half at a loss of at most .02. Hollow points are
# placebos.
#
# ## Step 3: the settings, and the costs with their intervals

# %%
result.tuning.drop(columns="model").round(2)

# %%
costs = result.costs.set_index("method").drop(columns="model")
costs[~costs.index.str.startswith("placebo")].T.round(3)

# %% [markdown]
# With so few facts the intervals are wide. The study in `docs/defence` has two models, four
# schemes, all methods and 300 held-out facts.
