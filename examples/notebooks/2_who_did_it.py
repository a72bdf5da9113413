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
# # 2 · Who did it: from ES to heads
#
# The efficacy score (ES) says *that* a model was hijacked. This is a detective story in four acts:
# where does the shift come from, is the suspect really needed, which heads were it, and do they
# do it again on facts that we never showed them?

# %%
import hijacklens as hl
from hijacklens import views
from probes import attention, heads, logit_shift

MODEL = "smollm2-135m"
model = hl.load_model(MODEL)
facts = hl.atlas().sample(60, seed=1)

# %% [markdown]
# ## Act 1: the account
#
# The *logit shift* is (logit o_ − logit o\*) hijacked, minus the same on the bare query. Above zero
# means: towards the false target. It is a sum over everything that writes to the last position, so
# it can be taken apart exactly: attended token by attended token, head by head.

# %%
pairs = hl.pairs(model, facts, scheme="do-not-think", dose=1)
average = logit_shift.average(model, pairs, quiet=True)
shift = average.shift
print(f"mean shift {shift.value:+.2f} logits [{shift.low:+.2f}, {shift.high:+.2f}]")
print(f"largest residual over all facts: {average.residual:.1e} logits")
average.plot(by=("span", "layer"))

# %% [markdown]
# Read the map row by row. `mention` is the one word in the hijack that names the false target;
# `hijack` is the rest of the sentence. The residual says that the parts really sum to the shift.
#
# An account of *direct writing* has a blind spot: a head that acts through a later layer shows
# there, not here.
#
# ## Act 2: take the suspect away
#
# If the last token may not look at the hijacking sentence, is the hijack gone? A knock-out is an
# experiment, where attention alone is only circumstantial evidence.

# %%
blind = attention.knock_out(source="last", target="hijack")
plain = hl.hijack(model, facts, doses=[0, 1], quiet=True).summary()
blinded = hl.hijack(model, facts, doses=[0, 1], probes=[blind], quiet=True).summary()
columns = ["dose", "efficacy", "retention", "mean_shift"]
plain[columns].merge(blinded[columns], on="dose", suffixes=("", " blind")).round(3)

# %% [markdown]
# Efficacy *rises* under hijacking, so an efficacy that comes back towards dose 0 means: undone.
#
# Careful: SmolLM2 gets no beginning-of-sequence token, so the first word of the hijack is also
# where heads rest their attention. Hiding the sentence hides that resting place too. The control
# hides that token alone.

# %%
sink = attention.knock_out(source="last", target="at:0")
hl.hijack(model, facts, doses=[0, 1], probes=[sink], quiet=True).summary()[columns].round(3)

# %% [markdown]
# Hiding that one word makes the hijack *stronger*, and hurts the bare query as well. So the resting
# place matters, but in the other direction: it is not why the knock-out above worked. Without
# such a control one would not know.
#
# ## Act 3: the line-up
#
# Half of the facts choose the heads, the other half will judge them. Every head gets an estimate
# from one gradient; the best candidates are then really ablated (their output replaced by its
# mean), one by one. We look in the upper half of the layers, where the account puts the writing.

# %%
searched, unseen = heads.halves(facts, by="fact", seed=0)
late = range(model.cfg.n_layers // 2, model.cfg.n_layers)
pairs = hl.pairs(model, searched, scheme="do-not-think", dose=1)
found = heads.search(model, pairs, size=3, candidates=6, layers=late, quiet=True)
print("chosen:", ", ".join(f"layer {layer} head {head}" for layer, head in found.heads))
found.growth.round(3)

# %% [markdown]
# ## Act 4: the trial
#
# On facts that they were not chosen on, and against random sets of as many heads. A circuit that
# is no better than a random one of its size is no circuit.
#
# `none` is the hijack untouched, `chosen` with the heads ablated, and `recovered` the share of the
# way from bare to hijacked that is undone.

# %%
trial = found.test(unseen, random_sets=3, quiet=True)
table = trial.summary().query("relations == 'all'")
shown = ["measure", "bare", "none", "chosen", "recovered", "recovered_low", "recovered_high"]
table[shown].round(2)

# %%
trial.plot()

# %% [markdown]
# ## The faces
#
# What do the chosen heads look at in one hijacked prompt? Hover over a small map, click to lock it.

# %%
run = views.run(model, unseen[0], scheme="do-not-think", dose=1)
views.Sheet((run.attended("last", heads=found.heads, without="at:0"), run.heads(found.heads)))

# %% [markdown]
# ## What to conclude, and what not
#
# - The shift is written late. Its largest single part is attention to the one word that names
#   the false target, in one layer; the last MLPs add nearly as much. The first half fits the
#   paper's picture of cues that attention adds up and value matrices look up (section 1); the
#   one-layer model has no MLPs.
# - The chosen heads matter beyond chance where they lie outside the random sets in the figure. With
#   30 facts the intervals are wide; take a few hundred for a paper.
# - Look at the shift and at the efficacy, and at the third panel: heads whose ablation breaks bare
#   recall would "undo" anything. A search over all layers of few facts finds such heads.
# - Three heads carry a good part of the shift, not all of it. The rest is spread thin.
# - These are heads of this model under this scheme. `found.test(unseen, schemes="relation")` asks
#   whether they carry another scheme too.
