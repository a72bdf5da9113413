"""The held-out test of found heads: on unseen facts, relations and schemes, against random sets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_head import PLANTED, planted_facts, planted_model
from tiny_models import tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.models.loading import load_model
from hijacklens.results.result import load_result
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.pairs import pairs
from hijacklens.sites import numbers
from probes import heads
from probes.ablation import ablate
from probes.heads import held_out
from probes.heads.held_out import HeadTest, draw, equally_harmful, layer_sets
from probes.heads.ranking import HeadSearch

SCHEMES = ("do-not-think", "think")


@pytest.fixture(scope="module")
def model():
    return load_model(planted_model(), tokenizer=tiny_tokenizer("llama"), device="cpu")


@pytest.fixture(scope="module")
def parts():
    """Facts to search on, and facts of six other relations to test on."""
    facts = planted_facts()
    tested = facts.where(relation=["P36", "P103"])
    split = [replace(fact, relation_id=f"P{i // 2}") for i, fact in enumerate(tested)]
    return facts.where(relation="P131"), replace(tested, facts=tuple(split))


@pytest.fixture(scope="module")
def found(model, parts) -> HeadSearch:
    return heads.search(model, pairs(model, parts[0]), size=1, candidates=2, quiet=True)


@pytest.fixture(scope="module")
def tested(found, parts) -> Iterator[HeadTest]:
    with pytest.MonkeyPatch.context() as patch:
        # No other heads of this model do as much harm as the planted one.
        patch.setattr(held_out, "NATS", 0.15)
        yield found.test(parts[1], schemes=SCHEMES, random_sets=4, quiet=True)


def row(table: pd.DataFrame, **where) -> pd.Series:
    for name, value in where.items():
        table = table[table[name] == value]
    (only,) = table.to_dict("records")
    return pd.Series(only)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_planted_head_undoes_the_hijack_and_random_ones_do_not(tested, scheme):
    shift = row(tested.summary(), scheme=scheme, relations="all", measure="shift")
    assert shift["n"] == 12
    assert shift["scheme_seen"] == (scheme == "do-not-think")
    assert shift["none"] > 0.5
    assert shift["recovered"] == pytest.approx(1, abs=0.05)
    assert shift["change_high"] < 0
    assert shift["p_holm"] < 0.05
    # Three other heads are in its layer, so that there are three sets of that kind.
    assert (shift["layers_p"], shift["layers_least_p"]) == (1 / 4, 1 / 4)
    assert shift["layers_low"] > 0.9 * shift["none"]
    efficacy = row(tested.summary(), scheme=scheme, relations="all", measure="efficacy")
    assert efficacy["none"] > efficacy["bare"]


def test_every_relation_is_new(tested, found, parts):
    assert set(tested.summary()["relations"]) == {"all", "new"}
    settings = tested.settings.search
    assert (settings.relations, settings.scheme.name, settings.dose) == (
        ("P131",),
        "do-not-think",
        1,
    )
    assert settings.facts.n == 6
    assert tested.settings.heads == "1.2"


def test_scores_are_those_of_hijack(model, found, tested, parts):
    options = {"schemes": SCHEMES, "doses": [1], "quiet": True}
    probe = ablate(heads=[PLANTED], kind="mean", means=found.means)
    for name, probes in (("none", []), ("chosen", [probe])):
        plain = hijack(model, parts[1], probes=probes, **options).items
        ours = tested.items[tested.items["ablation"] == name].drop(columns="ablation")
        pd.testing.assert_frame_equal(ours.reset_index(drop=True), plain, rtol=1e-5, atol=1e-5)
    drawn = tested.sets.set_index("ablation").loc["harm-1", "heads"]
    drawn = [tuple(map(int, head.split("."))) for head in drawn.split("+")]
    probe = ablate(heads=drawn, kind="mean", means=found.means)
    plain = hijack(model, parts[1], probes=[probe], **options).items
    ours = tested.items[tested.items["ablation"] == "harm-1"].drop(columns="ablation")
    pd.testing.assert_frame_equal(ours.reset_index(drop=True), plain, rtol=1e-5, atol=1e-5)


def test_random_sets(tested):
    sets = tested.sets
    assert sets["kind"].tolist()[:5] == ["none", "chosen", *["layers"] * 3]
    assert set(sets["kind"][5:]) == {"harm"}
    assert sets["heads"].tolist()[:2] == ["", "1.2"]
    drawn = sets[sets["kind"] == "layers"]["heads"]
    assert sorted(drawn) == ["1.0", "1.1", "1.3"]
    assert not any("1.2" in heads.split("+") for heads in sets["heads"].iloc[2:])
    assert tested.settings.layer_sets == 3
    assert "sets with as many heads in the same layers: 3 in all" in str(tested)
    assert "layers: 3 random, in the same layers;" in str(tested)


def test_layers_without_enough_other_heads(tested):
    """`draw` takes the nearest layers then, and a result must not call them the same."""
    assert draw([(1, 0), (1, 2)], [(0, 0), (1, 1), (3, 0)], count=1, seed=0) == (((0, 0), (1, 1)),)
    result = replace(tested, settings=replace(tested.settings, layer_sets=0))
    assert "layers: 3 random, in the same or the nearest layers;" in str(result)
    assert "random sets take the others from the nearest layers" in str(result)
    labels = [text.get_text() for text in result.plot().legends[0].get_texts()]
    assert "random sets, same or nearest layers" in labels


def test_the_harm_of_sets_is_that_to_the_search_s_bare_queries(model, found, tested, parts):
    for name in ("chosen", "harm-0"):
        row = tested.sets.set_index("ablation").loc[name]
        drawn = [tuple(map(int, head.split("."))) for head in row["heads"].split("+")]
        probe = ablate(heads=drawn, kind="mean", means=found.means)
        options = {"schemes": "do-not-think", "doses": [0], "quiet": True}
        bare, without = (
            hijack(model, parts[0], probes=probes, **options).items["first_true"].mean()
            for probes in ([], [probe])
        )
        assert row["harm"] == pytest.approx(bare - without, abs=1e-5)


@pytest.mark.parametrize("target", [0.0, 2.5, 3.2, 40.0])
def test_sets_of_equal_harm_are_the_nearest_in_their_order(target):
    """Each head does a harm of 1; the chosen ones do as much as the target, if sets can."""
    others = [(layer, 0) for layer in range(9)]
    chosen = [(20, 0), (20, 1)]
    calls = []

    def harm(heads):
        calls.append(heads)
        return target if heads is chosen else float(len(heads))

    sets = equally_harmful(chosen, others, harm, count=5, seed=0)
    nearest = {0.0: 2, 2.5: 2, 3.2: 3, 40.0: 9}[target]
    assert {len(heads) for heads in sets} <= {nearest, round(target + 0.6)} & {*range(2, 10)} | {
        nearest
    }
    assert all(set(heads) <= set(others) for heads in sets)
    assert list(sets.values()) == [float(len(heads)) for heads in sets]
    assert len(calls) <= 1 + 5 * 4 * (1 if target in (2.5, 3.2) else 3)


def test_sets_of_other_harm_are_listed_and_not_compared(tested):
    """The heads lower log p(true) by 10 nats, and the random sets by 11.9, 12.1, 12.3, ..."""
    kinds = tested.sets["kind"]
    harm = pd.Series(float("nan"), kinds.index)
    harm[kinds == "chosen"] = 10.0
    harm[kinds == "harm"] = [11.9 + 0.2 * i for i in range((kinds == "harm").sum())]
    result = replace(tested, sets=tested.sets.assign(harm=harm))
    assert [name for name, kind in result.kinds.items() if kind == "harm"] == ["harm-0"]
    shift = row(result.summary(), scheme="think", relations="all", measure="shift")
    assert shift["harm_low"] == shift["harm_high"]
    assert "bare queries, in nats: the heads by 10.00, random sets by 11.90 (" in str(result)
    assert "heads), 12.10 (" in str(result) and "heads, not compared)" in str(result)
    assert "nats, if that is larger) are not compared" in str(result)
    none = replace(tested, sets=tested.sets.assign(harm=harm + 90 * (kinds == "chosen")))
    assert "no set of equal harm was found" in str(none)
    assert not any(column.startswith(("harm", "beyond_harm")) for column in none.summary())
    labels = [text.get_text() for text in none.plot().legends[0].get_texts()]
    assert "random sets, same layers" in labels and "random sets, equal harm" not in labels


def test_the_note_says_which_rows_are_about_what(tested):
    relations = tested.items["relation_id"]
    searched = tested.settings.search.relations[0]
    items = tested.items.assign(relation_id=relations.replace({relations.iloc[0]: searched}))
    summary = replace(tested, items=items).summary()
    kinds = summary.groupby("relations")["estimand"].unique()
    assert kinds["seen"].tolist() == ["these facts (one relation)"]
    note = next(
        line
        for line in str(replace(tested, items=items)).splitlines()
        if line.startswith("intervals and p_holm: ")
    )
    parts = note.removeprefix("intervals and p_holm: ").split("; ")
    found = {part.split(" in rows ")[0]: part.split(" in rows ")[1].split(", ") for part in parts}
    for row in summary.itertuples():
        name = (
            row.relations if summary["scheme"].nunique() == 1 else f"{row.scheme} {row.relations}"
        )
        assert name in found[row.estimand]


def test_side_effects_agree_with_the_items(tested):
    table = tested.side_effects()
    assert set(table["measure"]) == {"retention", "logprob_true", "top_token"}
    items = tested.items[(tested.items["dose"] == 0) & (tested.items["scheme"] == "think")]
    by_set = items.pivot(index="case_id", columns="ablation", values="first_true")
    logprob = row(table, relations="all", measure="logprob_true")
    assert logprob["change"] == pytest.approx((by_set["chosen"] - by_set["none"]).mean(), abs=1e-6)
    tops = items.pivot(index="case_id", columns="ablation", values="top_token")
    top = row(table, relations="all", measure="top_token")
    assert top["chosen"] == pytest.approx((tops["chosen"] == tops["none"]).mean())
    assert top["n"] == 12


def test_other_rules_are_read_from_the_same_items(tested):
    first = row(tested.summary(), scheme="think", relations="all", measure="shift")
    total = row(tested.summary(rule="sum"), scheme="think", relations="all", measure="shift")
    # All targets are one token.
    assert total["chosen"] == pytest.approx(first["chosen"])
    with unchecked():
        for call in (tested.summary, tested.side_effects, tested.plot):
            with pytest.raises(InputError, match="unknown rule"):
                call(rule="last")


def test_facts_of_the_search_are_refused_or_left_out(model, found, parts):
    # The same facts under other case ids and in other words are the same facts.
    twins = [
        replace(fact, case_id=fact.case_id + 100, template="Say where {} is:") for fact in parts[0]
    ]
    mixed = FactSet((*parts[1][:3], *twins[:2]), name="mixed")
    with pytest.raises(InputError, match="2 of the 5 facts of mixed are among those"):
        found.test(mixed, quiet=True)
    tested = found.test(found.unseen(mixed), random_sets=0, quiet=True)
    assert set(tested.items["case_id"]) == {fact.case_id for fact in parts[1][:3]}
    assert tested.skipped["case_id"].tolist() == [100, 101]
    assert tested.skipped["reason"].unique().tolist() == ["the heads were found on this fact"]
    # Without random sets the tables have no columns of them.
    assert not any(column.startswith(("layers", "harm_")) for column in tested.summary())
    with unchecked(), pytest.raises(InputError, match="unknown treatment of overlap"):
        found.test(mixed, overlap="drop")
    with pytest.warns(FutureWarning, match="search.unseen"):
        old = found.test(mixed, overlap="leave-out", model=model, random_sets=0, quiet=True)
    pd.testing.assert_frame_equal(old.items, tested.items)


def test_the_defaults_are_those_of_the_search(model, parts):
    made = pairs(model, parts[0][:3], scheme="think", dose=2)
    found = heads.search(model, made, size=1, candidates=1, quiet=True)
    tested = found.test(parts[1][:4], random_sets=0, quiet=True)
    assert tested.settings.doses == (0, 2)
    assert [scheme.name for scheme in tested.settings.schemes] == ["think"]
    assert tested.summary()["scheme_seen"].all()


def test_the_seed_decides_the_test(found, parts):
    first, again, other = (
        found.test(parts[1][:2], random_sets=1, seed=seed, quiet=True) for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(first.items, again.items)
    pd.testing.assert_frame_equal(first.summary(), again.summary())
    assert first.sets["heads"].tolist() != other.sets["heads"].tolist()


def test_a_test_is_saved_and_loaded(tested, tmp_path):
    folder = tested.save(tmp_path / "test")
    assert {path.name for path in folder.iterdir()} == {
        "items.parquet",
        "sets.csv",
        "summary.csv",
        "side_effects.csv",
        "skipped.csv",
        "result.json",
        "test.svg",
        "test.png",
    }
    back = load_result(folder)
    assert isinstance(back, HeadTest)
    pd.testing.assert_frame_equal(back.summary(), tested.summary())
    pd.testing.assert_frame_equal(back.side_effects(), tested.side_effects())
    assert back.sets["heads"].tolist() == tested.sets["heads"].tolist()
    assert back.settings == tested.settings
    assert repr(back) == repr(tested)
    written = pd.read_csv(folder / "summary.csv")
    assert np.allclose(written["change"], tested.summary()["change"])


def test_a_test_of_an_earlier_version_is_loaded(tested, tmp_path):
    folder = tested.save(tmp_path / "test")
    renamed = tested.items["ablation"].str.replace("harm", "model")
    tested.items.assign(ablation=renamed).to_parquet(folder / "items.parquet")
    sets = tested.sets.drop(columns="harm").replace("harm", "model", regex=True)
    sets.to_csv(folder / "sets.csv", index=False)
    record = json.loads((folder / "result.json").read_text("utf-8"))
    del record["settings"]["layer_sets"], record["sha256"]
    (folder / "result.json").write_text(json.dumps(record), "utf-8")
    back = load_result(folder)
    assert back.settings.layer_sets is None
    assert back.summary()["model_p"].tolist() == tested.summary()["harm_p"].tolist()
    assert "random, anywhere in the model" in str(back)


def test_the_figure_shows_every_set(tested):
    efficacy, shift, recall = tested.plot().axes
    count = int((tested.sets["kind"] == "harm").sum())
    assert [len(line.get_xdata()) for line in efficacy.get_lines()] == [6, 2 * count, 2, 2]
    none, chosen = shift.containers  # with error bars
    table = tested.summary()
    shifts = table[(table["measure"] == "shift") & (table["relations"] == "all")]
    assert none[0].get_ydata().tolist() == pytest.approx(shifts["none"].tolist())
    assert chosen[0].get_ydata().tolist() == pytest.approx(shifts["chosen"].tolist())
    assert len(efficacy.containers) == len(recall.containers) == 2
    assert [tick.get_text() for tick in shift.get_xticklabels()] == [
        "do-not-think\ndose 1",
        "think\ndose 1",
    ]
    assert [len(line.get_xdata()) for line in recall.get_lines()] == [3, count, 1, 1]


def test_another_model_and_a_loaded_search(model, found, parts, tmp_path):
    back = load_result(found.save(tmp_path / "search"))
    with pytest.raises(InputError, match="no model to test on"):
        back.test(parts[1][:3])
    tested = back.on(model).test(parts[1][:3], random_sets=0, quiet=True)
    again = found.test(parts[1][:3], random_sets=0, quiet=True)
    pd.testing.assert_frame_equal(tested.items, again.items)
    small = load_model(
        tiny_model("llama", layers=1), tokenizer=tiny_tokenizer("llama"), device="cpu"
    )
    with pytest.raises(InputError, match="layer 1 is not one of this model's"):
        found.on(small).test(parts[1][:3], random_sets=0, quiet=True)


def test_wrong_input(found, parts):
    with pytest.raises(InputError, match="random_sets counts sets"):
        found.test(parts[1], random_sets=-1, quiet=True)
    with pytest.raises(InputError, match="unknown scheme"):
        found.test(parts[1], schemes="thinc", quiet=True)
    with pytest.raises(InputError, match="there are no facts to score"):
        found.test(found.unseen(parts[0]), quiet=True)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_random_sets_are_distinct_and_hold_no_chosen_head(data, seed):
    layers, heads = 5, 16  # enough sets in a layer, even if all chosen heads are in one
    everything = [(layer, head) for layer in range(layers) for head in range(heads)]
    chosen = data.draw(st.lists(st.sampled_from(everything), min_size=2, max_size=6, unique=True))
    others = [head for head in everything if head not in chosen]
    found = draw(chosen, others, count=5, seed=seed)
    assert len(found) == len(set(found)) == 5
    for drawn in found:
        assert len(set(drawn)) == len(chosen)
        assert set(drawn) <= set(everything) - set(chosen)
        if max(Counter(layer for layer, _ in chosen).values()) <= heads // 2:
            assert sorted(at for at, _ in drawn) == sorted(at for at, _ in chosen)
    assert found == draw(chosen, others, count=5, seed=seed)
    assert found != draw(chosen, others, count=5, seed=seed + 1)


def test_neighbours_of_a_full_layer_provide_heads():
    chosen = [(3, 0), (3, 1)]  # all heads of layer 3
    others = [(layer, head) for layer in range(7) for head in (0, 1) if layer != 3]
    for drawn in draw(chosen, others, count=6, seed=0):
        assert {layer for layer, _ in drawn} <= {2, 4}


def test_a_small_model_has_few_sets():
    others = [(0, 1), (0, 2)]
    drawn = draw([(0, 0)], others, count=50, seed=0)
    assert sorted(drawn) == [((0, 1),), ((0, 2),)]
    assert layer_sets([(0, 0)], others) == 2 and layer_sets([(0, 0), (1, 0)], others) == 0
    # Gemma: heads 12.1, 12.2, 15.3, 17.0 and 11.2, of four in each layer.
    gemma = [(12, 1), (12, 2), (15, 3), (17, 0), (11, 2)]
    rest = [(layer, head) for layer in range(18) for head in range(4) if (layer, head) not in gemma]
    assert layer_sets(gemma, rest) == 27
    with pytest.raises(InputError, match="random set of 2 heads cannot be drawn from the 1"):
        draw([(0, 0), (0, 1)], [(0, 2)], count=1, seed=0)


def test_all_heads_are_drawn_equally_often():
    others = [(0, head) for head in range(1, 6)]
    first = Counter(draw([(0, 0)], others, count=1, seed=seed)[0][0] for seed in range(500))
    assert len(first) == 5 and all(70 <= first[head] <= 130 for head in first)


def test_labels_of_sets_are_sorted():
    assert numbers([(11, 0), (2, 3)]) == "2.3+11.0"
    assert numbers([]) == ""
