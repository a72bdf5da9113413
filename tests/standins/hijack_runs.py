"""Results of hijack runs made up from numbers, without a model."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pandas as pd
from sample_facts import sample_facts

from hijacklens.engine.reading import Accounting
from hijacklens.facts.fact import Fact, FactsRecord
from hijacklens.prompts.schemes import SchemeRecord, get_scheme
from hijacklens.prompts.wordings import PROMPT_COLUMNS
from hijacklens.results.result import Provenance
from hijacklens.scoring.items import ITEM_COLUMNS, SKIPPED_COLUMNS
from hijacklens.scoring.result import HijackResult, HijackSettings, ReadingCounts, ScoredModel


def scored_model(name: str) -> ScoredModel:
    """The record of a model that was never run."""
    numbers = (
        "forward_tokens padded_tokens naive_tokens trie_tokens passes batch_tokens shrunk seconds "
        "peak_memory"
    )
    texts = [item.name for item in fields(Accounting) if item.name not in numbers.split()]
    return ScoredModel(
        name=name,
        revision=None,
        architecture="None",
        parameters=0,
        dtype="float32",
        device="cpu",
        weights_hash="0",
        tokenizer_hash="0",
        adds_bos=False,
        context_length=0,
        readings=ReadingCounts(computed=0, from_store=0, store="", store_off="not run"),
        engine=Accounting(
            **dict.fromkeys(texts, "none"), **(dict.fromkeys(numbers.split(), 0) | {"seconds": 0.0})
        ),
    )


def made_up_run(
    *,
    models=("alpha", "beta"),
    schemes=("do-not-think", "never-say"),
    doses=(0, 1, 2),
    facts: tuple[Fact, ...] = (),
    answers=(" the", " Paris", " Guam"),
    seed=0,
) -> HijackResult:
    """A run whose scores are drawn, so that verdicts and rules differ; one item is a tie."""
    random = np.random.default_rng(seed)
    facts = facts or tuple(sample_facts())
    rows = []
    for model in models:
        for scheme in schemes:
            for fact in facts:
                for dose in doses:
                    scores = -np.abs(random.normal(4, 3, 2)).astype("f4").astype(float)
                    counts = random.integers(1, 4, 2)
                    sums = scores - (counts - 1) * np.abs(random.normal(1, 1, 2))
                    tie = fact is facts[-1] and dose == doses[-1]
                    rows.append(
                        (
                            model,
                            fact.case_id,
                            fact.relation_id,
                            fact.subject,
                            scheme,
                            dose,
                            scores[0],
                            scores[0] if tie else scores[1],
                            *sums,
                            *counts,
                            answers[random.integers(len(answers))],
                            -float(np.abs(random.normal())),
                            tie,
                        )
                    )
    sentence = get_scheme("do-not-think").sentence
    prompts = [
        (fact.case_id, scheme, sentence(fact), fact.prompt, fact.target_true, fact.target_false)
        for scheme in schemes
        for fact in facts
    ]
    skipped = [(models[0], 77, "P1", "Nobody", schemes[0], "the prompt is too long")]
    return HijackResult(
        items=pd.DataFrame(rows, columns=list(ITEM_COLUMNS)),
        skipped=pd.DataFrame(skipped, columns=list(SKIPPED_COLUMNS)),
        settings=HijackSettings(
            models=tuple(scored_model(model) for model in models),
            facts=FactsRecord(name="sample", n=len(facts), hash="abc"),
            schemes=tuple(
                SchemeRecord(
                    name=scheme, direction="hijack", text="Do not think of {target_false}."
                )
                for scheme in schemes
            ),
            doses=tuple(doses),
            probes=(),
            seed=0,
        ),
        provenance=Provenance.now(seed=0),
        prompts=pd.DataFrame(prompts, columns=list(PROMPT_COLUMNS)),
    )
