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
# # 4 · Bring your own model, facts and scheme
#
# You can replace every ingredient of a hijacklens run by your own. This notebook replaces four, the
# easiest first: the sentence, the facts, the model and the probe.

# %%
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hijacklens as hl
from hijacklens.probe import HookProbe
from hijacklens.scoring import efficacy

MODEL = "smollm2-135m"
model = hl.load_model(MODEL)

# %% [markdown]
# ## Your own scheme
#
# A scheme is a sentence with placeholders. Must it be an instruction at all? The scheme `dream`
# only mentions a dream (the paper's title asks "Do LLMs dream of elephants?").

# %%
hl.add_scheme("dream", "Last night I dreamt of {target_false}.")
facts = hl.atlas().sample(40, seed=2)
result = hl.hijack(model, facts, schemes=["do-not-think", "dream"], doses=[0, 1, 2], quiet=True)
result.plot()

# %% [markdown]
# ## Your own facts
#
# A CSV file with five columns is enough: the relation, the subject, a prompt with `{}` in place of
# the subject, and the two targets. (JSON, JSON lines, parquet and all published layouts of
# CounterFact work, too.)

# %%
rows = [
    ("capital", "France", "The capital of {} is", "Paris", "Oslo"),
    ("capital", "Japan", "The capital of {} is", "Tokyo", "Lima"),
    ("capital", "Italy", "The capital of {} is", "Rome", "Cairo"),
    ("capital", "Spain", "The capital of {} is", "Madrid", "Berlin"),
    ("opposite", "hot", "The opposite of {} is", "cold", "green"),
    ("opposite", "big", "The opposite of {} is", "small", "loud"),
]
columns = ["relation_id", "subject", "prompt", "target_true", "target_false"]
table = pd.DataFrame(rows, columns=columns).assign(case_id=range(len(rows)))
table.to_csv("mine.csv", index=False)
mine = hl.counterfact("mine.csv")
mine

# %%
own = hl.hijack(model, mine, schemes=["dream"], doses=[0, 1], quiet=True)
items = own.items.assign(margin=efficacy.margin(own.items, "first"))
items.pivot(index="subject", columns="dose", values="margin").round(2)

# %% [markdown]
# The margin is score(false) - score(true), in nats: below zero the true target leads. Six facts are
# too few for a conclusion, as the wide intervals show.

# %%
own.summary()[["dose", "n", "efficacy", "efficacy_low", "efficacy_high", "retention"]].round(2)

# %% [markdown]
# ## Your own model
#
# `hl.load_model` takes a hub name, a folder, or Hugging Face objects. As a control we use an
# untrained model of the same architecture: it knows no facts, so there is nothing to hijack.

# %%
torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=len(model.tokenizer),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=model.tokenizer.bos_token_id,
    eos_token_id=model.tokenizer.eos_token_id,
)
untrained = hl.load_model(LlamaForCausalLM(shape).eval(), tokenizer=model.tokenizer)
hl.hijack(untrained, facts, doses=[0, 1], quiet=True).summary()[
    ["dose", "efficacy", "efficacy_low", "efficacy_high", "mean_shift"]
].round(2)

# %% [markdown]
# In a model without knowledge of the facts, efficacy is near one half at every dose. So an efficacy
# of one half does not mean "half hijacked"; always compare it with dose 0.
#
# ## Your own probe
#
# A probe is a list of TransformerLens hooks with a name. This one halves the output of the last
# quarter of the attention layers. The hooks are removed even if an error occurs, so the model stays
# unchanged.

# %%
layers = range(3 * model.cfg.n_layers // 4, model.cfg.n_layers)
hooks = [(f"blocks.{i}.hook_attn_out", lambda value, hook: 0.5 * value) for i in layers]
quiet = HookProbe("half-attention-late", hooks, packs=True)
pd.concat(
    {
        "plain": hl.hijack(model, facts, doses=[0, 1], quiet=True).summary(),
        "halved": hl.hijack(model, facts, doses=[0, 1], probes=[quiet], quiet=True).summary(),
    },
    names=["model", "row"],
)[["dose", "efficacy", "retention", "mean_shift"]].round(3)

# %% [markdown]
# ## Save the result
#
# A saved result contains everything that is needed to check it later: hashes of the data, versions,
# the seed, and the facts that could not be scored.

# %%
folder = result.save("dream-study")
print(sorted(path.name for path in Path(folder).iterdir()))
again = hl.load_result("dream-study")
again.summary().equals(result.summary())

# %% [markdown]
# ## What to conclude, and what not
#
# - A new scheme takes one line, and the other replacements take only a few. Change one thing at a
#   time, and run a control with it.
# - If a scheme works on forty facts of one model, you know that about these facts and this model.
#   The two cheapest controls are a neutral sentence (`unrelated`) and the untrained model.
