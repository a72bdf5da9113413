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
# # 7 · A world whose facts are known: switch the hijack off
#
# Nobody knows what a language model was trained on, so nobody can say which property of the data
# makes it give way. Here we write the data ourselves: documents about a small world of subjects and
# objects. We train two ordinary GPT-2s of two layers on it, which takes a minute, and change one
# property of the documents between them.

# %%
import hijacklens as hl
from analyses import law
from hijacklens.world.distribution import Documents
from hijacklens.world.trained import Recipe

worlds = {"together": hl.World(sharing=1.0), "apart": hl.World(sharing=0.0)}
for name, world in worlds.items():
    print(name)
    for document in Documents(world, seed=1).batch(0, 2):
        print("  ", world.text(document))

# %% [markdown]
# Every document has a topic, which is an object. *Together*, the facts of a document are about
# objects near its topic, as in an encyclopedia. *Apart*, each fact has a separate topic. Every
# sentence alone is as frequent in both worlds: only the tie between facts and talk differs.
#
# ## Step 1: train both models

# %%
trained = {
    name: hl.train_world(world, Recipe(steps=650, checkpoints=0), out=f"runs/{name}", quiet=True)
    for name, world in worlds.items()
}
trained["together"]

# %% [markdown]
# The loss is compared with that of an ideal reader, who knows every probability of this world.
# *Frequent* are the queries of the most frequent tenth of the subjects. With 1,300 steps, the
# default of `hijacklens world`, the model recalls nearly all of them; the hijack does not wait.
#
# ## Step 2: hijack them
#
# The folder of a trained world has an ordinary model and a file of facts. Besides "Do not think
# of", we put talk about the false target before the query.

# %%
talk = hl.Scheme(name="talk", template="People talk about {target_false} and {target_false}.")
runs = {}
for name, each in trained.items():
    model, facts = hl.load_model(each.model, name=name), hl.load_facts(each.facts)
    runs[name] = hl.hijack(model, facts, schemes=["do-not-think", talk], doses=range(4), quiet=True)
    print(name)
    shifts = runs[name].summary().pivot(index="dose", columns="scheme", values="mean_shift")
    print(shifts.round(2), "\n")

# %%
runs["together"].plot()

# %% [markdown]
# Where facts and talk share documents, talk moves the answer towards the false target. Where they
# do not, it moves nothing. In training, the object of "Do not think of" is any object, so this
# sentence says nothing about a fact. The model treats it like talk all the same.
#
# ## Step 3: what should the context be worth?
#
# An ideal reader of this corpus who does not know the facts has the context alone. Its shift is the
# exact log-likelihood ratio of the context, in nats.

# %%
world = worlds["together"]
reader, fact = hl.Reader(world, knows=False), facts[0]
for dose in (1, 2, 3):
    context = f"{talk.sentence(fact)} " * dose
    worth = reader.margin(context + fact.prompt, fact.target_true, fact.target_false)
    print(dose, f"{worth:.2f} nats")

# %% [markdown]
# ## Step 4: which law?
#
# `law.exact` draws sentences of talk and reads queries with the model. Which formula predicts how
# far each query shifts? A law is fitted on some objects and predicts queries about others.

# %%
model = hl.load_model(trained["together"].model)
table = law.exact(world, model, facts=200, doses=[1])
law.compare(table, laws=law.LAWS[:-1], folds=4, quiet=True)

# %% [markdown]
# The law `posterior` wins: the shift grows with what the sentence alone predicts. All others are as
# good as a constant.
#
# The study in `docs/world` has five seeds, other knobs, the checkpoints along training, and
# circuits that are set by hand.
