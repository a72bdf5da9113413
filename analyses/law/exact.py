"""Facts whose posterior is known: contexts of latent concept association, or of a pocket world.

A fact is a query with a true target, and another object as the false target. The hijacking sentence
is drawn like those about the false target, and precedes the query once or more.

    concept task    Contexts of one label with a sentence of tokens of another one. By the exact
                    rule the shift is the sum of log-likelihood ratios of the sentence, so the law
                    `posterior` holds with c = 0; in a one-layer model with uniform attention, which
                    averages over tokens, it holds with a mixing rate.
    pocket world    Queries about subjects with talk about two objects. An ideal reader who knows
                    the facts also takes the topic from the subject, so no formula holds exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch.nn.functional import cosine_similarity

from analyses.law.predictors import PREDICTORS, SIDES, after
from hijacklens.errors import one_of_type
from hijacklens.models.hooked import HookedLanguageModel, device_of
from hijacklens.one_layer.evaluation import BayesRule, answers
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.one_layer.task import ConceptTask
from hijacklens.world.distribution import Reader
from hijacklens.world.world import SCHEMES, World


def exact(
    task: ConceptTask | World,
    model: OneLayerTransformer | HookedLanguageModel | None = None,
    *,
    facts: int = 500,
    sentence: int = 3,
    doses: Sequence[int] = (1, 2, 5),
    seed: int = 0,
) -> pd.DataFrame:
    """Return the table of `analyses.law.measured` for drawn facts; the relation is the true target.

    Args:
        task: A concept task, whose length is that of a query; or a pocket world.
        model: A one-layer model of the task, or a model of the world; by default the exact
            posterior.
        facts: How many facts to draw.
        sentence: Tokens of a hijacking sentence of the concept task.
        doses: How many copies of the sentence precede the query.
        seed: Seeds the draw.

    Raises:
        InputError: The model of a concept task is no one-layer model.

    Note:
        Costs an ideal reading, or a forward pass, per fact and dose: some 30 s for 500 facts of the
        default world.
    """
    if isinstance(task, World):
        return _of_world(task, model, facts, doses, np.random.default_rng(seed))
    draw, rows = torch.Generator().manual_seed(seed), torch.arange(facts)
    queries = task.sample(facts, draw)
    true, tokens = queries.labels, queries.tokens
    false = (true + torch.randint(1, task.vocab, (facts,), generator=draw)) % task.vocab
    noisy = task.token_distribution()
    cue = torch.multinomial(noisy[false], sentence, replacement=True, generator=draw)
    if model is not None:
        model = one_of_type("model", model, OneLayerTransformer, "hl.train(...) of that task")
    score = BayesRule(task) if model is None else answers(model, task)

    def read(prompt: torch.Tensor) -> torch.Tensor:
        return score(prompt).detach().double().log_softmax(1)

    bare = read(tokens)
    if model is None:
        # The exact rule takes the last token of a context for informative, which a cue's is not.
        alone = read(torch.cat([cue, tokens[:, -1:]], 1)) - read(tokens[:, -1:])
        embeddings = torch.eye(task.vocab)
    else:
        alone, embeddings = read(cue), model.W_E.detach()
    mention = embeddings[cue].mean(1)
    columns = {
        "tokens_query": torch.full((facts,), task.length),
        "tokens_sentence": torch.full((facts,), sentence),
        "similarity_true": cosine_similarity(mention, embeddings[true]),
        "similarity_false": cosine_similarity(mention, embeddings[false]),
        "similarity_targets": cosine_similarity(embeddings[true], embeddings[false]),
    }
    hijacked = {dose: read(torch.cat([cue.repeat(1, dose), tokens], 1)) for dose in doses}
    table = _table(torch.stack([true, false], 1), bare, alone, hijacked, columns)
    name = "exact posterior" if model is None else "one-layer"
    labels = [str(label) for label in range(task.vocab)]
    table = _named(table, name, rows.tolist(), labels, relation="label ")
    # By the exact rule a label cannot give a query that ends in it.
    return table.replace([np.inf, -np.inf], np.nan).dropna().reset_index(drop=True)


def _of_world(world: World, model: Any, facts: int, doses: Sequence[int], draw: Any) -> Any:
    """Return the table of queries of a world, read by an ideal reader or by a model."""
    queries = list(world.queries())
    chosen = [queries[i] for i in draw.choice(len(queries), min(facts, len(queries)), False)]
    number = {word: i for i, word in enumerate(world.objects)}
    targets = [[number[query[f"target_{side}"]] for side in ("true", "false")] for query in chosen]
    talk = SCHEMES["talk"].replace("{target_false}", "{}")
    topics = [draw.choice(world.n_objects, 2, p=world.related[false]) for _, false in targets]
    said = [talk.format(*(world.objects[i] for i in each)) for each in topics]
    asked = [query["template"].format(query["subject"]) for query in chosen]
    reader = Reader(world)

    def ideal(text: str) -> Any:
        with np.errstate(divide="ignore"):
            return torch.tensor(np.log(reader.posterior(text)))

    def trained(text: str) -> Any:
        with torch.no_grad():
            logits = model(torch.tensor([world.tokens(text)], device=device_of(model)))[0, -1]
        return logits.double().cpu()[[world.ids[word] for word in world.objects]]

    def read(texts: Iterable[str]) -> torch.Tensor:
        found = [(ideal if model is None else trained)(text) for text in texts]
        return torch.stack(found).log_softmax(1)

    # What a sentence predicts of an object without the query: the next one in talk.
    alone = read(f"{sentence} {talk.split(' {}')[0]}" for sentence in said)
    both = list(zip(said, asked, strict=True))
    hijacked = {k: read(f"{sentence} " * k + query for sentence, query in both) for k in doses}
    columns = {
        "tokens_query": torch.tensor([len(world.tokens(text)) for text in asked]),
        "tokens_sentence": torch.tensor([len(world.tokens(text)) for text in said]),
    }
    table = _table(torch.tensor(targets), read(asked), alone, hijacked, columns)
    name = "ideal reader" if model is None else "trained model"
    cases = [query["case_id"] for query in chosen]
    return _named(table, name, cases, world.objects)


def _table(
    targets: Int[torch.Tensor, "row 2"], bare: Any, alone: Any, hijacked: Mapping[int, Any],
    columns: Mapping[str, torch.Tensor],
) -> pd.DataFrame:  # fmt: skip
    """Return a row per dose and fact: predictors, shift, and the numbers of both targets."""
    every = torch.arange(len(targets))
    columns = {
        **after(bare, targets), **columns,
        **{f"sentence_{side}": alone[every, targets[:, i]] for i, side in enumerate(SIDES)},
    }  # fmt: skip
    none = np.zeros(len(targets))
    table = pd.DataFrame({name: np.asarray(columns.get(name, none), float) for name in PREDICTORS})
    table[["row", *SIDES]] = np.column_stack([every, targets])
    parts = []
    for dose, logprobs in hijacked.items():
        true, false = logprobs.gather(1, targets).T.numpy()
        parts.append(table.assign(dose=dose, shift=false - true - table["prior"]))
    return pd.concat(parts, ignore_index=True)


def _named(
    table: pd.DataFrame, model: str, cases: Sequence[int], words: Sequence[str], relation: str = ""
) -> pd.DataFrame:
    """Return the table with the columns that say which fact a row is of."""
    texts = {f"target_{side}": [words[i] for i in table.pop(side)] for side in SIDES}
    return table.assign(
        case_id=[cases[i] for i in table.pop("row")], model=model, scheme="cue", subject="",
        relation_id=[f"{relation}{word}" for word in texts["target_true"]], **texts,
    )  # fmt: skip
