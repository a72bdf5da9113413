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
# # 2 · Which heads did it: from efficacy to heads
#
# The efficacy score (ES) shows *that* a model was hijacked. This notebook asks four more questions.
# Which parts of the model write the shift? Is attention to the hijacking sentence needed for it?
# Which heads carry it? And do these heads also carry it on facts that did not select them?

# %%
import hijacklens as hl
from hijacklens import views
from probes import attention, heads, logit_shift

MODEL = "smollm2-135m"
model = hl.load_model(MODEL)
facts = hl.atlas().sample(60, seed=1)

# %% [markdown]
# ## Step 1: the account
#
# The *logit shift* is (logit o_ − logit o\*) on the hijacked prompt, minus the same difference on
# the bare query. If it is above zero, the hijack moved the model towards the false target. The
# shift is a sum over all parts that write to the last position, so it can be decomposed exactly, by
# attended token and head.

# %%
pairs = hl.pairs(model, facts, scheme="do-not-think", dose=1)
average = logit_shift.average(model, pairs, quiet=True)
shift = average.shift
print(f"mean shift {shift.value:+.2f} logits [{shift.low:+.2f}, {shift.high:+.2f}]")
print(f"largest residual over all facts: {average.residual:.1e} logits")
average.plot(by=("span", "layer"))

# %% [markdown]
# Read the map row by row. `mention` is the word in the hijack that names the false target; `hijack`
# is the rest of the sentence. The small residual confirms that the parts sum to the shift.
#
# The account covers *direct writing* only: if a head acts through a later layer, its effect is
# counted in that layer.
#
# ## Step 2: knock out the attention
#
# If the last token cannot attend to the hijacking sentence, does the hijack disappear? Attention
# patterns are only correlational evidence; a knock-out is an intervention.

# %%
blind = attention.knock_out(source="last", target="hijack")
plain = hl.hijack(model, facts, doses=[0, 1], quiet=True).summary()
blinded = hl.hijack(model, facts, doses=[0, 1], probes=[blind], quiet=True).summary()
columns = ["dose", "efficacy", "retention", "mean_shift"]
plain[columns].merge(blinded[columns], on="dose", suffixes=("", " blind")).round(3)

# %% [markdown]
# Efficacy *rises* under hijacking, so if efficacy returns to its value at dose 0, the hijack is
# undone.
#
# There is a confound: SmolLM2 gets no beginning-of-sequence token, so the first word of the hijack
# is also the attention sink. Hiding the sentence hides the sink, too. A control therefore hides
# only that token.

# %%
sink = attention.knock_out(source="last", target="at:0")
hl.hijack(model, facts, doses=[0, 1], probes=[sink], quiet=True).summary()[columns].round(3)

# %% [markdown]
# Hiding that one word makes the hijack *stronger* and also degrades recall on the bare query. So
# the sink matters, but in the opposite direction: it does not explain why the knock-out above
# worked. Only the control shows this.
#
# ## Step 3: search for heads
#
# We choose the heads on half of the facts and test them on the other half. A gradient gives an
# estimate for every head; then the candidates with the largest estimates are ablated one by one
# (their output is replaced by its mean). We search the second half of the layers, where the account
# shows the largest parts.

# %%
searched, unseen = heads.halves(facts, by="fact", seed=0)
late = range(model.cfg.n_layers // 2, model.cfg.n_layers)
pairs = hl.pairs(model, searched, scheme="do-not-think", dose=1)
found = heads.search(model, pairs, size=3, candidates=6, layers=late, quiet=True)
print("chosen:", ", ".join(f"layer {layer} head {head}" for layer, head in found.heads))
found.growth.round(3)

# %% [markdown]
# ## Step 4: test on held-out facts
#
# We test the heads on the other half of the facts, and compare them with random sets: some have as
# many heads in the same layers, and some harm bare recall as much. A set of heads that undoes no
# more than a random set explains nothing.
#
# `none` is the hijacked prompt with no head ablated, `chosen` the same with the chosen heads
# ablated. `recovered` is the fraction of the change from bare to hijacked that the ablation undoes.

# %%
trial = found.test(unseen, random_sets=3, quiet=True)
table = trial.summary().query("relations == 'all'")
shown = ["measure", "bare", "none", "chosen", "recovered", "recovered_low", "recovered_high"]
table[shown].round(2)

# %%
trial.plot()

# %% [markdown]
# ## Attention of the chosen heads
#
# Which tokens do the chosen heads attend to in one hijacked prompt? Hover over a small map to see
# it in full, and click to keep it.

# %%
run = views.run(model, unseen[0], scheme="do-not-think", dose=1)
views.Sheet((run.attended("last", heads=found.heads, without="at:0"), run.heads(found.heads)))

# %% [markdown]
# ## What to conclude, and what not
#
# - The shift is written in late layers. Its largest single part is attention to the word that names
#   the false target, in one layer; the last MLPs add nearly as much. The attention part fits the
#   paper's picture, in which attention adds up cues and value matrices look up answers (section 1).
#   The MLP part has no counterpart in the one-layer model, which has no MLPs.
# - The chosen heads matter more than chance wherever the figure shows them outside the range of the
#   random sets. With 30 facts the intervals are wide; use a few hundred for a paper.
# - Look at the shift, at the efficacy, and at the third panel, which shows bare recall: heads whose
#   ablation destroys recall would "undo" any hijack. A search over all layers with few facts finds
#   such heads.
# - Three heads carry a good part of the shift, not all of it. The rest is spread over many parts.
# - The result is about this model under this scheme. `found.test(unseen, schemes="relation")` tests
#   whether the heads carry the effect of another scheme too.
