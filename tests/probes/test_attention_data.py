"""Attention probes on whole data sets, against plain passes with masks, prompt by prompt."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch
from masked_huggingface import everywhere_masked
from sample_facts import sample_facts
from shared_data import SHARED
from transformers import AutoModelForCausalLM

from hijacklens.engine.plan import SHARINGS
from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.facts.joining import joined
from hijacklens.facts.loading import counterfact
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import PACKAGED
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.training import train
from hijacklens.prompts.schemes import get_scheme
from hijacklens.prompts.tokens import continuation, encode
from hijacklens.results.result import load_result
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from probes.attention import knock_out, redirect, rescale


def by_hand(
    plain, tokenizer, prompt: str, stretches: list[tuple[int, int]], target: str
) -> list[float]:
    """Log-probabilities of a target, with the answering tokens blind to stretches of the text."""
    before, after = encode(tokenizer, [prompt, f"{prompt} {target}"])
    split = continuation(before, after)
    ids = list(split.context + split.target)[:-1]
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    hijacked = []
    for i in range(int(before[0] == tokenizer.bos_token_id), len(before)):
        # A token of white space is part of the next token with letters.
        own = next(o for o in offsets[i:] if prompt[slice(*o)].strip())
        letters = [k for k in range(*own) if prompt[k].strip()]
        if any(a <= k < b for k in letters for a, b in stretches):
            hijacked.append(i)
    n = len(split.context)
    removed = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for row in range(n - 1, len(ids)):
        removed[row, hijacked] = True
    logits = everywhere_masked(plain, ids, removed).double().log_softmax(-1)
    return [float(logits[n - 1 + i, token]) for i, token in enumerate(split.target)]


def test_a_mention_is_masked_in_every_way_of_running(pair):
    """Expected: plain passes in which the answering tokens do not see the word itself."""
    plain, model = pair
    tokenizer = model.tokenizer
    chosen = sample_facts()[3:6]
    probe = knock_out("last", "mention")
    runs = {
        sharing: hijack(
            model,
            chosen,
            doses=[0, 2],
            probes=[probe],
            execution=Execution(sharing=sharing),
            quiet=True,
        ).items
        for sharing in SHARINGS
        if sharing != "auto"
    }
    whole = hijack(
        model, chosen, doses=[0, 2], probes=[knock_out("last", "hijack")], quiet=True
    ).items
    facts = {fact.case_id: fact for fact in chosen}
    for i, item in enumerate(runs["plain"].to_dict("records")):
        fact = facts[item["case_id"]]
        sentence = get_scheme("do-not-think").sentence(fact)
        start = sentence.index(fact.target_false)
        step = len(sentence) + 1
        stretches = [
            (k * step + start, k * step + start + len(fact.target_false))
            for k in range(item["dose"])
        ]
        prompt = " ".join([sentence] * item["dose"] + [fact.prompt])
        for side, target in (("true", fact.target_true), ("false", fact.target_false)):
            expected = by_hand(plain, tokenizer, prompt, stretches, target)
            for sharing in runs:
                assert runs[sharing][f"first_{side}"][i] == pytest.approx(expected[0], abs=1e-4)
                assert runs[sharing][f"sum_{side}"][i] == pytest.approx(sum(expected), abs=1e-4)
    hijacked = runs["plain"]["dose"] > 0
    apart = (runs["plain"]["first_true"] - whole["first_true"])[hijacked].abs()
    assert apart.max() > 1e-3  # the rest of the sentence is still seen


def test_a_data_set_equals_masked_plain_passes_prompt_by_prompt(pair):
    plain, model = pair
    tokenizer = model.tokenizer
    chosen = sample_facts()[3:8]  # with targets of several tokens
    probe = knock_out("last", "hijack")
    runs = [
        hijack(
            model,
            chosen,
            doses=[2],
            probes=[probe],
            execution=Execution(batch_tokens=size),
            quiet=True,
        )
        for size in (1, 90, 100_000)
    ]
    facts = {fact.case_id: fact for fact in chosen}
    bare = hijack(model, chosen, doses=[2], quiet=True).items
    longest, moved = 0, 0.0
    for item, other in zip(runs[0].items.to_dict("records"), bare.to_dict("records"), strict=True):
        fact = facts[item["case_id"]]
        sentence = get_scheme("do-not-think").sentence(fact)
        prompt = " ".join([sentence] * item["dose"] + [fact.prompt])
        end = item["dose"] * (len(sentence) + 1)
        for side, target in (("true", fact.target_true), ("false", fact.target_false)):
            expected = by_hand(plain, tokenizer, prompt, [(0, end)], target)
            longest = max(longest, len(expected))
            assert item[f"n_tokens_{side}"] == len(expected)
            assert item[f"first_{side}"] == pytest.approx(expected[0], abs=1e-4)
            assert item[f"sum_{side}"] == pytest.approx(sum(expected), abs=1e-4)
            if item["dose"] == 0:
                assert item[f"sum_{side}"] == pytest.approx(other[f"sum_{side}"], abs=1e-4)
            moved = max(moved, abs(item[f"sum_{side}"] - other[f"sum_{side}"]))
    assert longest > 1
    assert moved > 0.1
    for run in runs[1:]:
        pd.testing.assert_frame_equal(run.items, runs[0].items, atol=1e-4, rtol=0)


RELAYS = [
    ("2005 Southeast Asian Games", "{} took place in", "Manila", "Guam"),
    ("Boeing 747", "{} is made by", "Boeing", "Airbus"),
    ("1984", "The author of  {}  is", "Orwell", "Rome"),
    ("3M", "The seat of {} is in", "Saint Paul", "New Delhi"),
    ("🗼 東京 7", "{} is in ", "Japan", "Guam"),
    ("«Été 42»", '{} "is" a film by', "Mulligan", "Paris"),
]
"""Queries with tokens of white space alone, in the subject, around it and at the end."""


def blind(plain, tokenizer, sentence: str, fact: Fact) -> list[float]:
    """Log-probabilities of both targets if all tokens that end after the sentence are blind to it.

    Both are read after the same context, as scores are.
    """
    prompt = f"{sentence} {fact.prompt}"
    targets = [joined(prompt, target) for target in (fact.target_true, fact.target_false)]
    before, *after = encode(tokenizer, [prompt, *targets])
    n = min(len(continuation(before, ids).context) for ids in after)
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"][:n]
    sums = []
    for ids in after:
        ends = torch.tensor([end for _, end in offsets] + [len(prompt)] * (len(ids) - 1 - n))
        inside = (ends > 0) & (ends <= len(sentence))
        removed = (ends > len(sentence))[:, None] & inside[None, :]
        logprobs = everywhere_masked(plain, list(ids[:-1]), removed).double().log_softmax(-1)
        sums.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(n, len(ids))))
    return sums


def check_blind_queries(plain, model, facts: FactSet) -> None:
    """Compare runs whose query is blind to the hijack in all layers with masked plain passes."""
    probe = knock_out("query", "hijack")
    items = hijack(model, facts, doses=[1], probes=[probe], quiet=True).items
    items = items[items["dose"] == 1].set_index("case_id")
    for fact in facts:
        sentence = get_scheme("do-not-think").sentence(fact)
        expected = blind(plain, model.tokenizer, sentence, fact)
        found = items.loc[fact.case_id, ["sum_true", "sum_false"]].tolist()
        assert found == pytest.approx(expected, abs=1e-4), fact


def test_no_token_of_the_query_relays_a_hijack_that_it_is_blind_to(pair):
    plain, model = pair
    facts = [
        Fact(case_id=i, relation_id="", subject=s, template=t, target_true=a, target_false=b)
        for i, (s, t, a, b) in enumerate(RELAYS)
    ]
    check_blind_queries(plain, model, FactSet(tuple(facts), name="relays"))


@pytest.mark.packaged
@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_no_token_relays_in_packaged_models(name):
    """Forty facts: case 2373 and others with a digit after a space in the query, and others."""
    plain = AutoModelForCausalLM.from_pretrained(PACKAGED[name].folder()).eval()
    plain.set_attn_implementation("eager")
    path = SHARED / "counterfact" / "counterfact_21919.parquet"
    facts = counterfact(path) if path.exists() else atlas()
    digits = [f.case_id for f in facts if re.search(r"(^| )\d", f.prompt) and f.case_id != 2373]
    cases = [2373, *digits[:24]] if path.exists() else digits[:25]
    cases += [f.case_id for f in facts if f.case_id not in digits][-(40 - len(cases)) :]
    facts = facts.where(case_ids=cases)
    assert len(facts) == 40
    check_blind_queries(plain, load_model(name, device="cpu"), facts)


@pytest.mark.packaged
@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_packaged_models_equal_masked_plain_passes(name):
    folder = PACKAGED[name].folder()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model = load_model(name, device="cpu")
    facts = atlas().limit(3, seed=0)
    probe = knock_out("last", "hijack")
    result = hijack(model, facts, doses=[1], probes=[probe], quiet=True)
    items = result.items[result.items["dose"] == 1].set_index("case_id")
    for fact in facts:
        sentence = get_scheme("do-not-think").sentence(fact)
        prompt, end = f"{sentence} {fact.prompt}", len(sentence) + 1
        for side, target in (("true", fact.target_true), ("false", fact.target_false)):
            expected = by_hand(plain, model.tokenizer, prompt, [(0, end)], target)
            assert items.loc[fact.case_id, f"sum_{side}"] == pytest.approx(sum(expected), abs=5e-4)


def test_the_result_names_its_probes(gpt2, tmp_path):
    probes = [knock_out("last", "hijack", layers=[0]), rescale(2, "last", "subject")]
    result = hijack(gpt2, sample_facts(), doses=[1], probes=probes, quiet=True)
    assert result.settings.probes == tuple(probe.key for probe in probes)
    loaded = load_result(result.save(tmp_path / "out"))
    assert loaded.settings.probes == result.settings.probes
    assert loaded.plot().axes


def test_trained_one_layer_models():
    task = ConceptTask(bits=3, support="first-bit", length=32)
    trained = train(
        task, d_model=8, seeds=1, steps=100, batch=32, evaluation=500, quiet=True,
        learning_rates=[0.01],
    )  # fmt: skip
    bare = trained.accuracy()
    same = trained.accuracy(probes=[knock_out("last", "token:99")])
    pd.testing.assert_frame_equal(bare, same, atol=1e-5, rtol=0)
    blind = trained.accuracy(probes=[knock_out("last", "cluster")])
    seeing = trained.accuracy(probes=[redirect("last", "cluster")])
    # The label is in the last token's cluster; other tokens carry no information about it.
    assert blind["accuracy"][0] < seeing["accuracy"][0] - 0.2
