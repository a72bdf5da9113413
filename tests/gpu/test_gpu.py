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
from scipy import stats
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens.engine.plan import SHARINGS
from hijacklens.one_layer.fast_path import ContextBatch, log_counts, loss_and_gradients
from hijacklens.one_layer.recipe import Recipe
from hijacklens.one_layer.stacked_runs import StackedRuns, generator_for
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


def stacks(task, *, seeds=8, **options):
    """The same runs on the device and on the CPU."""
    runs = Recipe(d_model=16, seeds=seeds, learning_rates=(0.01,)).runs(task)
    options = {"steps": 400, "batch": 128, "schedule": "cosine", **options}
    return [StackedRuns(runs, device=device, **options) for device in (DEVICE, "cpu")]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_training_step_has_the_loss_and_the_gradients_of_the_cpu(bits):
    """Through tables over the vocabulary (16 types), and without them (256)."""
    task = hl.ConceptTask(bits=bits, length=16)
    here, there = stacks(task, seeds=2)
    contexts = task.sample(2 * 128, torch.Generator().manual_seed(0))
    counts = log_counts(contexts.tokens, task.vocab).view(2, 128, -1)
    batch = ContextBatch(counts, contexts.tokens[:, -1].view(2, -1), contexts.labels.view(2, -1))
    moved = ContextBatch(*(getattr(batch, name).to(DEVICE) for name in ContextBatch.__slots__))
    expected = loss_and_gradients(batch, there.weights, there.gradients)
    found = loss_and_gradients(moved, here.weights, here.gradients)
    torch.testing.assert_close(found.cpu(), expected)
    for (name, gradient), (_, other) in zip(
        here.gradients.items(), there.gradients.items(), strict=True
    ):
        torch.testing.assert_close(gradient.cpu(), other, atol=1e-6, rtol=1e-3, msg=name)


def test_contexts_drawn_on_the_device_have_the_probabilities_of_the_task():
    task = hl.ConceptTask(bits=4, length=16)
    contexts = task.sample(2**14, generator_for(0, "training", DEVICE))
    labels, tokens = contexts.labels.cpu().numpy(), contexts.tokens.cpu().numpy()
    last = task.informative().numpy()  # the last token has no noise
    for drawn, probabilities in (
        (tokens[:, :-1], task.token_distribution().numpy()),
        (tokens[:, -1:], last),
    ):
        found = np.zeros((task.vocab, task.vocab))
        np.add.at(found, (labels[:, None], drawn), 1)
        assert found[probabilities == 0].sum() == 0
        possible = probabilities > 0
        expected = (probabilities * found.sum(1, keepdims=True))[possible]
        ddof = task.vocab - 1  # the number of contexts of each label is given
        assert stats.chisquare(found[possible], expected, ddof=ddof).pvalue > 1e-4


def test_runs_train_on_the_device_as_on_the_cpu():
    """Contexts differ by the device, so that means over runs are compared."""
    here, there = stacks(hl.ConceptTask(bits=4, length=16))
    for one, other in zip(here.models(), there.models(), strict=True):
        torch.testing.assert_close(one.W_E.cpu(), other.W_E)
    for stacked in (here, there):
        stacked.advance(400)
    first, last = (here.losses()[i].mean() for i in (0, -1))
    assert last < first - 0.5
    torch.testing.assert_close(
        here.losses()[-20:].mean(), there.losses()[-20:].mean(), atol=0.03, rtol=0
    )


def test_sixty_four_runs_of_ten_bits_are_one_program():
    runs = Recipe(d_model=64, seeds=64, learning_rates=(0.01,)).runs(
        hl.ConceptTask(bits=10 if DEVICE == "cuda" else 5, length=64)
    )
    stacked = StackedRuns(runs, steps=200, batch=32, device=DEVICE)
    stacked.advance(200)
    losses = stacked.losses()
    assert torch.isfinite(losses).all()
    assert losses[-20:].mean() < losses[:20].mean() - 0.05
