"""Scores are those of one plain forward pass over prompt and target, however the two join."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.facts.joining import JOININGS, joined
from hijacklens.models.loading import load_model
from hijacklens.prompts.schemes import get_scheme
from hijacklens.prompts.tokens import encode
from hijacklens.prompts.wordings import make_prompts
from hijacklens.results.result import load_result
from hijacklens.scoring.answers import answer
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.items import make_items
from hijacklens.scoring.pairs import pairs
from probes import logit_lens, logit_shift

OPEN = (" ", "\n", "\n\n", ":\t", ' "', " (", " “", "「", "の首都は", "的首都是“", "คือ")
TARGETS = (("Paris", "Rome"), ("東京", "パリ"), ("French", "Français"))
PAIRS = [(end, "", pair) for end in OPEN for pair in TARGETS]
PAIRS += [(end, " ", TARGETS[0]) for end in ("", ":", "”", "dogs'")]
FACTS = tuple(
    replace(
        sample_facts()[0],
        case_id=i,
        template="The city of {} is" + end,
        target_true=true,
        target_false=false,
    )
    for i, (end, _, (true, false)) in enumerate(PAIRS)
)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma"])
def pair(request):
    plain, tokenizer = tiny_model(request.param), tiny_tokenizer(request.param)
    return PlainScorer(plain, tokenizer), load_model(copy.deepcopy(plain), tokenizer=tokenizer)


def expected(scorer, prompt, gap, targets):
    """First and sum of both targets, after the context that their tokens share with the prompt."""
    ids = [
        scorer.tokenizer(text).input_ids for text in (prompt, *(prompt + gap + t for t in targets))
    ]

    def common(*rows):
        return next(n for n in range(99) if len({tuple(row[: n + 1]) for row in rows}) > 1)

    n = common(*ids)
    for row in ids[1:]:
        logprobs = scorer.logits(row[:-1]).double().log_softmax(-1)
        scores = [float(logprobs[i - 1, row[i]]) for i in range(n, len(row))]
        own = common(ids[0], row) - n  # tokens of the prompt that the other target's context lacks
        yield sum(scores[: own + 1]), sum(scores), len(scores) - own


@pytest.mark.parametrize("opening", ["", "Well.", "Okay, ", "<|endoftext|>"])
def test_pieces_join_to_the_texts_of_prompts(opening):
    doses = [2, 0, 0, 1, 3]
    facts = FactSet(FACTS, name="ends", opening=opening)
    wordings = make_prompts(facts, get_scheme("do-not-think"), doses, None, seed=0)[0].wordings
    for wording in wordings:
        found = [
            " ".join([*beginning, *ending])
            for beginnings, endings in wording.texts(doses)
            for beginning in beginnings
            for ending in endings
        ]
        targets = (wording.fact.target_true, wording.fact.target_false)
        for prompt in map(wording.prompt, doses):
            expected = [prompt.text, *(joined(prompt.text, target) for target in targets)]
            assert [found.pop(0) for _ in expected] == expected
        assert not found


def test_every_end_of_a_prompt_is_scored_as_it_is_written(pair):
    scorer, model = pair
    options = {"doses": [1], "execution": Execution(store=False), "quiet": True}
    result = hijack(model, FactSet(FACTS, name="ends"), **options)
    assert result.skipped.empty and result.settings.facts.joining == "auto"
    for row in result.items.itertuples():
        fact, gap = FACTS[row.case_id], PAIRS[row.case_id][1]
        prompt = f"Do not think of {fact.target_false}. " * row.dose + fact.prompt
        true, false = expected(scorer, prompt, gap, (fact.target_true, fact.target_false))
        assert (row.first_true, row.sum_true) == pytest.approx(true[:2], abs=1e-4), fact
        assert (row.first_false, row.sum_false) == pytest.approx(false[:2], abs=1e-4), fact
        assert (row.n_tokens_true, row.n_tokens_false) == (true[2], false[2])


@pytest.mark.parametrize(("joining", "gap"), [("space", " "), ("none", "")])
def test_the_user_may_say_how_targets_join(joining, gap, pair):
    scorer, model = pair
    few = FactSet(FACTS[:6], name="few", joining=joining)
    result = hijack(model, few, doses=[0], execution=Execution(store=False), quiet=True)
    for row in result.items.itertuples():
        fact = FACTS[row.case_id]
        true, _ = expected(scorer, fact.prompt, gap, (fact.target_true, fact.target_false))
        assert row.sum_true == pytest.approx(true[1], abs=1e-4)
    found = answer(model, FACTS[0].prompt, targets=["Paris"], tokens=1, joining=joining)
    assert found.text == FACTS[0].prompt


def test_an_opening_precedes_every_prompt(pair, tmp_path):
    scorer, model = pair
    facts = FactSet(FACTS[:3], name="few").with_opening("Well.")
    result = hijack(model, facts, doses=[1], execution=Execution(store=False), quiet=True)
    for row in result.items.itertuples():
        fact, gap = FACTS[row.case_id], PAIRS[row.case_id][1]
        sentence = f"Do not think of {fact.target_false}. " * row.dose
        targets = (fact.target_true, fact.target_false)
        true, false = expected(scorer, f"Well. {sentence}{fact.prompt}", gap, targets)
        assert (row.sum_true, row.sum_false) == pytest.approx((true[1], false[1]), abs=1e-4)
    loaded = load_result(result.save(tmp_path / "out"))
    assert loaded.settings.facts.opening == "Well."
    assert "few after 'Well.'" in str(loaded)
    for wrong in (" Well.", "Well.\nSo.", None):
        with pytest.raises(InputError, match="the opening"), unchecked():
            facts.with_opening(wrong)


def test_answers_read_the_text_as_it_is_written(pair):
    scorer, model = pair
    for end, gap, targets in PAIRS[::4]:
        prompt = f"The city of Rome is{end}"
        found = answer(model, prompt, targets=targets, tokens=0)
        assert found.text == prompt
        token, logprob = scorer.top(prompt)
        assert (found.top[0].token, found.top[0].logprob) == (
            token,
            pytest.approx(logprob, abs=1e-4),
        )
        for target, candidate in zip(targets, found.targets, strict=True):
            ((first, _, _), _) = expected(scorer, prompt, gap, (target, target))
            assert candidate.logprob == pytest.approx(first, abs=1e-4)


ENDS = st.text(max_size=3) | st.sampled_from([*OPEN, "'", "»", "—", "\u3000", "é", "北"])
WORDS = st.text(max_size=4).map(str.strip).filter(bool) | st.sampled_from(["Paris", "東京", "パリ"])


@settings(max_examples=80)
@given(end=ENDS, true=WORDS, false=WORDS, joining=st.sampled_from(JOININGS))
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_both_targets_are_the_rest_of_their_texts_after_one_context(
    family, end, true, false, joining
):
    assume("{}" not in end and true != false)
    template = "The city of {} is" + end
    fact = replace(FACTS[0], template=template, target_true=true, target_false=false)
    tokenizer = tiny_tokenizer(family)
    facts = FactSet((fact,), name="x", joining=joining)
    prompts, _ = make_prompts(facts, get_scheme("think"), (0, 1), tokenizer, seed=0)
    items, unscored = make_items(prompts, tokenizer, context_length=999)
    assert {len(items), len(unscored)} in ({2, 0}, {0, 1})
    for item in items:
        (context, _), steps = item.true[0], (item.true, item.false)
        assert item.false[0][0] == context
        for target, side, end_of_prompt in zip((true, false), steps, item.prompt_ends, strict=True):
            ids = context + tuple(token for _, token in side)
            (expected_ids,) = encode(tokenizer, [joined(item.prompt.text, target, joining)])
            assert ids == expected_ids
            assert side[end_of_prompt:]


def test_probes_read_what_is_scored_or_refuse(pair):
    scorer, model = pair
    few = FactSet(FACTS[1::18], name="few")
    for each in pairs(model, few):
        fact, gap = each.fact, PAIRS[each.fact.case_id][1]
        true, false = expected(scorer, fact.prompt, gap, (fact.target_true, fact.target_false))
        for trace, bare in (
            (logit_shift.trace, lambda found: found.bare),
            (
                logit_lens.trace,
                lambda found: found.at_last().query("dose == 0").difference.iloc[-1],
            ),
        ):
            try:
                found = bare(trace(model, each))
            except InputError as error:
                assert each.same_first_token or "separate token" in str(error)
            else:
                assert found == pytest.approx(false[0] - true[0], abs=1e-4)


def test_targets_are_compared_after_one_context():
    """Where the tokenizer joins the prompt's last letter with one target only."""
    plain, tokenizer = copy.deepcopy(tiny_model("gpt2")), copy.deepcopy(tiny_tokenizer("gpt2"))
    tokenizer.add_tokens([": Cardiff"])
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    scorer, model = (
        PlainScorer(plain, tokenizer),
        load_model(copy.deepcopy(plain), tokenizer=tokenizer),
    )
    fact = replace(
        FACTS[0], case_id=99, template="{}. Capital:", target_true="Cardiff", target_false="Leeds"
    )
    result = hijack(
        model, FactSet((fact,), name="x"), doses=[0], execution=Execution(store=False), quiet=True
    )
    (row,) = result.items.itertuples()
    true, false = expected(scorer, fact.prompt, " ", ("Cardiff", "Leeds"))
    assert (row.first_true, row.sum_true, row.n_tokens_true) == pytest.approx(true, abs=1e-4)
    assert (row.first_false, row.sum_false, row.n_tokens_false) == pytest.approx(false, abs=1e-4)
    before, colon = tokenizer(f"{fact.subject}. Capital").input_ids, tokenizer(":").input_ids[0]
    assert false[1] < float(scorer.logits(before)[-1].log_softmax(-1)[colon])
    skipped = pairs(model, FactSet((fact, sample_facts()[0]), name="x")).skipped
    assert list(skipped["case_id"]) == [99]
    assert "with one of the targets only" in skipped["reason"].iloc[0]
