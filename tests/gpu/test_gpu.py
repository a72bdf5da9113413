"""The contracts on a GPU: what it computes equals what a plain model computes on a CPU.

make test-gpu                                  # says so where there is no GPU
HIJACKLENS_TEST_DEVICE=cpu make test-gpu       # the same tests without one
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from plain_huggingface import PlainScorer
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.engine.plan import SHARINGS
from hijacklens.one_layer.recipe import Recipe
from hijacklens.one_layer.stacked_runs import StackedRuns
from probes.attention import knock_out, redirect
from probes.logit_shift import trace
from probes.values import low_rank, replace

DEVICE = os.environ.get("HIJACKLENS_TEST_DEVICE", "cuda")
GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not GPUS, reason="there is no GPU"),
]
FACTS = hl.atlas().sample(6, seed=1)
DOSES = (0, 1, 2)
PROBES = {
    "none": (),
    "knock-out": (knock_out("last", "hijack"),),
    "redirect": (redirect("last", "mention"),),
    "W_V of rank 1": (replace(low_rank(1)),),
}
NUMBERS = ["first_true", "first_false", "sum_true", "sum_false", "top_logprob"]


def loaded(family, device=DEVICE, dtype="float32"):
    return hl.load_model(
        tiny_model(family), tokenizer=tiny_tokenizer(family), device=device, dtype=dtype
    )


def scores(model, *probes, **execution):
    execution = hl.Execution(**{"store": False, **execution})
    return hl.hijack(model, FACTS, doses=DOSES, probes=probes, execution=execution, quiet=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_plain_hugging_face_on_the_cpu(family):
    plain = PlainScorer(tiny_model(family), tiny_tokenizer(family))
    model = loaded(family)
    facts = {fact.case_id: fact for fact in FACTS}
    expected = []
    for row in scores(model).items.itertuples():
        fact = facts[row.case_id]
        text = " ".join([f"Do not think of {fact.target_false}."] * row.dose + [fact.prompt])
        both = [plain.scores(text, target) for target in (fact.target_true, fact.target_false)]
        firsts, sums = [x[0] for x in both], [sum(x) for x in both]
        expected.append([*firsts, *sums, plain.top(text)[1]])
    for sharing in SHARINGS:
        for batch_tokens in (None, 64):
            found = scores(model, sharing=sharing, batch_tokens=batch_tokens).items[NUMBERS]
            np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=sharing)


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_do_on_the_device_what_they_do_on_the_cpu(family):
    model, there = loaded(family), loaded(family, "cpu")
    bare = scores(model).items[NUMBERS]
    for name, probes in PROBES.items():
        expected = scores(there, *probes, sharing="plain").items[NUMBERS]
        found = scores(model, *probes).items[NUMBERS]
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(scores(model).items[NUMBERS], bare)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_the_shift_are_those_of_the_cpu(family):
    fact = FACTS.sample(1, seed=2)
    here, there = (
        trace(model, hl.pairs(model, fact)).to_dataframe()
        for model in (loaded(family), loaded(family, "cpu"))
    )
    numbers = here.select_dtypes("float").columns
    np.testing.assert_allclose(here[numbers], there[numbers], atol=1e-3)


def test_a_run_of_bfloat16_is_compared_with_one_of_float32():
    full, half = (scores(loaded("llama", dtype=dtype)) for dtype in ("float32", "bfloat16"))
    table = hl.compare(full, half).to_dataframe()
    assert len(table)
    gap = np.abs(full.items[NUMBERS].to_numpy() - half.items[NUMBERS].to_numpy())
    assert 0 < gap.max() < 1.0


def test_a_run_on_the_cpu_finds_the_readings_of_the_device(tmp_path):
    store = tmp_path / "readings.sqlite"
    scores(loaded("gpt2"), store=store)
    found = scores(loaded("gpt2", "cpu"), store=store)
    assert found.settings.models[0].readings.computed == 0


@pytest.mark.skipif(DEVICE != "cuda", reason="limits the memory of a GPU")
def test_batches_shrink_when_the_memory_of_the_gpu_runs_out():
    model = loaded("llama")
    expected = scores(model).items[NUMBERS]
    torch.cuda.empty_cache()
    used, size = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((used + 2**23) / size)
    try:
        run = scores(model, sharing="plain", batch_tokens=2**20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.settings.models[0].engine.shrunk > 0
    np.testing.assert_allclose(run.items[NUMBERS], expected, atol=1e-4)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_layers_are_spread_over_two_gpus(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer("llama").save_pretrained(tmp_path)
    spread = hl.load_model(str(tmp_path), devices=2)
    expected = scores(loaded("llama", "cpu")).items[NUMBERS]
    np.testing.assert_allclose(scores(spread).items[NUMBERS], expected, atol=1e-4)


def test_runs_train_on_the_device_as_on_the_cpu():
    task = hl.ConceptTask(bits=4, length=16)
    result = hl.train(
        task, d_model=16, seeds=8, steps=400, learning_rates=(0.01,), schedule="cosine",
        evaluation=2048, device=DEVICE, quiet=True,
    )  # fmt: skip
    table = result.to_dataframe()
    assert (table.accuracy > table.bayes_accuracy - 0.1).all()
    runs = Recipe(d_model=16, seeds=2, learning_rates=(0.01,)).runs(task)
    here, there = (
        StackedRuns(runs, steps=1, batch=64, device=device) for device in (DEVICE, "cpu")
    )
    for one, other in zip(here.models(), there.models(), strict=True):
        torch.testing.assert_close(one.W_E.cpu(), other.W_E)


def test_sixty_four_runs_of_ten_bits_are_one_program():
    runs = Recipe(d_model=64, seeds=64, learning_rates=(0.01,)).runs(
        hl.ConceptTask(bits=10 if DEVICE == "cuda" else 5, length=64)
    )
    stacked = StackedRuns(runs, steps=20, batch=32, device=DEVICE)
    stacked.advance(20)
    losses = stacked.losses()
    assert torch.isfinite(losses).all()
    assert (losses[-1] < losses[0]).all()
