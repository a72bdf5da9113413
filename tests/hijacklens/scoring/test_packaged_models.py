"""Contracts and the effect itself on the packaged real models (`make test-models`)."""

from __future__ import annotations

import pytest
import torch
from plain_huggingface import PlainScorer
from shared_data import SHARED
from transformers import AutoModelForCausalLM, AutoTokenizer

from hijacklens.facts.atlas import atlas
from hijacklens.facts.loading import counterfact
from hijacklens.models.identity import identify
from hijacklens.models.loading import load_model
from hijacklens.models.packaged import PACKAGED
from hijacklens.prompts.schemes import get_scheme
from hijacklens.scoring.answers import answer
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack

pytestmark = pytest.mark.packaged


@pytest.fixture(scope="module", params=sorted(PACKAGED))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return load_model(name, device="cpu")


@pytest.fixture(scope="module")
def facts():
    """Fifty CounterFact facts where the whole set is at hand, fifty of the atlas elsewhere."""
    path = SHARED / "counterfact" / "counterfact_21919.parquet"
    return (counterfact(path) if path.exists() else atlas()).sample(50, seed=1)


@pytest.fixture(scope="module")
def result(model, facts):
    return hijack(
        model, facts, schemes=["do-not-think", "do-not-think-true"], doses=range(4), quiet=True
    )


def test_items_equal_single_plain_forward_passes(name, model, facts, result):
    folder = PACKAGED[name].folder()
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    scorer = PlainScorer(plain, AutoTokenizer.from_pretrained(folder))
    by_case = {fact.case_id: fact for fact in facts}
    items = result.items[result.items["scheme"] == "do-not-think"]
    assert len(items) == 50 * 4
    for item in items.to_dict("records"):
        fact = by_case[item["case_id"]]
        sentence = get_scheme("do-not-think").sentence(fact)
        prompt = " ".join([sentence] * item["dose"] + [fact.prompt])
        for side, target in (("true", fact.target_true), ("false", fact.target_false)):
            expected = scorer.scores(prompt, target)
            assert item[f"n_tokens_{side}"] == len(expected)
            assert item[f"first_{side}"] == pytest.approx(expected[0], abs=1e-4)
            assert item[f"sum_{side}"] == pytest.approx(sum(expected), abs=1e-4 * len(expected))


def test_another_batch_size_gives_the_same_items(model, facts, result):
    again = hijack(
        model, facts[:20], doses=range(4), execution=Execution(batch_tokens=300), quiet=True
    ).items
    keys = ["case_id", "dose"]
    first = result.items[result.items["scheme"] == "do-not-think"].set_index(keys)
    again = again.set_index(keys)
    for column in ("first_true", "first_false", "sum_true", "sum_false", "top_logprob"):
        difference = (again[column] - first.loc[again.index, column]).abs().max()
        assert difference < 1e-4


def test_the_effect_is_there(result):
    """Retention drops sharply with one sentence and rises under the reverse scheme."""
    table = result.summary().set_index(["scheme", "dose"])["retention"]
    assert table["do-not-think", 0] - table["do-not-think", 1] > 0.2
    assert table["do-not-think-true", 1] > table["do-not-think", 1] + 0.3
    assert table["do-not-think-true", 1] >= table["do-not-think-true", 0]


def test_log_probabilities_of_the_eiffel_tower(name, model):
    """Values measured once with plain transformers, for the weights these packages hold."""
    expected = {"smollm2-135m": (-0.4213, -8.1547), "gemma3-270m": (-0.6989, -7.3461)}[name]
    found = answer(
        model, "The Eiffel Tower is in the city of", targets=["Paris", "Chicago"], tokens=1
    )
    assert found.completion == " Paris"
    assert [candidate.logprob for candidate in found.targets] == pytest.approx(expected, abs=1e-3)
    assert found.targets[0].rank == 0


def test_identity_names_package_and_file(name, model):
    identity = identify(model)
    assert identity.name == name
    assert PACKAGED[name].sha256[:12] in (identity.revision or "")
    assert identity.adds_bos == (name == "gemma3-270m")
    assert identity.parameters == {"smollm2-135m": 134_515_008, "gemma3-270m": 268_098_176}[name]


def test_bfloat16_scores_in_float32(name, facts, result):
    """16-bit weights move scores a little; the softmax itself is exact to float32."""
    model = load_model(name, device="cpu", dtype="bfloat16")
    half = hijack(model, facts[:4], doses=[0, 1], quiet=True).items
    keys = ["case_id", "dose"]
    full = result.items[result.items["scheme"] == "do-not-think"].set_index(keys)
    half = half.set_index(keys)
    difference = (half["first_true"] - full.loc[half.index, "first_true"]).abs()
    assert 0 < difference.max() < 1.0
    assert model.original_model.dtype == torch.bfloat16
