"""Facts whose posterior is known: contexts of latent concept association.

A fact is a context of one label (the query) and another label, the false target. The hijacking
sentence are tokens of that other label, put before the query once or more. By the exact rule the
shift is the sum of log-likelihood ratios of the sentence, k times that of one sentence, so the law
`posterior` holds with c = 0; in a one-layer model with uniform attention, which averages over
tokens, it holds with a mixing rate that is the fraction of sentence tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cosine_similarity

from analyses.law.predictors import PREDICTORS, after
from hijacklens.one_layer.evaluation import BayesRule, answers
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask


def exact(
    task: ConceptTask,
    model: OneLayerTransformer | None = None,
    *,
    facts: int = 500,
    sentence: int = 3,
    doses: Sequence[int] = (1, 2, 5),
    seed: int = 0,
) -> pd.DataFrame:
    """Return the table of `analyses.law.measured` for drawn contexts.

    Args:
        task: Its length is that of a query.
        model: A one-layer model of the task; by default the exact posterior.
        facts: How many facts to draw; the relation of a fact is its label.
        sentence: Tokens of a hijacking sentence.
        doses: How many copies of the sentence precede the query.
        seed: Seeds the draw.
    """
    draw, rows = torch.Generator().manual_seed(seed), torch.arange(facts)
    queries = task.sample(facts, draw)
    true, tokens = queries.labels, queries.tokens
    false = (true + torch.randint(1, task.vocab, (facts,), generator=draw)) % task.vocab
    noisy = task.token_distribution()
    cue = torch.multinomial(noisy[false], sentence, replacement=True, generator=draw)
    score = BayesRule(task) if model is None else answers(model, task)

    def read(prompt: torch.Tensor) -> torch.Tensor:
        return score(prompt).detach().double().log_softmax(1)

    bare = read(tokens)
    # The exact rule takes the last token of a context for informative, which a cue's is not.
    alone = read(torch.cat([cue, tokens[:, -1:]], 1)) - read(tokens[:, -1:])
    alone = alone if model is None else read(cue)
    embeddings = torch.eye(task.vocab) if model is None else model.W_E.detach()
    mention = embeddings[cue].mean(1)
    columns = after(bare, torch.stack([true, false], 1)) | {
        "sentence_true": alone[rows, true],
        "sentence_false": alone[rows, false],
        "tokens_query": torch.full((facts,), task.length),
        "tokens_sentence": torch.full((facts,), sentence),
        "similarity_true": cosine_similarity(mention, embeddings[true]),
        "similarity_false": cosine_similarity(mention, embeddings[false]),
        "similarity_targets": cosine_similarity(embeddings[true], embeddings[false]),
    }
    none = np.zeros(facts)
    table = pd.DataFrame({name: np.asarray(columns.get(name, none), float) for name in PREDICTORS})
    parts = []
    for dose in doses:
        hijacked = read(torch.cat([cue.repeat(1, dose), tokens], 1))
        shift = (hijacked[rows, false] - hijacked[rows, true]).numpy() - table["prior"]
        parts.append(table.assign(case_id=rows.numpy(), dose=dose, shift=shift))
    table = pd.concat(parts).assign(
        model="exact posterior" if model is None else "one-layer", scheme="cue", subject="",
        relation_id=lambda each: [f"label {true[case]}" for case in each["case_id"]],
        target_true=lambda each: [str(int(true[case])) for case in each["case_id"]],
        target_false=lambda each: [str(int(false[case])) for case in each["case_id"]],
    )  # fmt: skip
    # By the exact rule a label cannot give a query that ends in it.
    return table.replace([np.inf, -np.inf], np.nan).dropna().reset_index(drop=True)
