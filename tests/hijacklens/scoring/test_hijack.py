"""The main job against brute force: single Hugging Face forward passes, token by token."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from tiny_models import CONTEXT, FAMILIES, tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, FactSet, Skipped
from hijacklens.models.loading import load_model
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.results.result import load_result
from hijacklens.scoring import execution as execution_module
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.items import ITEM_COLUMNS
from hijacklens.scoring.result import HijackResult
from probes.attention import knock_out

SCHEMES = ("do-not-think", "relation", "near-word")
DOSES = (0, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def run(request):
    plain = tiny_model(request.param)
    tokenizer = tiny_tokenizer(request.param)
    model = load_model(copy.deepcopy(plain), tokenizer=tokenizer, device="cpu")
    result = hijack(model, sample_facts(), schemes=SCHEMES, doses=DOSES, quiet=True)
    return plain, tokenizer, model, result


def test_every_item_equals_single_plain_forward_passes(run):
    plain, tokenizer, _, result = run
    scorer = PlainScorer(plain, tokenizer)
    facts = {fact.case_id: fact for fact in sample_facts()}
    assert len(result.items) == 50
    for item in result.items.to_dict("records"):
        fact = facts[item["case_id"]]
        sentence = get_scheme(item["scheme"]).sentence(fact)
        prompt = " ".join([sentence] * item["dose"] + [fact.prompt])
        for side, target in (("true", fact.target_true), ("false", fact.target_false)):
            expected = scorer.scores(prompt, target)
            assert item[f"n_tokens_{side}"] == len(expected)
            assert item[f"first_{side}"] == pytest.approx(expected[0], abs=1e-4)
            assert item[f"sum_{side}"] == pytest.approx(sum(expected), abs=1e-4)
        top, logprob = scorer.top(prompt)
        assert item["top_token"] == top
        assert item["top_logprob"] == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_any_batch_size_gives_the_same_items(run, batch_tokens):
    _, _, model, result = run
    other = hijack(
        model,
        sample_facts(),
        schemes=SCHEMES,
        doses=DOSES,
        execution=Execution(batch_tokens=batch_tokens),
        quiet=True,
    )
    pd.testing.assert_frame_equal(other.items, result.items, atol=1e-4, rtol=0)


def test_skipped_facts_are_listed_with_their_reason(run):
    *_, result = run
    near = result.skipped[result.skipped["scheme"] == "near-word"]
    assert set(near["case_id"]) == {0, 2, 3, 4, 5}
    assert near["reason"].str.contains("no near word is known for the false target").all()
    scored = result.items.groupby("scheme")["case_id"].nunique()
    assert scored.to_dict() == {"do-not-think": 10, "relation": 10, "near-word": 5}


def test_shared_first_tokens_are_reported(run):
    *_, result = run
    items = result.items.set_index("case_id")
    # "New York" and "New Delhi" begin alike; by first token they tie.
    assert items.loc[5, "same_first_token"].all()
    assert (items.loc[5, "first_true"] == items.loc[5, "first_false"]).all()
    assert (items.loc[5, "sum_true"] != items.loc[5, "sum_false"]).all()
    assert not items.loc[0, "same_first_token"].any()
    assert 5 in result.configuration()["same_first_token"]
    assert (result.summary(rule="first")["ties"].iloc[0]) == len(
        result.configuration()["same_first_token"]
    )


def test_bare_query_is_the_same_under_all_schemes(run):
    *_, result = run
    bare = result.items[result.items["dose"] == 0]
    spread = bare.groupby("case_id")[["first_true", "sum_false", "top_logprob"]].nunique()
    assert (spread == 1).all().all()


def test_result_saves_and_loads(run, tmp_path):
    *_, result = run
    folder = result.save(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {
        "items.parquet",
        "prompts.parquet",
        "summary.csv",
        "rules.csv",
        "skipped.csv",
        "result.json",
        "curve.svg",
        "curve.png",
    }
    loaded = load_result(folder)
    assert isinstance(loaded, HijackResult)
    pd.testing.assert_frame_equal(loaded.items, result.items)
    pd.testing.assert_frame_equal(loaded.prompts, result.prompts, check_dtype=False)
    pd.testing.assert_frame_equal(loaded.full_summary, result.full_summary)
    pd.testing.assert_frame_equal(
        loaded.skipped.astype(str), result.skipped.astype(str), check_dtype=False
    )
    assert loaded.configuration() == result.configuration()
    assert loaded.provenance == result.provenance
    written = pd.read_csv(folder / "summary.csv")
    np.testing.assert_allclose(written["efficacy"], result.full_summary["efficacy"])
    with pytest.raises(InputError, match="already contains a result"):
        result.save(folder)
    assert repr(loaded) == repr(result)


@pytest.fixture(scope="module")
def gpt2():
    tokenizer = tiny_tokenizer("gpt2")
    return load_model(tiny_model("gpt2"), tokenizer=tokenizer, device="cpu")


def test_items_have_the_columns_of_the_design(gpt2):
    result = hijack(gpt2, sample_facts()[:2], doses=[1], quiet=True)
    assert tuple(result.items.columns) == ITEM_COLUMNS
    assert result.items["dose"].tolist() == [0, 1, 0, 1]  # dose 0 is always there
    assert result.to_dataframe() is not result.items


def test_a_fact_is_scored_at_all_doses_or_at_none(gpt2):
    dose = CONTEXT // 7
    result = hijack(gpt2, sample_facts(), doses=[1, dose], quiet=True)
    assert 0 < len(result.skipped) < 10
    assert result.skipped["reason"].str.contains(f"window of {CONTEXT}").all()
    counts = result.items.groupby("case_id")["dose"].count()
    assert (counts == 3).all()
    assert set(counts.index).isdisjoint(result.skipped["case_id"])
    assert len(counts) + len(result.skipped) == 10


def test_prompt_that_fills_the_window_exactly_is_scored(gpt2):
    word = " Rome"  # one token, however often it is repeated
    prompt = "Paris is" + word * (CONTEXT - len(gpt2.tokenizer("Paris is").input_ids))
    assert len(gpt2.tokenizer(prompt).input_ids) == CONTEXT

    def one(text):
        fact = Fact(
            case_id=1,
            relation_id="",
            subject="Paris",
            template=text.replace("Paris", "{}"),
            target_true="Rome",
            target_false="London",
        )
        return FactSet((fact,), name="one")

    exact = hijack(gpt2, one(prompt), doses=[0], quiet=True)
    assert len(exact.items) == 1
    with pytest.raises(InputError, match=f"{CONTEXT + 1} tokens, more than .* window"):
        hijack(gpt2, one(prompt + word), doses=[0], quiet=True)


def test_scores_that_are_not_finite_are_listed(gpt2, monkeypatch):
    real = execution_module.read

    def broken(*arguments):
        readings = real(*arguments)
        longest = readings.requests.lengths.argmax(keepdims=True)
        readings.logprobs[readings.requests.where(longest)[0]] = float("nan")
        return readings

    monkeypatch.setattr(execution_module, "read", broken)
    result = hijack(gpt2, sample_facts(), doses=[1], quiet=True)
    assert result.skipped["reason"].tolist() == [
        "the model gave no finite log-probability at dose 1"
    ]
    assert result.items["case_id"].nunique() == 9
    assert not result.items.isna().any().any()


def test_unreadable_records_appear_among_the_skipped(gpt2):
    facts = sample_facts()[:2]
    facts = FactSet(facts.facts, name="x", skipped=(Skipped(None, "P1", "", "record 3: broken"),))
    result = hijack(gpt2, facts, doses=[0], quiet=True)
    assert result.skipped["reason"].tolist() == ["record 3: broken"]


def test_user_scheme_and_seeded_draw(gpt2):
    own = Scheme(name="never-say", template="Never say {target_false}.")
    result = hijack(gpt2, sample_facts(), schemes=[own], doses=[1], quiet=True)
    assert result.settings.schemes[0].text == "Never say {target_false}."
    draws = [
        hijack(gpt2, sample_facts(), schemes=["do-not-think-other"], doses=[1], seed=s, quiet=True)
        for s in (0, 0, 1, 2, 3)
    ]
    assert draws[0].items.equals(draws[1].items)
    assert any(not draws[0].items.equals(other.items) for other in draws[2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schemes": ["do-not-thnk"]}, "did you mean 'do-not-think'"),
        ({"schemes": []}, "name at least one scheme"),
        ({"schemes": ["think", "think"]}, "each once"),
        ({"doses": []}, "doses is empty"),
        ({"doses": [-1]}, "counts sentences, is -1; give"),
        ({"doses": [1.5]}, "counts sentences, is 1.5; give"),
        ({"doses": ["1"]}, "counts sentences, is '1'; give"),
        ({"dose": 1}, "unknown argument of hijack 'dose'; did you mean 'doses'"),
        ({"execution": "local"}, r"execution is 'local', a str; .*hl.Execution\(store=False\)"),
        ({"facts": FactSet((), name="none")}, "no facts to score in none"),
    ],
)
def test_bad_input(gpt2, options, message):
    facts = options.pop("facts", sample_facts())
    with pytest.raises(InputError, match=message), unchecked():
        hijack(gpt2, facts, quiet=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": -1}, "batch_tokens is -1; .* at least 1"),
        ({"batch_tokens": 0}, "batch_tokens is 0; .* at least 1"),
        ({"sharing": "fast"}, "unknown sharing 'fast'.*cached.*plain"),
        ({"engine": "spark"}, r"unknown engine 'spark'.*pass a RayEngine"),
        ({"store": 3}, "store of readings is named by .* not 3"),
    ],
)
def test_bad_executions(options, message):
    with pytest.raises(InputError, match=message), unchecked():
        Execution(**options)


def test_runs_of_a_held_execution_share_the_model(gpt2):
    facts, other = sample_facts()[:2], load_model(tiny_model("llama"), tokenizer=gpt2.tokenizer)
    plain = hijack(gpt2, facts, doses=[1], execution=Execution(store=False), quiet=True)
    with Execution(store=False).held(gpt2) as held:
        again = hijack(gpt2, facts, doses=[1], execution=held, quiet=True)
        pd.testing.assert_frame_equal(again.items, plain.items)
        assert again.settings.models[0].weights_hash == plain.settings.models[0].weights_hash
        with pytest.raises(InputError, match="held for GPT2LMHeadModel"):
            hijack(other, facts, execution=held, quiet=True)


def test_arguments_of_the_execution_go_by_their_old_names(gpt2):
    options = {"facts": sample_facts()[:2], "doses": [1], "quiet": True}
    with pytest.warns(
        FutureWarning, match=r"way= is now called execution=Execution\(sharing=...\)"
    ):
        result = hijack(gpt2, way="plain", store=False, **options)
    (scored,) = result.settings.models
    assert scored.engine.sharing == "plain"
    assert scored.readings.store_off == "turned off"
    with pytest.raises(InputError, match="execution is given twice, also by its old name store"):
        hijack(gpt2, execution=Execution(), store=False, **options)


def test_a_name_is_no_model():
    with pytest.raises(InputError, match=r"hl.load_model\('gpt2'\) gives one"), unchecked():
        hijack("gpt2", sample_facts(), quiet=True)  # type: ignore[arg-type]


def test_the_bare_query_alone_is_shown_once(gpt2):
    bare = hijack(gpt2, sample_facts(), doses=[0], quiet=True)
    rows = [line for line in repr(bare).splitlines() if line.strip().startswith("0 ")]
    assert len(rows) == 1


def test_join_of_two_models(gpt2):
    llama = load_model(tiny_model("llama"), tokenizer=tiny_tokenizer("llama"), device="cpu")
    results = [hijack(m, sample_facts(), doses=[0, 1], quiet=True) for m in (gpt2, llama)]
    joined = HijackResult.join(results)
    assert len(joined.items) == 40
    assert joined.items["model"].nunique() == 2
    assert joined.summary()["n"].tolist() == [10, 10, 10, 10]
    figure = joined.plot()
    (axes,) = figure.axes
    assert len(axes.lines) == 3  # two models and the line at one half
    with pytest.raises(InputError, match="occurs twice"):
        HijackResult.join([results[0], results[0]])
    other = hijack(llama, sample_facts(), doses=[0, 2], quiet=True)
    with pytest.raises(InputError, match="differ in doses"):
        HijackResult.join([results[0], other])


def test_summary_refuses_unknown_rules_and_relations(gpt2):
    result = hijack(gpt2, sample_facts(), doses=[1], quiet=True)
    with pytest.raises(InputError, match="unknown rule 'last'"), unchecked():
        result.summary(rule="last")
    with pytest.raises(InputError, match="unknown relation 'P9'"):
        result.summary(relation="P9")
    assert result.summary(relation="P190")["n"].tolist() == [2, 2]
    (known,) = result.known_facts()
    assert known["n"] == 10 and known.keys() == {"model", "n", "first", "sum", "mean"}


def test_one_scheme_may_be_named_by_itself(gpt2):
    one = hijack(gpt2, sample_facts(), schemes="think", doses=1, quiet=True)
    assert one.items["scheme"].unique().tolist() == ["think"]
    assert one.settings.doses == (0, 1)


def test_the_sentences_of_every_relation_are_saved(gpt2):
    result = hijack(gpt2, sample_facts(), schemes="relation", doses=[1], quiet=True)
    texts = result.settings.schemes[0].text
    assert texts["P190"] == "The twin city of {subject} is not {target_false}."


def test_case_ids_are_unique():
    with pytest.raises(InputError, match="case id 3 occurs more than once"):
        FactSet((*sample_facts(), sample_facts()[3]), name="twice")


def test_a_record_without_a_case_id_leaves_the_others_whole_numbers(gpt2, tmp_path):
    skipped = (Skipped(7, "P36", "007", "empty"), Skipped(None, "P36", "NA", "no case id"))
    facts = replace(sample_facts().where(case_ids=[0, 3]), skipped=skipped)
    result = hijack(gpt2, facts, doses=[1], quiet=True)
    result.save(tmp_path / "out")
    lines = (tmp_path / "out" / "skipped.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1] for line in lines] == ["7", ""]
    found = load_result(tmp_path / "out").skipped
    pd.testing.assert_frame_equal(found, result.skipped)
    assert found["subject"].tolist() == ["007", "NA"]


def test_errors_of_a_probe_name_its_key(gpt2):
    probe = knock_out(layers=[99], source="last", target="hijack")
    with pytest.raises(InputError, match=r"the probe knock-out:.*layers=99: layer 99 is not one"):
        hijack(gpt2, sample_facts(), doses=[1], probes=[probe], quiet=True)
