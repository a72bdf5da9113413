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
# # 1 · Hijack a model in five minutes
#
# If we put "Do not think of Guam." before "The Eiffel Tower is in the city of", many language
# models move from Paris towards Guam, although nothing false was stated. The paper calls this
# *context hijacking* (Jiang et al. 2024, section 2). Here we look at one prompt, then measure the
# effect on sixty facts.
#
# The model is SmolLM2 135M, which is installed as a Python package; any model name on the Hugging
# Face hub works too.

# %%
import hijacklens as hl
from hijacklens import views
from hijacklens.scoring import efficacy

MODEL = "smollm2-135m"
model = hl.load_model(MODEL)

# %% [markdown]
# ## One prompt
#
# What does the model answer without the sentence, and what with it?

# %%
query = "The Eiffel Tower is in the city of"
for text in (query, f"Do not think of Guam. {query}"):
    said = hl.answer(model, text, targets=["Paris", "Guam"], tokens=6)
    paris, guam = said.targets
    print(f"{text} ->{said.completion.splitlines()[0]}")
    print(f"    Paris: p = {paris.probability:.2f}    Guam: p = {guam.probability:.1e}")
    print(f"    Guam is the {guam.rank + 1:,}th most likely next token")

# %% [markdown]
# The best-known example does not work on this model. It still answers Paris, with an even higher
# probability. Yet Guam has become more probable, too. One prompt says little, so we now score many
# facts.
#
# ## Sixty facts
#
# The *atlas* is a small set of facts that comes with the project. Each has a true target (o\*) and
# a false one (o_).

# %%
facts = hl.atlas().sample(60, seed=0)
facts[0]

# %% [markdown]
# The *dose* is the number of hijacking sentences before the query. Dose 0 is the bare query.

# %%
result = hl.hijack(model, facts, schemes=["do-not-think"], doses=range(4))
columns = ["dose", "n", "efficacy", "efficacy_low", "efficacy_high", "retention", "mean_shift"]
result.summary()[columns].round(3)

# %%
result.plot()

# %% [markdown]
# ## Reading the signs
#
# - **efficacy** is the fraction of facts with score(false) > score(true). Hijacking *raises* it. It
#   is the paper's efficacy score (section 2).
# - **retention** is the fraction with score(true) > score(false): the facts that the model still
#   recalls.
# - **mean_shift** is how much, on average, the false target gained on the true one, in nats.
# - The interval is a 95% Wilson interval about *these facts*, not about models or prompts.
#
# Some summaries say that efficacy *drops* under hijacking. They use the opposite sign, so
# hijacklens always shows both fractions.
#
# ## Which facts flipped?
#
# `result.items` has a row per fact and dose, with log-probabilities in nats.

# %%
# The margin is false minus true, in nats.
margins = result.items.assign(margin=efficacy.margin(result.items, "first"))
wide = margins.pivot(index=["case_id", "subject"], columns="dose", values="margin")
flipped = wide[(wide[0] < 0) & (wide[1] > 0)]
print(f"{len(flipped)} of {(wide[0] < 0).sum()} known facts flip at dose 1")
flipped.sort_values(1, ascending=False).head(5).round(2)

# %% [markdown]
# ## Is it the "not"?
#
# Controls show which part of the sentence matters. `think` is the sentence without "not"; `mention`
# only names the false target; `unrelated` is a sentence about the weather; `do-not-think-true`
# names the *true* target.

# %%
schemes = ["do-not-think", "think", "mention", "unrelated", "do-not-think-true"]
controls = hl.hijack(model, facts, schemes=schemes, doses=[0, 1])
controls.summary().query("dose == 1")[["scheme", "efficacy", "retention", "mean_shift"]].round(3)

# %% [markdown]
# Without "not" the sentence flips more facts than with it, so the negation has a small effect but
# does not prevent the hijack. The bare mention flips fewer facts, the sentence about the weather
# flips none, and a mention of the true target has the opposite effect. This agrees with the paper's
# explanation: the tokens of the context are cues to an associative memory (section 1), whatever the
# sentence means.
#
# ## Where does the last token look?
#
# The model's answer is read at the last token. Below, each token is coloured by the attention that
# the last token pays to it, averaged over the second half of the layers. Most attention goes to the
# first token, whatever it is (the *attention sink*), so the view omits that token.

# %%
fact = facts.where(case_ids=[flipped.index[0][0] if len(flipped) else facts[0].case_id])[0]
run = views.run(model, fact, scheme="do-not-think", dose=1)
half = run.patterns.shape[0] // 2
run.attended("last", layers=range(half, 2 * half), without="at:0")

# %% [markdown]
# ## What to conclude, and what not
#
# - One sentence that states nothing false changes many answers of this model, on facts like these.
# - It does *not* follow that the model now believes something else, nor that a larger model is
#   affected as much.
# - Attention shows which tokens a head reads, not what it writes. The next notebook examines what
#   heads write.
