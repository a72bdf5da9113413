"""Contract 4 on the packaged real models (`make test-models`)."""

from __future__ import annotations

import pytest
from plain_huggingface import PlainScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hijacklens.facts.atlas import atlas
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import PACKAGED
from hijacklens.scoring.pairs import pairs
from probes import logit_lens, logit_shift

pytestmark = pytest.mark.packaged
FACTS = atlas().sample(4, seed=3)


@pytest.fixture(scope="module", params=sorted(PACKAGED))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return load_model(name, device="cpu")


def test_parts_sum_to_the_shift_of_plain_forward_passes(name, model):
    folder = PACKAGED[name].folder()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    scorer = PlainScorer(plain, AutoTokenizer.from_pretrained(folder))
    found = logit_shift.average(model, pairs(model, FACTS), quiet=True)
    for fact, row in zip(FACTS, found.facts.to_dict("records"), strict=True):
        expected = []
        for prompt in (fact.prompt, f"Do not think of {fact.target_false}. {fact.prompt}"):
            false = scorer.scores(prompt, fact.target_false)[0]
            expected.append(false - scorer.scores(prompt, fact.target_true)[0])
        assert row["shift"] == pytest.approx(expected[1] - expected[0], abs=2e-4)
        assert abs(row["residual"]) <= 1e-4 * abs(row["shift"])
        assert row["hijacked"] == pytest.approx(expected[1], abs=2e-4)


def test_the_lens_ends_in_the_answer(model):
    pair = pairs(model, FACTS)[0]
    lens = logit_lens.trace(model, pair).at_last()
    trace = logit_shift.trace(model, pair)
    final = lens[lens["layer"] == model.cfg.n_layers - 1].set_index("dose")["difference"]
    assert final[0] == pytest.approx(trace.bare, abs=2e-4)
    assert final[1] == pytest.approx(trace.hijacked, abs=2e-4)
