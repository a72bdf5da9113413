"""Generated answers: those of Hugging Face, drawn with a seed, judged and saved."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from sample_facts import sample_facts
from tiny_models import CONTEXT, FAMILIES, tiny_model, tiny_tokenizer

from hijacklens.engine.engine import next_token_logprobs, read
from hijacklens.engine.growing import Growing, groups
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError
from hijacklens.models.loading import load_model
from hijacklens.probe import HookProbe
from hijacklens.prompts.prompt import compose
from hijacklens.results.result import load_result
from hijacklens.scoring.continuing import Generation, write
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.generation import AnswersResult, answers
from hijacklens.scoring.hijack import hijack
from probes import attention

PLAIN = Execution(store=False)


@pytest.fixture(scope="module")
def run():
    plain, tokenizer = tiny_model("llama"), tiny_tokenizer("llama")
    model = load_model(copy.deepcopy(plain), tokenizer=tokenizer)
    facts = sample_facts()
    result = hijack(model, facts, doses=(0, 1), execution=PLAIN, quiet=True)
    return plain, tokenizer, model, facts, result


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_are_those_of_hugging_face(family):
    """With keys and values kept and with complete prefixes, with and without a probe."""
    plain, tokenizer = tiny_model(family), tiny_tokenizer(family)
    model = load_model(copy.deepcopy(plain), tokenizer=tokenizer)
    # One prompt continues another, one is repeated, and one leaves room for a token only.
    long = ("Rome and" + " and" * n for n in range(CONTEXT, 0, -1))
    full = next(text for text in long if len(tokenizer(text).input_ids) <= CONTEXT)
    texts = ["Rome", "The city of", "The city of Rome is", "The city of", full]
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        tokens = min(6, CONTEXT + 1 - ids.shape[1])
        made = plain.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        expected.append([tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)])
    prompts = [compose(text) for text in texts]
    made = Generation(tokens=6, sentence=False)
    nothing = attention.knock_out(source="query", target="hijack")
    alone = HookProbe("identity", [("blocks.0.hook_resid_post", lambda value, hook: value)])
    for probes, sharing in (((), "auto"), ((), "plain"), ((nothing,), "auto"), ((alone,), "auto")):
        found = write(model, prompts, made, probes=probes, sharing=sharing)
        assert found == expected, (sharing, probes)


def test_verdicts_agree_with_the_run_and_a_saved_result_loads(run, tmp_path):
    _, _, model, facts, result = run
    said = answers(model, facts, result, generation=Generation(tokens=2), quiet=True)
    items = result.items
    expected = ["false" if x > 0 else "true" for x in items["sum_false"] - items["sum_true"]]
    assert said.answers["sum"].tolist() == expected
    loaded = load_result(said.save(tmp_path / "said"))
    assert isinstance(loaded, AnswersResult)
    assert loaded.answers.equals(said.answers)
    assert str(loaded) == str(said)
    one = said.answers["relation_id"] == said.answers["relation_id"].iloc[0]
    alone = str(replace(said, answers=said.answers[one]))
    assert "[" not in alone and "nothing about relations like these" in alone
    table = loaded.agreement(by_relation=True)
    assert set(table["relation_id"]) == set(items["relation_id"])
    assert table["n"].sum() == 3 * len(said.answers)


def test_drawn_answers_depend_on_the_seed_and_the_prompt_alone(run):
    _, _, model, facts, result = run
    options = {"tokens": 3, "samples": 2, "temperature": 1.0}

    def texts(facts, result, **more):
        made = Generation(**options, **more)
        table = answers(model, facts, result, generation=made, quiet=True).answers
        return table.set_index(["case_id", "dose", "sample"])["text"].to_dict()

    every = texts(facts, result)
    assert every == texts(facts, result)
    assert every != texts(facts, result, seed=1)
    few = facts[:2]
    alone = texts(few, hijack(model, few, doses=(1,), execution=PLAIN, quiet=True))
    assert alone == {key: every[key] for key in alone}
    samples = [[every[key] for key in every if key[2] == i] for i in (0, 1)]
    assert samples[0] != samples[1]


@pytest.mark.slow
def test_draws_follow_the_model():
    """The first token of many draws against the softmax, by a chi-square test."""
    from scipy.stats import chisquare

    model = load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"))
    ids = (5, 6, 7)
    probabilities = (next_token_logprobs(model, ids).double() / 0.5).softmax(-1)
    draws = [
        read(model, {ids: ()}, ReadOptions(temperature=0.5, draw=(0, i)))[ids].top_token
        for i in range(150)
    ]
    order = probabilities.argsort(descending=True)
    groups = order.split([4, 8, 16, len(order) - 28])
    expected = [150 * float(probabilities[group].sum()) for group in groups]
    counts = [sum(draw in group.tolist() for draw in draws) for group in groups]
    assert (
        chisquare(counts, torch.tensor(expected, dtype=torch.double) * 150 / sum(expected)).pvalue
        > 1e-3
    )


def test_draws_are_the_same_however_prompts_share_tokens(run):
    model, shared = run[2], (5, 6, 7) * 12
    requests = {(*shared, token): () for token in range(8, 14)}
    draws = [
        [one.top_token for one in read(model, requests, options).values()]
        for options in (ReadOptions(sharing=way, temperature=1.0) for way in ("plain", "cached"))
    ]
    assert draws[0] == draws[1]


def test_what_was_not_scored_is_refused(run):
    _, _, model, facts, result = run
    with pytest.raises(InputError, match="the facts of these answers are not those of the run"):
        answers(model, facts[:1], result)
    probe = attention.knock_out(source="last", target="hijack")
    with pytest.raises(InputError, match="the probes of these answers"):
        answers(model, facts, result, probes=[probe])
    with pytest.raises(InputError, match="samples at temperature 0 are equal"):
        Generation(samples=2)


def test_a_probe_acts_while_an_answer_is_generated(run):
    _, _, model, facts, _ = run
    probe = attention.knock_out(source="query", target="hijack")
    result = hijack(model, facts, doses=(1,), probes=[probe], execution=PLAIN, quiet=True)
    made = Generation(tokens=3)
    said = answers(model, facts, result, probes=[probe], generation=made, quiet=True).answers
    free = hijack(model, facts, doses=(1,), execution=PLAIN, quiet=True)
    unprobed = answers(model, facts, free, generation=made, quiet=True).answers
    assert said.loc[said["dose"] == 0, "text"].tolist() == [
        text for text, dose in zip(unprobed["text"], unprobed["dose"], strict=True) if dose == 0
    ]
    assert said["text"].tolist() != unprobed["text"].tolist()


def test_keys_and_values_are_kept_where_the_engine_shares_tokens(run):
    model, prompts = run[2], [(5, 6, 7), (5, 6, 7, 8)]
    growing = Growing(model, prompts, ReadOptions(), more=2)
    assert growing.kept
    growing.read(prompts)
    longer = [(5, 6, 7, 8), (5, 6, 7, 8, 9)]
    found = growing.read(longer)
    for prefix, reading in read(model, dict.fromkeys(longer, ()), ReadOptions()).items():
        assert found[prefix].top_logprob == pytest.approx(reading.top_logprob, abs=1e-4)
    alone = HookProbe("identity", [("blocks.0.hook_resid_post", lambda value, hook: value)])
    for options in (ReadOptions(sharing="plain"), ReadOptions(probes=[alone])):
        assert not Growing(model, prompts, options, more=2).kept
    few = groups(model, prompts, more=10**9)
    assert list(few) == [[prompt] for prompt in prompts]
