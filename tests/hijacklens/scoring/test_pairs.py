"""Prompt pairs: the items that scoring reads, located and grouped, with reasons for the others."""

from __future__ import annotations

import pytest
from sample_facts import sample_facts
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer
from type_checks import unchecked

import hijacklens as hl
from hijacklens.errors import InputError
from hijacklens.one_layer.architecture import OneLayerConfig
from hijacklens.one_layer.model import OneLayerTransformer
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.prompts.wordings import make_prompts
from hijacklens.scoring.items import make_items
from hijacklens.scoring.pairs import only

FACTS = sample_facts()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    tokenizer = tiny_tokenizer(request.param)
    return hl.load_model(tiny_model(request.param), tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def gpt2():
    return hl.load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"), device="cpu")


@pytest.mark.parametrize("spans", [(), ("hijack", "last", "subject")])
def test_pairs_hold_the_items_of_scoring(model, spans):
    pairs = hl.pairs(model, FACTS, dose=2)
    assert [pair.fact for pair in pairs] == list(FACTS) and len(pairs) == len(FACTS)
    scheme = get_scheme("do-not-think")
    for pair in pairs:
        fact = FACTS.where(case_ids=[pair.fact.case_id])
        prompts, _ = make_prompts(fact, scheme, (0, 2), model.tokenizer, seed=0)
        items, _ = make_items(prompts, model.tokenizer, context_length=96, spans=spans)
        assert list(pair.marked(spans)) == list(items)
        assert (pair.scheme.name, pair.dose, pair.seed) == ("do-not-think", 2, 0)
    assert [pair.fact.case_id for pair in pairs if pair.same_first_token][-1:] == [5]


def test_facts_without_a_pair_keep_their_reason(gpt2):
    rare = Scheme(name="rare", templates={"P131": "Not {target_false}."})
    pairs = hl.pairs(gpt2, FACTS, scheme=rare)
    usable = [fact.case_id for fact in FACTS if fact.relation_id == "P131"]
    assert [pair.fact.case_id for pair in pairs] == usable
    assert len(pairs.skipped) == len(FACTS) - len(usable)
    assert pairs.skipped["reason"].str.contains("no sentence for relation").all()
    fewer = pairs.without(["why", *[None] * (len(pairs) - 1)])
    assert [pair.fact.case_id for pair in fewer] == usable[1:]
    assert fewer.skipped["reason"].iloc[-1] == "why"
    assert f"{len(usable)} pairs · rare, dose 1 · 7 skipped" in repr(pairs)
    with pytest.raises(InputError, match=r"none of the 10 facts of sample could be used; .*P103"):
        fewer.without(["why"] * len(fewer)).require("used")


def test_one_pair(gpt2):
    pairs = hl.pairs(gpt2, FACTS)
    assert only(pairs[2], operation="x") is pairs[2]
    assert only(hl.pairs(gpt2, FACTS[:1]), operation="x").fact == FACTS[0]
    with pytest.raises(InputError, match="x takes one pair of prompts, and these are 10"):
        only(pairs, operation="x")
    with unchecked(), pytest.raises(InputError, match=r"give a Pairs, such as hl\.pairs"):
        only(FACTS, operation="x")


@pytest.mark.parametrize("dose", [0, -1, 1.5, "1"])
def test_a_pair_needs_a_dose(gpt2, dose):
    with unchecked(), pytest.raises(InputError, match="with a higher dose"):
        hl.pairs(gpt2, FACTS, dose=dose)


def test_wrong_input_is_refused(gpt2):
    with pytest.raises(InputError, match="no facts"):
        hl.pairs(gpt2, FACTS[:0])
    with pytest.raises(InputError, match="unknown scheme"):
        hl.pairs(gpt2, FACTS, scheme="do-think")
    with unchecked(), pytest.raises(InputError, match="give a FactSet"):
        hl.pairs(gpt2, FACTS[0])
    with unchecked(), pytest.raises(InputError, match=r"hl\.load_model\(model, tokenizer="):
        hl.pairs(tiny_model("gpt2"), FACTS)
    with pytest.raises(InputError, match="'doses'; did you mean 'dose'"):
        hl.pairs(gpt2, FACTS, doses=[1])
    with pytest.raises(InputError, match=r"of the 5 .*paired .* under rare; the first reason: rar"):
        hl.pairs(gpt2, FACTS[-5:], scheme=Scheme(name="rare", templates={"P1": "Not {subject}."}))
    bare = OneLayerTransformer(OneLayerConfig(vocab=8, d_model=4, length=8))
    with unchecked(), pytest.raises(InputError, match="has no tokenizer"):
        hl.pairs(bare, FACTS)
