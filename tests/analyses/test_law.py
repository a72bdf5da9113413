"""Laws of the shift: formulas by hand, what predictors may read, and what the comparison finds."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import rows
import torch
from command_calls import run as run_command
from planted_head import planted_facts, planted_model
from tiny_models import tiny_tokenizer

import hijacklens as hl
from analyses import law
from analyses.law.evaluation import calibration, influences, predictions, scores, selected
from analyses.law.laws import BY_NAME, folds
from hijacklens.one_layer import memory
from hijacklens.one_layer.model import OneLayerTransformer

EXAMPLE = pd.DataFrame(
    {
        **dict.fromkeys(law.PREDICTORS, 0.0),
        "dose": [2], "prior": -3.0, "logp_true": -2.0, "logp_false": -5.0, "sentence_true": -4.0,
        "sentence_false": -1.0, "tokens_sentence": 2.0, "tokens_query": 4.0, "copying": 4.0,
        "similarity_true": 0.25, "similarity_false": 0.75, "similarity_targets": 0.5,
    }
)  # fmt: skip
BY_HAND = {
    "constant": ({"c": 2.0}, 2.0),
    "prior": ({"a": 1.0, "t": 0.5, "f": -0.25}, 1 - 1 + 1.25),
    "additive": ({"gamma": 2.0, "alpha": -1.0}, 2 * 2**2),
    "logistic": ({"a": 1.0, "b": 2.0}, 1 + 2 / (1 + np.exp(3)) + 3),
    "saturation": ({"lambda": 1.0, "beta": 0.5}, 4 * (1 - 0.25)),
    # Two sentences of half a query's length: r k = 1, evidence 1 + 0.5 * 3, mixing rate 1 / 2.
    "posterior": ({"e0": 1.0, "e": 0.5, "c": 1.0}, (2.5 + 3) / 2),
    "geometry": ({"a": 1.0, "b": 0.5, "c": 2.0, "d": -1.0}, 1 + 2 + 1 - 0.5),
}
"""Law -> parameters, and the shift that it predicts for `EXAMPLE`."""


def drawn(facts: int = 60, doses=(1, 3), relations: int = 12, seed: int = 0) -> pd.DataFrame:
    """Predictors without shifts."""
    draw = np.random.default_rng(seed)
    table = pd.DataFrame({name: draw.normal(size=facts) for name in law.PREDICTORS})
    table["prior"] = table["logp_false"] - table["logp_true"]
    table[["tokens_sentence", "tokens_query"]] = draw.integers(3, 9, (facts, 2)).astype(float)
    table["case_id"] = range(facts)
    table["relation_id"] = [f"P{i % relations}" for i in range(facts)]
    table = table.assign(model="drawn", scheme="s")
    return pd.concat([table.assign(dose=dose) for dose in doses], ignore_index=True)


def by_hand(name, table):
    """The shift of a table by a law with the parameters of `BY_HAND`."""
    return BY_NAME[name].shift(
        BY_HAND[name][0], {k: table[k].to_numpy(float) for k in (*law.PREDICTORS, "dose")}
    )


@pytest.mark.parametrize("name", BY_HAND)
def test_a_law_has_its_formula_and_finds_its_parameters(name):
    parameters, shift = BY_HAND[name]
    assert np.ravel(by_hand(name, EXAMPLE))[0] == pytest.approx(shift)
    table = drawn().assign(shift=lambda table: by_hand(name, table))
    fitted = BY_NAME[name].fit(table)
    found = {key: one.value for key, one in fitted.parameters.items()}
    assert found == pytest.approx(parameters, abs=1e-3)
    assert fitted.predict(EXAMPLE)[0] == pytest.approx(shift, abs=1e-2)


def test_the_interval_of_a_mean_is_that_of_its_relations():
    table = pd.DataFrame({"shift": [1.0, 3, 5, 7], "relation_id": [*"aabb"], "dose": 1})
    found = BY_NAME["constant"].fit(table).parameters["c"]
    # The sums of residuals are -4 and 4: variance (16 + 16) / 4^2 * 2 / 1; t(1) is 12.706.
    assert (found.value, found.high) == pytest.approx((4, 4 + 12.7062 * 2), abs=1e-3)
    one_dose = BY_NAME["additive"].fit(table)
    assert one_dose.parameters["alpha"].high == np.inf  # one dose says nothing about the growth
    # At another dose, only gamma 2^(1 - alpha) is fixed: neither of them is.
    two = BY_NAME["additive"].fit(table.assign(dose=2)).parameters
    assert [one.high for one in two.values()] == [np.inf, np.inf]
    # Only the last relation has another dose, so the others do not fix the growth.
    last = BY_NAME["additive"].fit(table.assign(dose=[1, 1, 1, 2])).parameters
    assert last["alpha"].high == np.inf


@pytest.mark.parametrize("sizes", [[10] * 3, [1, 2, 3, 4, 5, 6, 8, 10, 20, 60]])
def test_the_intervals_of_parameters_cover_with_few_and_with_unequal_relations(sizes):
    random, codes, covered = np.random.default_rng(0), np.repeat(range(len(sizes)), sizes), 0
    for _ in range(100):
        shared, prior = 1.5 * random.normal(size=len(sizes)), random.normal(size=len(sizes))
        table = pd.DataFrame({"relation_id": codes, "dose": 1})
        table["shift"] = shared[codes] + 2 * random.normal(size=len(codes))
        table["logp_true"] = prior[codes] + 0.3 * random.normal(size=len(codes))
        table["logp_false"] = random.normal(size=len(codes))
        found = BY_NAME["prior"].fit(table).parameters["t"]
        covered += found.low <= 0 <= found.high
    assert covered >= 95


def test_the_ceiling_is_ridge_regression_and_chooses_its_penalty_inside():
    table = drawn(200, doses=(1,))
    noise = np.random.default_rng(7).normal(size=len(table))
    table["shift"] = 2 + table["copying"] + 0.5 * table["entropy"] + 0.1 * noise
    fitted = BY_NAME["ceiling"].fit(table[:150])
    rest = table[150:]
    assert np.corrcoef(fitted.predict(rest), rest["shift"])[0, 1] > 0.99
    found = {name: each.value for name, each in fitted.parameters.items()}
    # The mean is not penalised; at one dose nothing is known about the growth.
    assert found["mean"] == pytest.approx(table[:150]["shift"].mean())
    assert found["copying"] == pytest.approx(table[:150]["copying"].std(ddof=0), rel=0.05)
    assert fitted.parameters["log dose"].high == np.inf
    assert BY_NAME["ceiling"].fit(table.assign(shift=noise)).parameters["penalty"].value >= 1000


def test_folds_keep_relations_together():
    groups = np.array(["a"] * 5 + ["b"] * 3 + ["c"] * 2 + ["d"])
    found = folds(groups, 2, seed=1)
    assert all(len(set(found[groups == name])) == 1 for name in groups)
    assert sorted(found[[0, 5, 8, 10]]) == [0, 0, 1, 1]


def test_measures_by_hand():
    rows = pd.DataFrame(
        {
            "prior": [-1.0, -1, -1, -1, 2],
            "shift": [2.0, 0, 2, 0, 1],
            "predicted": [2.0, 0, 0, 1, 1],
            "probability": [0.8, 0.1, 0.4, 0.5, 0.9],
        }
    )
    found = {name: values.mean() for name, values in influences(rows).items()}
    assert found["r2"] == pytest.approx(1 - 5 / 4)
    assert found["auc"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)  # margins 1, -1 against -1, 0
    assert found["brier"] == pytest.approx((0.04 + 0.01 + 0.36 + 0.25) / 4)
    assert calibration(rows)["n"].tolist() == [1, 1, 1, 1]  # known facts alone


@pytest.mark.parametrize("prior", [[-1.0, -1, -1, -1, -2], [1.0] * 5])
def test_intervals_of_few_facts_stay_within_what_a_measure_can_be(prior):
    """AUC is 0, or no fact is known."""
    rows = {"shift": [2.0, 0, 2, 0, 3], "predicted": [0.0, 1, 0, 1, 0.5], "probability": 0.5}
    axes = {"law": "a", "split": "b", "model": "c", "scheme": "d", "fitted_on": ""}
    table = pd.DataFrame({**rows, **axes, "prior": prior, "relation_id": [*"aabcd"]})
    (row,) = scores(table).to_dict("records")
    assert row["r2_low"] < row["r2"] < row["r2_high"] <= 1
    if prior[0] < 0:
        assert row["auc"] == row["auc_low"] == 0 and 0.5 < row["auc_high"] <= 1
    else:
        assert all(np.isnan(row[name]) for name in ("auc", "auc_low", "auc_high", "ece", "brier"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model with a planted head, its facts, and a run."""
    folder = tmp_path_factory.mktemp("planted")
    planted_model().save_pretrained(folder)
    tiny_tokenizer("llama").save_pretrained(folder)
    facts = planted_facts()
    facts.to_dataframe().drop(columns="prompt").to_json(
        folder / "facts.jsonl", orient="records", lines=True
    )
    facts = hl.counterfact(folder / "facts.jsonl")
    model = hl.load_model(str(folder))
    schemes = ["do-not-think", "think"]
    return model, facts, hl.hijack(model, facts, schemes=schemes, doses=[1, 2], quiet=True), folder


def test_predictors_never_read_the_hijacked_run(planted, monkeypatch):
    model, facts, run, _ = planted
    module, read = importlib.import_module("analyses.law.predictors"), []
    forward = module.logits_at

    def spy(model, layout, *arguments, **options):
        read.extend(model.tokenizer.batch_decode(layout.tokens))
        return forward(model, layout, *arguments, **options)

    monkeypatch.setattr(module, "logits_at", spy)
    table = law.predictors(model, facts, ["do-not-think", "think"], quiet=True)
    queries = [fact.prompt for fact in facts]
    assert len(table) == 2 * len(facts)
    assert any("hink of" in text for text in read)
    assert not [text for text in read if "hink of" in text and any(q in text for q in queries)]
    # Whatever the hijacked readings are, the predictors stay the same.
    items = run.items.copy()
    hijacked = items["dose"] > 0
    items.loc[hijacked, ["first_true", "first_false"]] = np.random.default_rng(0).normal(
        size=(hijacked.sum(), 2)
    )
    changed = law.measured(hl.HijackResult(items, run.skipped, run.settings, run.provenance), table)
    found = law.measured(run, table)
    columns = list(law.PREDICTORS)
    pd.testing.assert_frame_equal(found[columns], changed[columns])
    assert not np.allclose(found["shift"], changed["shift"])


def test_a_run_of_other_weights_prompts_or_targets_is_not_joined(planted):
    model, facts, run, _ = planted
    swapped = replace(
        facts,
        facts=tuple(
            replace(fact, target_true=fact.target_false, target_false=fact.target_true)
            for fact in facts
        ),
    )
    for others in (swapped, facts.with_opening("Well.")):
        table = law.predictors(model, others, ["do-not-think"], quiet=True)
        with pytest.raises(hl.InputError, match="not of the same weights, prompts and targets"):
            law.measured(run, table)


def test_predictors_are_those_of_the_plain_model(planted):
    model, facts, run, _ = planted
    table = law.predictors(model, facts, quiet=True)
    bare = run.items[(run.items["dose"] == 0) & (run.items["scheme"] == "do-not-think")]
    margin = (bare["first_false"] - bare["first_true"]).to_numpy()
    assert table["prior"].to_numpy() == pytest.approx(margin, abs=1e-4)
    pair = hl.pairs(model, facts)[0]
    sentence = model.tokenizer(f"Do not think of {facts[0].target_false}.", return_tensors="pt")
    logits = model(sentence.input_ids)[0, -1].log_softmax(-1)
    assert table["sentence_false"][0] == pytest.approx(
        float(logits[pair.answers()[1]].detach()), abs=1e-4
    )
    # The planted head writes the same to every target of one token, other heads little.
    low, high = table["copying_all"].quantile([0.4, 0.8])
    assert 0 < low < high < 1.1 * low
    assert table[["copying", "copying_all"]].std(ddof=0).tolist() == pytest.approx([1, 1])


def test_finished_predictors_are_not_read_again(planted, monkeypatch, tmp_path):
    model, facts, *_ = planted
    module, schemes = importlib.import_module("analyses.law.predictors"), ["do-not-think", "think"]
    forward, passes = module.logits_at, []

    def limited(*arguments, **options):
        if len(passes) == limit:
            raise KeyboardInterrupt
        passes.append(1)
        return forward(*arguments, **options)

    plain = law.predictors(model, facts, schemes, quiet=True)
    monkeypatch.setattr(module, "logits_at", limited)
    monkeypatch.setattr(module, "CHUNK", 8)  # 36 rows in five parts, two passes each
    for limit, done in ((5, 5), (99, 6), (0, 0)):  # the second part was interrupted
        passes.clear()
        options = {"keep": tmp_path, "quiet": True}
        if limit == 5:
            with pytest.raises(KeyboardInterrupt):
                law.predictors(model, facts, schemes, **options)
        else:
            kept = law.predictors(model, facts, schemes, **options)
            pd.testing.assert_frame_equal(kept, plain, rtol=1e-4, atol=1e-5)
        assert len(passes) == done
    ordered = module.pairs

    def reordered(*arguments, **options):  # the order of spans differs between processes
        made = ordered(*arguments, **options)
        turned = [
            replace(pair, bare=replace(pair.bare, spans=dict(reversed(pair.bare.spans.items()))))
            for pair in made
        ]
        return replace(made, pairs=tuple(turned))

    monkeypatch.setattr(module, "pairs", reordered)
    few = law.predictors(model, facts.limit(5), schemes[:1], keep=tmp_path, quiet=True)
    assert few["copying_all"].std(ddof=0) == pytest.approx(1)  # standardised over these facts
    with pytest.raises(KeyboardInterrupt):  # other prompts
        law.predictors(model, facts.with_opening("Well."), schemes, keep=tmp_path, quiet=True)


@pytest.mark.parametrize("averages", [False, True])
def test_where_the_posterior_is_known_its_law_wins(averages):
    task = hl.ConceptTask(bits=4, length=12)
    model = (
        OneLayerTransformer.from_weights(memory.theorem_1(task), length=40) if averages else None
    )
    table = law.exact(task, model, facts=120, doses=(1, 3))
    laws = law.LAWS[:-1] if averages else law.LAWS  # the ceiling takes most of the time
    found = predictions(table, laws=laws, count=2, splits=["all doses"], quiet=True)
    assert selected(found) == "posterior"
    error = found[found["law"] == "posterior"].eval("abs(predicted - shift)")
    assert error.max() < 0.01
    fitted = {k: v.value for k, v in BY_NAME["posterior"].fit(table).parameters.items()}
    # Three tokens against twelve: the exact rule adds evidence, uniform attention mixes it.
    expected = {"e0": 0, "e": 1, "c": 1} if averages else {"e0": 0, "e": 4, "c": 0}
    assert fitted == pytest.approx(expected, abs=1e-3)
    # With shuffled shifts no law predicts anything.
    order = np.random.default_rng(0).permutation(len(table))
    shuffled = table.assign(shift=table["shift"].to_numpy()[order])
    nothing = predictions(shuffled, laws=law.LAWS[:-1], count=3, splits=["relations"], quiet=True)
    for _, part in nothing.groupby("law"):
        assert influences(part)["r2"].mean() < 0.1


def test_in_a_pocket_world_the_posterior_is_the_best_formula():
    world = hl.World(bits=3, subjects=24, name_words=1, relations=1, wordings=1)
    table = law.exact(world, facts=24, doses=(1,))
    query = {each["case_id"]: each for each in world.queries()}[table["case_id"][0]]
    reader, prompt = hl.Reader(world), query["template"].format(query["subject"])
    prior = reader.margin(prompt, query["target_true"], query["target_false"])
    assert table["prior"][0] == pytest.approx(prior)
    said = [f"People talk about {a} and {b}." for a in world.objects for b in world.objects]
    shifts = [
        reader.margin(f"{s} {prompt}", query["target_true"], query["target_false"]) - prior
        for s in said
    ]
    assert np.abs(np.array(shifts) - table["shift"][0]).min() < 1e-9
    assert table["relation_id"][0] == query["target_true"]
    found = predictions(table, laws=law.LAWS[:-1], count=3, splits=["relations"], quiet=True)
    r2 = {name: influences(rows)["r2"].mean() for name, rows in found.groupby("law")}
    assert r2.pop("posterior") > max(*r2.values(), 0.5)


def test_later_doses_follow_from_the_first_one():
    table = drawn(40, doses=(1, 2, 4)).assign(shift=lambda table: by_hand("additive", table))
    table["shift"] *= 1 + table["case_id"] / 10  # every fact has its own evidence
    found = predictions(table, count=3, splits=["later doses"], quiet=True)
    r2 = {name: influences(rows)["r2"].mean() for name, rows in found.groupby("law")}
    assert r2["additive"] == pytest.approx(1)
    assert r2["constant"] < 0.2  # the shift of the first dose stays
    assert set(r2) == {"constant", "additive", "saturation", "posterior", "ceiling"}
    constant = found[found["law"] == "constant"].merge(table[table["dose"] == 1], on="case_id")
    assert constant["predicted"].tolist() == constant["shift_y"].tolist()
    # A fact without a shift at the first dose is left out; a prediction of 0 there does not grow.
    parts = predictions(table[1:], count=3, splits=["later doses"], quiet=True)
    assert len(parts) == len(found) - 2 * 5
    zero = table[:1].assign(dose=4, first=3.0, first_dose=1, sentence_true=0.0, sentence_false=0.0)
    still = (
        BY_NAME["posterior"]
        .given_first()
        .shift(
            BY_HAND["posterior"][0] | {"e0": 0.0},
            {
                name: zero.assign(prior=0.0)[name].to_numpy()
                for name in (*law.PREDICTORS, "dose", "first", "first_dose")
            },
        )
    )
    assert still.tolist() == [3.0]


def test_the_comparison_over_schemes_and_models_explains_facts():
    table = drawn(40, doses=(1,), relations=5)
    other = table.assign(scheme="t")
    table = pd.concat([table, other, table.assign(model="second")], ignore_index=True)
    noise = np.random.default_rng(1).normal(size=len(table)) / 10
    table = table.assign(subject="x", target_true="a", target_false="b")
    table["shift"] = by_hand("saturation", table) + noise
    laws = [BY_NAME[name] for name in ("constant", "saturation")]
    result = law.compare(table, laws=laws, folds=3, quiet=True)
    splits = result.laws.groupby("split").size().to_dict()
    assert splits == {"relations": 6, "schemes": 4, "models": 4}
    assert result.selected() == "saturation"
    rows = result.differences.query("measure == 'r2' and split == 'models'")
    assert (rows["difference_low"] > 0).all()
    explained = result.explain(7, law="saturation")
    assert explained["mean":].sum() == pytest.approx(explained["predicted"])
    assert abs(explained["measured"] - explained["predicted"]) < 0.5
    assert explained.index.tolist()[4:] == ["mean", "prior", "together"]
    assert "case 7, x: a -> b · law saturation" in str(explained.name)
    with pytest.raises(hl.InputError, match="case 999"):
        result.explain(999)
    assert len(result.surprises(count=3)) == 9
    assert "saturation" in str(result) and "all at dose" not in str(result)
    later = pd.concat([table, table.assign(dose=4)], ignore_index=True)
    later = law.compare(later, laws=laws[:1], folds=3, quiet=True)
    assert "all at dose 1; .laws and laws.csv have the other doses" in str(later)
    assert later.plot()._suptitle.get_text() == "all at dose 1"


@pytest.mark.slow
def test_the_command_takes_a_saved_run(planted, tmp_path, capsys):
    *_, run, folder = planted
    run.save(tmp_path / "run")
    words = ["law", "--model", folder, "--facts", folder / "facts.jsonl", "--run", tmp_path / "run"]
    words += ["--folds", 3, "--out", tmp_path / "law", "--quiet"]
    assert run_command(*words, "--limit", 5) == 2
    assert "holds no scores of these facts" in capsys.readouterr().err
    assert run_command(*words) == 0
    result = hl.load_result(tmp_path / "law")
    assert result.settings.doses == (1, 2)
    table = pd.read_csv(tmp_path / "law" / "laws.csv")
    pd.testing.assert_frame_equal(table[["law", "r2"]], result.laws[["law", "r2"]])
    names = ["split", "n", "relations", "r2_low", "r2_high", "auc", "auc_low", "ece", "brier"]
    assert set(names) <= {*table}
    files = {path.name for path in (tmp_path / "law").iterdir()}
    assert files >= {"predictions.parquet", "differences.csv", "laws.svg", "calibration.png"}
    assert run_command("law") == 2
    assert "law needs one of --model" in capsys.readouterr().err


def test_a_result_knows_its_own_laws(tmp_path):
    table = drawn(40, doses=(1,), relations=5).assign(
        subject="x", target_true="a", target_false="b"
    )
    table["shift"] = 2 + 3 * table["entropy"] + np.random.default_rng(1).normal(size=40) / 10
    mine = law.Law(
        "entropy", "a + b entropy", "mine", ("entropy",),
        start={"a": 0.0, "b": 0.0}, shift=lambda p, x: p["a"] + p["b"] * x["entropy"],
    )  # fmt: skip
    alone = table.assign(scheme="alone", relation_id="P0")
    laws = [BY_NAME["constant"], BY_NAME["prior"], mine]
    result = law.compare(pd.concat([table, alone]), laws=laws, folds=3, quiet=True)
    assert result.selected(scheme="s") == "entropy"
    explained = result.explain(7, law="entropy")
    assert explained["predicted"] == pytest.approx(2 + 3 * table["entropy"][7], abs=0.2)
    formulas = {name: each["formula"] for name, each in result.findings()["laws"].items()}
    assert formulas == {each.name: each.formula for each in laws}
    with pytest.raises(hl.InputError, match="unknown law 'ceiling'"):
        result.explain(7)
    with pytest.raises(hl.InputError, match="case 7 is explained by a law of other relations"):
        result.explain(7, law="entropy", scheme="alone")
    loaded = hl.load_result(result.save(tmp_path / "law"))
    assert loaded.selected(scheme="s") == "entropy"
    assert loaded.findings() == result.findings()
    pd.testing.assert_series_equal(loaded.explain(7, law="prior"), result.explain(7, law="prior"))
    assert set(loaded.parameters.query("law == 'entropy'")["parameter"]) == {"a", "b"}
    with pytest.raises(hl.InputError, match=r"'entropy' \(a \+ b entropy\) is your own"):
        loaded.explain(7, law="entropy")
    with pytest.raises(hl.InputError, match="give every law a different name"):
        law.compare(table, laws=[*laws, mine], quiet=True)
    with pytest.raises(hl.InputError, match="give at least two"):
        law.compare(alone, laws=laws, quiet=True)


def test_skipped_facts_are_listed(planted, tmp_path):
    model, facts, *_ = planted
    fact = facts[0]
    same = replace(fact, case_id=999, target_false=fact.target_true + " of old")
    more = replace(facts, facts=(*facts, same))
    table = law.predictors(model, more, ["do-not-think", "think"], quiet=True)
    assert 999 not in set(table["case_id"])
    skipped = law.skipped(model, more, ["do-not-think", "think"])
    assert skipped["case_id"].tolist() == [999, 999]
    assert skipped["scheme"].tolist() == ["do-not-think", "think"]
    assert "start with the same token" in skipped["reason"][0]
    run = hl.hijack(model, more, schemes=["do-not-think", "think"], doses=[1], quiet=True)
    laws = [BY_NAME["constant"], BY_NAME["prior"]]
    table = law.measured(run, table)
    result = law.compare(table, laws=laws, folds=3, skipped=skipped, quiet=True)
    text = str(result)
    n, relations = table["case_id"].nunique(), table["relation_id"].nunique()
    assert f"laws of the shift: {n} facts of {relations} relations, each predicted by a" in text
    assert f"· think, {n} facts" in text
    assert "skipped: 2 pairs of fact and scheme (.skipped, skipped.csv); first: both tar" in text
    loaded = hl.load_result(result.save(tmp_path / "law"))
    pd.testing.assert_frame_equal(loaded.skipped, skipped)
    assert "skipped:" not in str(law.compare(table, laws=laws, folds=3, quiet=True))


def test_a_scheme_is_given_once(planted):
    model, facts, *_ = planted
    with pytest.raises(hl.InputError, match="each once"):
        law.predictors(model, facts, ["think", "think"], quiet=True)


def test_a_saved_run_decides_schemes_doses_and_seed(planted, tmp_path, monkeypatch, capsys):
    model, facts, _, folder = planted
    options = {"schemes": ["do-not-think-other", "think"], "doses": [1, 3], "quiet": True}
    hl.hijack(model, facts, seed=7, **options).save(tmp_path / "run")
    words = ["law", "--model", folder, "--facts", folder / "facts.jsonl", "--run", tmp_path / "run"]
    words += ["--folds", 3, "--out", tmp_path / "law", "--quiet"]
    for given, refusal in (
        (["--doses", "0-1"], "--doses is not that of the --run: [0, 1] and [0, 1, 3]. Leave it"),
        (["--seed", 0], "--seed is not that of the --run: 0 and 7"),
        (["--scheme", "think"], "--scheme is not that of the --run: think (Think of"),
        (["--template", "x=Think {target_false}."], "--scheme is not that of the --run: x (Think"),
        (["--dtype", "bfloat16"], "is not that of the --run: bfloat16 and float32. Load the"),
        (["--sharing", "plain", "--engine", "local"], "--run makes no use of --sharing, --engine"),
        (["--run", tmp_path / "run"], "a model occurs twice"),
        (["--run", tmp_path / "other"], "results differ in seed; only models may differ"),
    ):
        if tmp_path / "other" in given:
            hl.hijack(model, facts, seed=8, **options).save(tmp_path / "other")
        assert run_command(*words, *given) == 2
        assert refusal in capsys.readouterr().err
    seen = []
    module, made = importlib.import_module("analyses.law.predictors"), hl.pairs

    def spy(*arguments, seed, scheme):
        seen.append((scheme.name, seed))
        return made(*arguments, seed=seed, scheme=scheme)

    def compare(table, *, seed, **_):
        seen.append((tuple(sorted({*table["dose"]})), seed))
        raise hl.InputError("enough")  # the fit takes half a minute

    monkeypatch.setattr(module, "pairs", spy)
    monkeypatch.setattr(law, "compare", compare)
    equal = ["--scheme", "think", "--scheme", "do-not-think-other", "--seed", 7, "--doses", "1,3"]
    for given in ([], equal):
        assert run_command(*words, *given) == 2
        assert "enough" in capsys.readouterr().err
        expected = [("do-not-think-other", 7), ("think", 7), ((1, 3), 7)]
        assert list(dict.fromkeys(seen)) == expected
        seen.clear()
    changed = hl.load_model(str(folder))
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    hl.hijack(changed, facts, seed=7, **options).save(tmp_path / "run", overwrite=True)
    assert run_command(*words) == 2
    assert "the weights hash of" in capsys.readouterr().err


@pytest.mark.slow
def test_the_law_that_made_the_data_is_selected():
    """Three of the hundred simulations of each law in the study (examples/law_study.py)."""
    for name in BY_HAND:
        hits = 0
        for seed in range(3):
            table = drawn(500, doses=(1, 2, 5), relations=25, seed=seed)
            noise = np.random.default_rng(1000 + seed).normal(size=len(table))
            table["shift"] = by_hand(name, table) + noise
            hits += selected(predictions(table, count=5, splits=["all doses"], quiet=True)) == name
        assert hits == 3, name


@pytest.mark.parametrize("family", ["llama", "mpt:clip", "olmo:clip"])
def test_copying_reads_the_values_that_heads_use(family):
    """They are clipped in some families; the sum is over all heads of a plain model."""
    plain, tokenizer = rows.make(family), rows.tokenizer_of(family)
    model = hl.load_model(rows.make(family), tokenizer=tokenizer, dtype="float32", device="cpu")
    facts = hl.atlas().sample(6, seed=1)
    got = law.predictors(model, facts, ["do-not-think"], quiet=True)
    of = {pair.fact.case_id: pair for pair in hl.pairs(model, facts)}
    mpt = family.startswith("mpt")
    blocks = plain.transformer.blocks if mpt else plain.model.layers
    final = plain.transformer.norm_f if mpt else plain.model.norm
    clip = plain.config.attn_config.clip_qkv if mpt else getattr(plain.config, "clip_qkv", None)
    weight = getattr(final, "weight", None)  # the norm of OLMo has none
    seen, expected = {}, []
    for i, block in enumerate(blocks):
        module = block.attn.Wqkv if mpt else block.self_attn.v_proj
        module.register_forward_hook(lambda module, inputs, output, i=i: seen.update({i: output}))
    for case in got["case_id"]:
        pair = of[case]
        alone = pair.hijacked.ids[: max(pair.hijacked.positions("hijack")) + 1]
        with torch.no_grad():
            plain(torch.tensor([alone]))
        true, false = pair.items[0].first_tokens
        to = plain.get_output_embeddings().weight.detach()[[false, true]].diff(dim=0)[0] * -1
        to = to if weight is None else to * weight.detach()
        to = to if family == "llama" else to - to.mean()
        total = 0.0
        for i, block in enumerate(blocks):
            W_O = (block.attn.out_proj if mpt else block.self_attn.o_proj).weight.detach()
            values = seen[i][0].chunk(3, -1)[2] if mpt else seen[i][0]
            values = values if clip is None else values.clamp(-clip, clip)
            values = values[list(pair.hijacked.positions("mention"))].mean(0)
            width = len(to) // int(model.cfg.n_heads)
            by_head = values.unflatten(0, (-1, width))
            by_head = by_head.repeat_interleave(int(model.cfg.n_heads) // len(by_head), 0)
            total += float(W_O @ by_head.flatten() @ to)
        expected.append(total)
    expected = np.array(expected) / np.std(expected)
    assert got["copying_all"].to_numpy() == pytest.approx(expected, abs=1e-4)


def test_the_predictors_of_a_model_with_narrow_embeddings_are_finite():
    family = "opt:projected"
    tokenizer = rows.tokenizer_of(family)
    model = hl.load_model(rows.make(family), tokenizer=tokenizer, dtype="float32", device="cpu")
    got = law.predictors(model, hl.atlas().sample(4, seed=1), quiet=True)
    assert np.isfinite(got[list(law.PREDICTORS)].to_numpy()).all()
