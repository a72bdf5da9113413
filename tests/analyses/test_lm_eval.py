"""lm-evaluation-harness on our engine: the numbers are those of its Hugging Face backend."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.errors import InputError
from probes.specification import parse

pytest.importorskip("lm_eval", reason="the extra hijacklens[lm-eval] is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from analyses.adapters.lm_eval import TASKS, HijacklensLM

EXAMPLES = "Rome is the capital of Italy. Paris is the capital of France. "
QUESTIONS = ["The Eiffel Tower is in the city of", "Berlin is the capital of", "Tokyo", ""]
CHOICES = [" Paris", " Rome", " London and Berlin"]
FORMATS = {
    "multiple choice": [(EXAMPLES + q, choice) for q in QUESTIONS for choice in CHOICES],
    "cloze": [(EXAMPLES + "The weather was mild", " today"), ("Do not think of ", "Guam")],
    "two tokens": [(q, " Danielle Darrieux") for q in QUESTIONS],
    "longer than the window": [(EXAMPLES * 12, " Paris")],
}
ROLLING = [EXAMPLES, "Guam", EXAMPLES * 12]
WRITTEN = [(EXAMPLES + q, {"until": ["."], "max_gen_toks": 12}) for q in QUESTIONS[:3]]


def requests(kind, arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def backends(plain, other, tokenizer):
    return (
        HijacklensLM(hl.load_model(plain, tokenizer=tokenizer, device="cpu"), batch_size=4),
        HFLM(pretrained=other, tokenizer=tokenizer, device="cpu", batch_size=4),
    )


def assert_same_numbers(ours, theirs):
    for name, arguments in FORMATS.items():
        mine, other = (
            lm.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True)
            for lm in (ours, theirs)
        )
        numbers = [[x[0] for x in answers] for answers in (mine, other)]
        # Each token may differ by 1e-4 nats: float32 softmaxes of PyTorch do, between processors.
        tokens = max(len(theirs.tok_encode(answer)) for _, answer in arguments)
        np.testing.assert_allclose(*numbers, atol=1e-4 * tokens, rtol=1e-6, err_msg=name)
        assert [x[1] for x in mine] == [x[1] for x in other], name
    rolling = [
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(x,) for x in ROLLING]))
        for lm in (ours, theirs)
    ]
    for text, found, expected in zip(ROLLING, *rolling, strict=True):
        assert found == pytest.approx(expected, abs=1e-4 * len(theirs.tok_encode(text))), text
    written = [lm.generate_until(requests("generate_until", WRITTEN)) for lm in (ours, theirs)]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES if x != "llama")],
)
def test_five_formats_have_the_numbers_of_the_harness(family):
    assert_same_numbers(*backends(tiny_model(family), tiny_model(family), tiny_tokenizer(family)))


@pytest.mark.packaged
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_five_formats_on_the_packaged_models(name):
    model = hl.load_model(name, device="cpu")
    from transformers import AutoModelForCausalLM

    from hijacklens.models.packaged import PACKAGED

    plain = AutoModelForCausalLM.from_pretrained(PACKAGED[name].folder(), dtype="float32").eval()
    ours = HijacklensLM(model, batch_size=4)
    assert_same_numbers(
        ours, HFLM(pretrained=plain, tokenizer=model.tokenizer, device="cpu", batch_size=4)
    )


def test_our_tasks_give_the_numbers_of_hijack(tmp_path):
    ours, theirs = backends(tiny_model("llama"), tiny_model("llama"), tiny_tokenizer("llama"))
    tasks = {"hijack_generic": "do-not-think", "hijack_relation": "relation"}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = simple_evaluate(
        theirs, tasks=list(tasks), limit=6, task_manager=manager,
        bootstrap_iters=0,
    )  # fmt: skip
    for task, scheme in tasks.items():
        samples = found["samples"][task]
        ids = [sample["doc"]["case_id"] for sample in samples]
        facts = hl.atlas()
        run = hl.hijack(
            ours.hooked, facts.where(case_ids=ids), schemes=scheme, doses=[1], quiet=True
        )
        items = run.items[run.items.dose == 1].set_index("case_id").loc[ids]
        scores = [[response[0][0] for response in sample["resps"]] for sample in samples]
        np.testing.assert_allclose(scores, items[["sum_true", "sum_false"]], atol=1e-4)
        hl.export(run, tmp_path / task, to="lm-eval", rule="sum")
        (file,) = (tmp_path / task).glob("*/samples_*_dose1_*.jsonl")
        exported = [json.loads(line) for line in file.read_text().splitlines()]
        exported = {sample["doc"]["case_id"]: sample for sample in exported}
        for sample in samples:
            mine = exported[sample["doc"]["case_id"]]
            assert [tuple(x.values()) for x in mine["arguments"].values()] == sample["arguments"]
            assert {*sample} <= {*mine}
            same = ("target_hash", "prompt_hash", "acc", "filter")
            assert [mine[key] for key in same] == [sample[key] for key in same]
            logprobs = [float(response) for ((response, _greedy),) in mine["resps"]]
            np.testing.assert_allclose(logprobs, [x[0][0] for x in sample["resps"]], atol=1e-4)


def test_probes_act_on_requests_as_in_hijack():
    tokenizer, probe = tiny_tokenizer("llama"), "knock-out:source=last,target=at:1..3"
    model = hl.load_model(tiny_model("llama"), tokenizer=tokenizer, device="cpu")
    facts = hl.atlas().sample(3, seed=0)
    run = hl.hijack(model, facts, doses=[0], probes=[parse(probe).probe(model=model)], quiet=True)
    prompts = [
        (fact.prompt, f" {target}")
        for case_id in run.items.case_id
        for fact in facts
        if fact.case_id == case_id
        for target in (fact.target_true, fact.target_false)
    ]
    asked = requests("loglikelihood", prompts)
    bare, probed = (
        np.array([x[0] for x in HijacklensLM(model, probe=text).loglikelihood(asked)])
        for text in ("", probe)
    )
    expected = run.items[["sum_true", "sum_false"]].to_numpy().ravel()
    np.testing.assert_allclose(probed, expected, atol=1e-4)
    assert np.abs(probed - bare).max() > 0.1


def test_what_a_request_cannot_have_is_refused():
    model = hl.load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), device="cpu")
    with pytest.raises(InputError, match="unknown span of a harness request 'hijack'"):
        HijacklensLM(model, probe="knock-out:source=last,target=hijack")
    lm = HijacklensLM(model)
    with pytest.raises(InputError, match="draws its answers"):
        lm.generate_until(requests("generate_until", [("Rome", {"do_sample": True})]))
