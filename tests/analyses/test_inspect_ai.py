"""Inspect on our engine: the verdicts of `hijacklens hijack`, and greedy answers with logprobs."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import anyio
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.engine.engine import read
from hijacklens.errors import InputError
from hijacklens.scoring.continuing import Generation
from probes.specification import parse

pytest.importorskip("inspect_ai", reason="the extra hijacklens[inspect] is not installed")

from inspect_ai import eval as run_inspect
from inspect_ai.log import read_eval_log
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model

from analyses.adapters.inspect_ai import HijacklensAPI, Together, hijack

PROBE = "knock-out:source=last,target=hijack"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer("llama").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def name(folder):
    return f"hijacklens/{folder}"


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("HIJACKLENS_STORE", str(tmp_path / "store.sqlite"))


@pytest.mark.parametrize(
    ("scheme", "rule", "probe"),
    [
        pytest.param("do-not-think", "first", "", marks=pytest.mark.slow),
        ("do-not-think-other", "mean", PROBE),
    ],
)
def test_twenty_facts_have_the_scores_of_hijack(scheme, rule, probe, folder, name, tmp_path, store):
    (log,) = run_inspect(
        hijack(scheme=scheme, dose=2, rule=rule, limit=20),
        model=name,
        model_args={"probe": probe.split(",")} if probe else {},
        log_dir=str(tmp_path / "logs"),
        display="none",
    )
    assert log.status == "success", log.error
    model = hl.load_model(folder)
    probes = [parse(probe).probe(model=model)] if probe else []
    facts = hl.atlas().limit(20, seed=0)
    run = hl.hijack(model, facts, schemes=scheme, doses=[2], probes=probes, quiet=True)
    opened = read_eval_log(log.location)
    scored = {
        sample.id: sample.scores["verdict"].value
        for sample in opened.samples
        if isinstance(sample.scores["verdict"].value, dict)
    }
    items = run.items[run.items["dose"] == 2].set_index("case_id")
    assert {*scored} == {*items.index} == {sample.id for sample in opened.samples}
    assert len(scored) == 20 or scheme != "do-not-think"  # some facts have no other false target
    (row,) = (row for _, row in run.summary(rule=rule).iterrows() if row["dose"] == 2)
    columns = {"retention": "retention", "efficacy": "efficacy", "shift": "mean_shift"}
    means = {one.name: one.metrics["mean"].value for one in opened.results.scores}
    for measure, column in columns.items():
        np.testing.assert_allclose(means[measure], row[column], atol=1e-5, err_msg=measure)
    for sample in opened.samples:
        found = sample.metadata["hijack"][-1]
        expected = items.loc[sample.id]
        for column in ("first_true", "sum_false", "top_logprob"):
            np.testing.assert_allclose(found[column], expected[column], atol=1e-5)
        assert sample.output.completion == expected["top_token"] == found["top_token"]
        prompt = run.prompts.set_index("case_id").loc[sample.id]
        assert sample.input == " ".join([prompt["sentence"]] * 2 + [prompt["query"]])


def test_generation_is_ours_with_log_probabilities(folder, name):
    model, prompts = get_model(name, memoize=False), ["Rome is the capital of", "The weather"]
    config = GenerateConfig(max_tokens=5, logprobs=True)

    async def outputs():
        found = {}

        async def ask(prompt):
            found[prompt] = await model.generate(prompt, config=config)

        async with anyio.create_task_group() as group:
            for prompt in prompts:
                group.start_soon(ask, prompt)
        return [found[prompt].choices[0] for prompt in prompts]

    plain = hl.load_model(folder)
    for prompt, choice in zip(prompts, anyio.run(outputs), strict=True):
        generation = Generation(tokens=5, sentence=False)
        answer = hl.answer(plain, prompt, tokens=generation.tokens).completion
        assert choice.message.text == answer
        ids = tuple(plain.tokenizer(prompt).input_ids)
        for one in choice.logprobs.content:
            reading = read(plain, {ids: []})[ids]
            assert plain.tokenizer.decode([reading.top_token]) == one.token
            np.testing.assert_allclose(one.logprob, reading.top_logprob, atol=1e-4)
            ids = (*ids, reading.top_token)


@pytest.mark.parametrize(
    ("arguments", "messages", "config", "reason"),
    [
        ({}, [ChatMessageUser(content="Rome")], {"top_p": 0.5}, "has no top_p"),
        ({}, [ChatMessageSystem(content="x"), ChatMessageUser(content="y")], {}, "no chat templ"),
        ({}, [ChatMessageUser(content="Rome " * 500)], {}, "exceed the context window"),
        ({"probe": PROBE}, [ChatMessageUser(content="Rome")], {}, "unknown span.*hijack"),
    ],
)
def test_what_generation_cannot_do_is_refused(arguments, messages, config, reason, folder):
    api = HijacklensAPI(str(folder), **arguments)
    with pytest.raises(InputError, match=reason):
        anyio.run(api.generate, messages, [], "none", GenerateConfig(**config))


@pytest.mark.slow
def test_other_providers_are_refused(tmp_path):
    (log,) = run_inspect(
        hijack(limit=1), model="mockllm/model", log_dir=str(tmp_path), display="none"
    )
    assert log.status == "error"
    assert "use --model hijacklens/NAME instead of mockllm/model" in log.error.message


def test_keys_that_wait_are_computed_together_and_again_after_a_failure():
    computed = []

    def compute(keys):
        computed.append(keys)
        if len(computed) == 2:
            raise InputError("once")
        return {key: 10 * key for key in keys}

    async def ask(batches, key, found):
        try:
            found[key] = await batches.get(key)
        except InputError:
            found[key] = None

    async def main():
        batches, found = Together(compute), {}
        for keys in [(0, 1, 2, 1), (2, 3), (3,)]:
            async with anyio.create_task_group() as group:
                for key in keys:
                    group.start_soon(ask, batches, key, found)
        return found

    assert anyio.run(main) == {0: 0, 1: 10, 2: 20, 3: 30}
    assert computed == [[0, 1, 2], [3], [3]]


def test_the_entry_point_registers_what_the_command_line_names():
    from inspect_ai._util.registry import registry_find, registry_info

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (point,) = re.findall(r'entry-points.inspect_ai]\nhijacklens = "(.*)"', text)
    EntryPoint("hijacklens", point, "inspect_ai").load()
    infos = [registry_info(one) for one in registry_find(lambda info: True)]
    names = {(info.type, info.name) for info in infos}
    assert {("task", "hijacklens/hijack"), ("scorer", "hijacklens/verdict")} <= names
    assert ("solver", "hijacklens/read_targets") in names
