"""Which tokens of two prompts correspond: by hand, on five tokenizers, and by properties."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_facts import sample_facts
from tiny_models import FAMILIES, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact
from hijacklens.one_layer import spans
from hijacklens.one_layer.task import ConceptTask
from hijacklens.prompts.correspondence import Correspondence, align, align_contexts, units
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.prompt import make_prompt
from hijacklens.prompts.tokens import LocatedPrompt, locate


def located(tokenizer, fact, dose, sentence="Do not think of Guam.", opening=""):
    prompt = make_prompt(fact, sentence=sentence, dose=dose, scheme="x", opening=opening)
    return locate(tokenizer, prompt)


def fact_of(subject, template="{} is in"):
    return Fact(
        case_id=0,
        relation_id="P1",
        subject=subject,
        template=template,
        target_true="Paris",
        target_false="Guam",
    )


def hand_made(text, pieces, query, bos=False):
    """A prompt cut as given; query is the first character of the query."""
    ids, offsets, at = [], [], 0
    if bos:
        ids, offsets = [1], [(0, 0)]
    for number, piece in pieces:
        ids.append(number)
        offsets.append((at, at + len(piece)))
        at += len(piece)
    assert at == len(text)
    places = tuple(i for i, (_, end) in enumerate(offsets) if end > query)
    spans = {"bos": (0,) if bos else (), "query": places, "last": places[-1:]}
    return LocatedPrompt(tuple(ids), spans, text, tuple(offsets))


def test_a_first_word_that_is_tokenised_differently_after_a_sentence():
    bare = hand_made("Danielle is", [(3, "Dan"), (4, "ielle"), (5, " is")], 0)
    hijacked = hand_made("No. Danielle is", [(6, "No."), (7, " Danielle"), (5, " is")], 4)
    found = align(bare, hijacked)
    assert found == Correspondence(bare.ids, hijacked.ids, ((2, 2),), 3)
    assert align(hijacked, bare).pairs == ((2, 2),)
    assert align(bare, hijacked, span="last").pairs == ((2, 2),)
    with pytest.raises(InputError, match="no token of the span 'at:-2'"):
        align(bare, hijacked, span="at:-2")


def test_bytes_of_a_letter_are_aligned_from_the_right():
    bare = hand_made("北 is", [(1, "北"), (5, " is")], 0, bos=True)
    hijacked = LocatedPrompt(
        (1, 6, 2, 1, 5),
        {"bos": (0,), "query": (2, 3, 4), "last": (4,)},
        "No. 北 is",
        ((0, 0), (0, 3), (3, 5), (3, 5), (5, 8)),
    )
    found = align(bare, hijacked, span="all")
    assert (found.pairs, found.unmatched) == (((0, 0), (1, 3), (2, 4)), 1)


def test_the_first_token_of_a_prompt_has_no_counterpart_inside_another():
    # Both prompts write it alike, but in the bare one it is the attention sink.
    bare = hand_made("北 is", [(1, "北"), (5, " is")], 0)
    hijacked = hand_made("不。北 is", [(6, "不。"), (1, "北"), (5, " is")], 2)
    assert align(bare, hijacked).pairs == ((1, 2),)


def test_other_tokens_after_the_first_word_are_refused():
    bare = hand_made("Ann is in", [(3, "Ann"), (5, " is"), (6, " in")], 0)
    other = hand_made(
        "No. Ann is in", [(6, "No."), (3, " Ann"), (7, " i"), (8, "s"), (6, " in")], 4
    )
    with pytest.raises(InputError, match="is tokenised differently"):
        align(bare, other)
    ids = hand_made("No. Ann is in", [(6, "No."), (3, " Ann"), (7, " is"), (6, " in")], 4)
    with pytest.raises(InputError, match="is tokenised differently"):
        align(bare, ids)
    question = hand_made("Eve is in", [(4, "Eve"), (5, " is"), (6, " in")], 0)
    with pytest.raises(InputError, match="queries 'Ann is in' and 'Eve is in' differ"):
        align(bare, question)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_real_prompts(family):
    tokenizer = tiny_tokenizer(family)
    for fact in sample_facts():
        bare = located(tokenizer, fact, 0)
        for dose in (1, 3):
            hijacked = located(tokenizer, fact, dose)
            found = align(bare, hijacked, span="all")
            back = align(hijacked, bare, span="all")
            assert back.pairs == tuple((j, i) for i, j in found.pairs)
            assert found.pairs[-1] == (len(bare.ids) - 1, len(hijacked.ids) - 1)
            assert (family == "gpt2") == (found.pairs[0] != (0, 0))  # a BOS corresponds
            hijack = {*hijacked.spans["hijack"]}
            assert not hijack & {j for _, j in found.pairs}
            rest = fact.prompt[len(fact.prompt.split()[0]) :]
            for i, j in found.pairs:
                assert bare.ids[i] == hijacked.ids[j]
                ends = [len(p.text) - p.offsets[k][1] for p, k in ((bare, i), (hijacked, j))]
                assert ends[0] == ends[1] or ends[0] >= len(rest)
            opened = [located(tokenizer, fact, k, opening="Well.") for k in (0, dose)]
            complete = align(*opened, span="all")
            assert complete.unmatched == 0
            assert len(complete.pairs) == len(opened[0].ids)
            assert all(opened[0].ids[i] == opened[1].ids[j] for i, j in complete.pairs)
            if not fact.template.startswith("{}"):
                subject = align(bare, hijacked, span="subject").pairs
                assert set(subject) <= set(found.pairs)
                assert subject[-1] == (bare.spans["subject"][-1], hijacked.spans["subject"][-1])
            elif family != "llama":  # it writes the first word alike, after its BOS
                with pytest.raises(InputError, match="the subject opens the bare prompt"):
                    align(bare, hijacked, span="subject")
        with pytest.raises(InputError, match="no token of the span 'hijack'"):
            align(bare, hijacked, span="hijack")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fact", sample_facts(), ids=lambda fact: fact.subject)
def test_every_token_is_in_one_unit(family, fact):
    tokenizer = tiny_tokenizer(family)
    sentence = f"Do not think of {fact.target_false}."
    bare, hijacked = (located(tokenizer, fact, dose, sentence) for dose in (0, 2))
    found = units(bare, hijacked, tokenizer)
    for side, prompt in (("bare", bare), ("hijacked", hijacked)):
        positions = [position for unit in found for position in getattr(unit, side)]
        assert sorted(positions) == list(range(len(prompt.ids)))
    for unit in found:
        if unit.span in ("query", "subject", "last"):
            texts = [
                "".join(prompt.text[a:b] for a, b in sorted({prompt.offsets[i] for i in at}))
                for prompt, at in ((bare, unit.bare), (hijacked, unit.hijacked))
            ]
            # LLaMA's prefix, a separate token before a rare first word, has that word's text.
            assert texts[0].strip() == texts[1].strip()
            names = tokenizer.convert_ids_to_tokens([bare.ids[i] for i in unit.bare])
            assert unit.token in (texts[0].strip(), *names[:1])
        if unit.span in ("hijack", "mention"):
            assert unit.bare == () and len(unit.hijacked) == 1
    named = "".join(unit.token for unit in found if unit.span == "mention")
    assert re.sub("[.Ġ▁]", "", named) == 2 * fact.target_false.replace(" ", "")
    assert found[-1].span == "last"


WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
@given(subject=st.lists(WORDS, min_size=1, max_size=3).map(" ".join), dose=st.integers(1, 2))
def test_any_subject_is_aligned_one_to_one_or_refused(family, subject, dose):
    tokenizer = tiny_tokenizer(family)
    fact = fact_of(subject)
    bare, hijacked = located(tokenizer, fact, 0), located(tokenizer, fact, dose)
    found = align(bare, hijacked)
    sides = [list(side) for side in zip(*found.pairs, strict=True)]
    assert all(side == sorted(set(side)) for side in sides)
    assert sides[0][-1] == len(bare.ids) - 1
    queries = len(bare.spans["query"]) + len(hijacked.spans["query"])
    assert queries == 2 * len(found.pairs) + found.unmatched
    assert all(bare.ids[i] == hijacked.ids[j] and i and j for i, j in found.pairs)


def test_positions_outside_a_prompt_are_refused():
    with pytest.raises(InputError, match=r"target positions \[2\] do not fit a prompt of 2 tokens"):
        Correspondence((1, 2), (3, 4), ((0, 2),))
    with pytest.raises(InputError, match="source positions"):
        Correspondence((1, 2), (3, 4), ((0, 0), (0, 1)))


def test_contexts_of_the_one_layer_model():
    task = ConceptTask(bits=2, support="first-bit", length=4)
    one = spans.layout(task, torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]))
    other = spans.layout(task, torch.tensor([[2, 0, 1, 3], [0, 2, 3, 1]]))
    found = align_contexts(one, other, span="token:2+token:3")
    assert found[0] == Correspondence((0, 1, 2, 3), (2, 0, 1, 3), ((2, 0), (3, 3)))
    assert align_contexts(one, other, span="last")[1].pairs == ((3, 3),)
    with pytest.raises(InputError, match="2 contexts cannot be aligned with 1"):
        align_contexts(one, Layout(one.tokens[:1], {}))
    with pytest.raises(InputError, match="has 1 tokens in one context and 4"):
        align_contexts(one, Layout(torch.zeros_like(one.tokens), {}), span="token:0")
    with unchecked(), pytest.raises(InputError, match="unknown span"):
        align_contexts(one, other, span="subject")
