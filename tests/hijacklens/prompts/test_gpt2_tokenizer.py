"""The real GPT-2 tokenizer with a random GPT-2 of full size: the path a hub model takes."""

from __future__ import annotations

import pytest
import torch
from plain_huggingface import PlainScorer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hijacklens.facts.loading import counterfact
from hijacklens.models.identity import identify
from hijacklens.models.loading import load_model
from hijacklens.prompts.schemes import get_scheme
from hijacklens.scoring.hijack import hijack

pytestmark = pytest.mark.packaged  # it takes as long as the packaged models do


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """A folder with everything that the hub's gpt2 has, its weights random."""
    source = shared / "tokenizers" / "gpt2"
    config = AutoConfig.from_pretrained(source)
    config.architectures = ["GPT2LMHeadModel"]
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("hub") / "gpt2-random"
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def test_full_size_gpt2_with_its_real_tokenizer(folder, shared):
    model = load_model(folder, device="cpu")
    identity = identify(model)
    assert identity.name == "gpt2-random"
    assert identity.parameters == 124_439_808
    assert not identity.adds_bos  # as the tokenizer does by default
    assert identity.context_length == 1024
    whole = counterfact(shared / "counterfact" / "counterfact_21919_flat.jsonl.gz")
    facts = whole.sample(8, seed=3)
    result = hijack(model, facts, doses=[0, 2], quiet=True)
    # Every CounterFact target is one token of GPT-2's, so the three rules are one.
    assert (result.items[["n_tokens_true", "n_tokens_false"]] == 1).all().all()
    assert (result.items["first_true"] == result.items["sum_true"]).all()
    assert result.disagreement()["any"].tolist() == [0.0, 0.0]
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    scorer = PlainScorer(plain, AutoTokenizer.from_pretrained(folder))
    by_case = {fact.case_id: fact for fact in facts}
    for item in result.items.to_dict("records"):
        fact = by_case[item["case_id"]]
        sentence = get_scheme("do-not-think").sentence(fact)
        prompt = " ".join([sentence] * item["dose"] + [fact.prompt])
        (expected,) = scorer.scores(prompt, fact.target_false)
        assert item["first_false"] == pytest.approx(expected, abs=1e-4)
