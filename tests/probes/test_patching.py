"""Sweeps: against single patches, exact identities, and the numbers of a made-up result."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hijack_runs import scored_model
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import FactSet, FactsRecord
from hijacklens.models.loading import load_model
from hijacklens.probe import probed
from hijacklens.prompts.layout import Layout
from hijacklens.prompts.schemes import SchemeRecord
from hijacklens.results.result import Provenance, load_result
from hijacklens.scoring.items import SKIPPED_COLUMNS
from hijacklens.scoring.pairs import SAME_FIRST_TOKEN, pairs
from hijacklens.statistics import clustered_ratio
from probes import patching
from probes.activations import patch
from probes.patching.result import PATCH_COLUMNS, PatchingSettings, PatchingSweep

FACTS = sample_facts()[:8]


@pytest.fixture(scope="module")
def llama():
    return load_model(tiny_model("llama"), tokenizer=tiny_tokenizer("llama"), device="cpu")


def sweep(model, facts, kind=patching.BySpan, *, direction="denoise", batch_tokens=None, **options):
    """A sweep of the pairs of facts; other options go to the pairs and to the patches."""
    made = {name: options.pop(name) for name in ("scheme", "dose") if name in options}
    run = {"direction": direction, "batch_tokens": batch_tokens, "quiet": True}
    return patching.sweep(model, pairs(model, facts, **made), kind(**options), **run)


def difference(model, ids, answers, *probes):
    """Logit o_ - logit o* after one prompt, in a separate forward pass."""
    tokens = torch.tensor([ids])
    with probed(model, probes, Layout(tokens, {})), torch.no_grad():
        logits = model(tokens)[0, -1]
    return float(logits[answers[1]] - logits[answers[0]])


@pytest.mark.parametrize(("site", "direction"), [("resid_pre", "noise"), ("resid_mid", "denoise")])
def test_every_number_is_that_of_a_single_patched_run(model, site, direction):
    result = sweep(model, FACTS[2:6], site=site, direction=direction, batch_tokens=150)
    table = result.to_dataframe()
    assert set(table["case_id"]) == {2, 3, 4}  # 5 is New York against New Delhi
    assert result.skipped["case_id"].tolist() == [5]
    assert result.skipped["reason"].tolist() == [SAME_FIRST_TOKEN]
    assert len(table) == 3 * 2 * 3
    for pair in pairs(model, FACTS[2:6]).pairs[::2]:
        mine = table[table["case_id"] == pair.fact.case_id]
        answers = pair.answers()
        ends = [difference(model, side.ids, answers) for side in (pair.bare, pair.hijacked)]
        assert mine["clean"].tolist() == pytest.approx([ends[0]] * 6, abs=5e-5)
        assert mine["hijacked"].tolist() == pytest.approx([ends[1]] * 6, abs=5e-5)
        for row in mine.itertuples():
            where = pair.align(direction=direction, span=row.span)
            made = patch(model, where, site=site, layers=int(row.layer))
            expected = difference(model, where.target, answers, made)
            assert row.patched == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("site", ["z", "q", "k", "v"])
def test_heads_are_patched_one_by_one(llama, site):
    result = sweep(llama, FACTS[:3], patching.ByHead, site=site, layers=1)
    axis = "kv_head" if site in "kv" else "head"
    assert result.settings.axis == axis
    table = result.to_dataframe()
    assert sorted(set(table["head"])) == list(range(2 if axis == "kv_head" else 4))
    (pair,) = pairs(llama, FACTS[1:2])
    for row in table[table["case_id"] == 1].itertuples():
        made = patch(
            llama, pair.align(direction="denoise"), site=site, layers=1, heads=int(row.head)
        )
        expected = difference(llama, pair.hijacked.ids, pair.answers(), made)
        assert row.patched == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_last_layer_at_the_last_token_is_the_other_run(model, direction):
    result = sweep(
        model,
        FACTS[:4],
        site="resid_post",
        spans=["last"],
        layers=1,
        direction=direction,
        dose=2,
    )
    table = result.to_dataframe()
    end = "clean" if direction == "denoise" else "hijacked"
    assert table["patched"].tolist() == pytest.approx(table[end].tolist(), abs=5e-5)
    assert (table["clean"] - table["hijacked"]).abs().max() > 0.1
    (row,) = result.summary().itertuples()
    if (table["hijacked"] - table["clean"]).mean() > 0:
        assert row.share == pytest.approx(1, abs=1e-3)


def test_the_same_whatever_the_batch(llama):
    runs = [sweep(llama, FACTS, site="attn_out", batch_tokens=size) for size in (1, 130, 5000)]
    for other in runs[1:]:
        pd.testing.assert_frame_equal(other.to_dataframe(), runs[0].to_dataframe(), atol=5e-5)


def test_facts_without_a_sentence_are_listed(llama):
    facts = FactSet((*FACTS[:2], *sample_facts()[8:9]), name="x", skipped=sample_facts().skipped)
    result = sweep(llama, facts, scheme="near-word", layers=0)
    assert set(result.to_dataframe()["case_id"]) == {0, 1, 8} - set(result.skipped["case_id"])
    assert result.skipped["reason"].str.contains("near word").all()
    assert len(result.skipped) >= 1


def test_a_fact_without_finite_logits_is_listed(llama, monkeypatch):
    whole = patching.run

    def broken(*args, **kwargs):
        found = whole(*args, **kwargs)
        found[0, 1] = np.nan
        return found

    monkeypatch.setattr(patching, "run", broken)
    result = sweep(llama, FACTS[:2], layers=0)
    assert set(result.to_dataframe()["case_id"]) == {1}
    assert "not finite" in result.skipped["reason"].item()


def made_up(direction="denoise", *, axis="span", heads=(None,), spans=("query", "last")):
    """Two facts, two layers; patched by hand: clean 0 and 1, hijacked 4 and 3."""
    rows = []
    for case, (clean, hijacked) in enumerate([(0.0, 4.0), (1.0, 3.0)]):
        for layer in (0, 1):
            for span in spans:
                for head in heads:
                    move = 1.0 + layer if span == spans[0] else -1.0
                    start, sign = (hijacked, -1) if direction == "denoise" else (clean, 1)
                    values = (clean, hijacked, start + sign * move, case)
                    rows.append((case, "P1", f"subject {case}", layer, span, head, *values))
    patches = pd.DataFrame(rows, columns=list(PATCH_COLUMNS)).astype({"head": "Int64"})
    settings = PatchingSettings(
        model=scored_model("hand-made"),
        facts=FactsRecord(name="two", n=2, hash="0"),
        scheme=SchemeRecord(name="do-not-think"),
        dose=1,
        direction=direction,
        site="z" if axis != "span" else "resid_pre",
        axis=axis,
        layers=(0, 1),
        spans=tuple(spans),
        seed=0,
    )
    skipped = pd.DataFrame(columns=list(SKIPPED_COLUMNS))
    return PatchingSweep(patches, skipped, settings, Provenance.now(seed=0))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_shares_by_hand(direction):
    """The shift is 4 and 2, 3 in the mean; a patch that moves 1 is a third, and so on."""
    table = made_up(direction).summary().set_index(["layer", "span"])
    assert table.loc[(0, "query"), "share"] == pytest.approx(1 / 3)
    assert table.loc[(1, "query"), "share"] == pytest.approx(2 / 3)
    assert table.loc[(0, "last"), "share"] == pytest.approx(-1 / 3)
    assert (table["n"] == 2).all()
    assert (table["clean"] == 0.5).all() and (table["hijacked"] == 3.5).all()
    # Two facts whose shifts differ may have no shift.
    assert table.loc[(0, "query"), "share_low"] == -np.inf
    assert (table["estimand"] == "these facts (one relation)").all()


def test_intervals_are_over_relations_and_corrected_for_all_patches():
    result = made_up()
    more = [result.patches.assign(relation_id=f"P{i}") for i in range(9)]
    more.append(result.patches.assign(relation_id="P9", patched=0.0))
    table = replace(result, patches=pd.concat(more)).summary()
    parts = np.array([1.0] * 18 + [4.0, 3.0])
    wholes = np.array([4.0, 2.0] * 10)
    clusters = np.repeat(np.arange(10), 2)
    expected = clustered_ratio(parts, wholes, clusters, confidence=1 - 0.05 / 4)
    row = table.iloc[0]
    assert [row["share_low"], row["share_high"]] == pytest.approx([expected.low, expected.high])
    assert row["estimand"] == "relations like these"


def test_the_heat_map_has_each_number_in_its_cell():
    figure = made_up().plot()
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "0.33", (1, 0): "-0.33", (0, 1): "0.67", (1, 1): "-0.33"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["query", "last"]
    image = axes.images[0]
    assert image.get_clim() == pytest.approx((-2 / 3, 2 / 3))  # white is 0
    assert "fraction of the shift undone" in figure.axes[1].get_ylabel()
    logits = made_up("noise").plot(value="logits")
    assert [text.get_text() for text in logits.axes[0].texts] == ["1.00", "-1.00", "2.00", "-1.00"]
    assert "(logits)" in logits.axes[1].get_ylabel()
    heads = made_up(axis="kv_head", heads=(0, 1), spans=("query",)).plot()
    assert heads.axes[0].get_xlabel() == "key/value head"
    with pytest.raises(InputError, match="unknown value 'ratio'"), unchecked():
        made_up().plot(value="ratio")


def test_a_single_span_is_a_line_with_a_band():
    result = made_up(spans=("query",))
    more = [result.patches.assign(case_id=result.patches["case_id"] + 2 * i) for i in range(10)]
    result = replace(result, patches=pd.concat(more))
    (axes,) = result.plot().axes
    table = result.summary()
    assert axes.get_lines()[0].get_xydata().tolist() == table[["layer", "share"]].values.tolist()
    (band,) = axes.collections
    heights = {height for _, height in band.get_paths()[0].vertices}
    assert {*table["share_low"], *table["share_high"]} <= heights
    (axes,) = result.plot(value="logits").axes
    assert not axes.collections and axes.get_ylabel().endswith("(logits)")


def test_the_title_fits_however_few_cells_there_are():
    result = made_up()
    settings = replace(
        result.settings,
        model=replace(result.settings.model, name="meta-llama-Llama-2-7b-chat-hf"),
        scheme=SchemeRecord(name="do-not-think-other"),
    )
    figure = PatchingSweep(result.patches, result.skipped, settings, result.provenance).plot()
    figure.canvas.draw()
    box = figure._suptitle.get_window_extent()
    width, height = figure.canvas.get_width_height()
    assert box.x0 >= 0 and box.x1 <= width and box.y1 <= height
    label = figure.axes[1].yaxis.label.get_window_extent()
    assert label.y0 >= 0 and label.y1 <= height


def test_chosen_heads_need_not_fill_a_rectangle():
    whole = made_up(axis="head", heads=(0, 2), spans=("query",))
    chosen = (whole.patches["layer"] == 0) | (whole.patches["head"] == 2)
    result = PatchingSweep(whole.patches[chosen], whole.skipped, whole.settings, whole.provenance)
    axes = result.plot().axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "0.33", (1, 0): "0.33", (1, 1): "0.67"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "2"]


def test_without_a_shift_there_is_no_share(tmp_path):
    result = made_up()
    patches = result.patches.assign(hijacked=result.patches["clean"])
    flat = PatchingSweep(patches, result.skipped, result.settings, result.provenance)
    assert flat.summary()["share"].isna().all()
    flat.save(tmp_path / "flat")  # the figure is drawn all the same
    single = patches[patches["span"] == "last"]
    line = PatchingSweep(single, result.skipped, result.settings, result.provenance).plot()
    for said in (str(flat), flat.plot()._suptitle.get_text(), line._suptitle.get_text()):
        assert "no fraction: hijacking raises the mean difference by less than 0.05" in said
    assert "no fraction" not in str(result) + result.plot()._suptitle.get_text()


def test_at_the_input_a_patch_changes_nothing(model, family):
    """Corresponding tokens are equal; facts whose subject opens the prompt are skipped."""
    facts = sample_facts()
    options = {"site": "resid_pre", "layers": 0, "spans": ["query", "subject"]}
    for chosen in (facts, facts.with_opening("Well.")):
        result = sweep(model, chosen, **options)
        skipped = result.skipped.loc[result.skipped["reason"].str.contains("opens"), "case_id"]
        first = {f.case_id for f in chosen if f.template.startswith("{}")}
        # LLaMA writes a first word as later ones, after its BOS.
        assert set(skipped) == (first if not chosen.opening and family != "llama" else set())
        if family != "gpt2":  # whose positions are embedded
            table = result.to_dataframe()
            np.testing.assert_allclose(table["patched"], table["hijacked"], atol=5e-5)
        assert not (chosen.opening and result.to_dataframe()["unmatched"].any())


def test_saved_and_loaded(llama, tmp_path):
    result = sweep(llama, FACTS[:3], patching.ByHead)
    result.save(tmp_path / "sweep")
    loaded = load_result(tmp_path / "sweep")
    assert isinstance(loaded, PatchingSweep)
    pd.testing.assert_frame_equal(loaded.to_dataframe(), result.to_dataframe())
    pd.testing.assert_frame_equal(loaded.summary(), result.summary())
    assert repr(loaded) == repr(result)
    assert loaded.settings == result.settings
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "patches.parquet",
        "summary.csv",
        "skipped.csv",
        "patching.svg",
        "patching.png",
        "result.json",
    }
    assert math.isfinite(loaded.configuration()["mean_hijacked"])
    (tmp_path / "sweep" / "patches.parquet").unlink()
    with pytest.raises(InputError, match="is not complete"):
        load_result(tmp_path / "sweep")


WRONG = {
    "no facts": ({"facts": FactSet((), name="none")}, "no facts in none"),
    "scheme": ({"scheme": "do-not-thnk"}, "did you mean 'do-not-think'"),
    "dose": ({"dose": 0}, "with a higher dose"),
    "no spans": ({"spans": []}, "at least one span"),
    "span without counterpart": ({"spans": ["hijack"]}, "none of the 8 facts.*counterpart"),
    "unknown span": ({"spans": ["sbject"]}, "did you mean 'subject'"),
    "direction": ({"direction": "both"}, "unknown direction 'both'"),
    "site": ({"site": "pattern"}, "unknown site 'pattern'"),
    "layer": ({"layers": [2]}, "layer 2 is not one"),
    "batch": ({"batch_tokens": 0}, "at least 1 token"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(llama, name):
    options, message = WRONG[name]
    facts = options.get("facts", FACTS)
    rest = {key: value for key, value in options.items() if key != "facts"}
    with pytest.raises(InputError, match=message), unchecked():
        sweep(llama, facts, **rest)


def test_sites_without_heads_are_not_swept_by_head(llama):
    with pytest.raises(InputError, match="'mlp_out' is not split into heads"):
        sweep(llama, FACTS, patching.ByHead, site="mlp_out")
    with pytest.raises(InputError, match="kv_head 2 is not one"):
        sweep(llama, FACTS, patching.ByHead, site="v", heads=[2])


@pytest.mark.packaged
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_real_models_take_the_shift_in_at_the_last_token(name):
    """The last layers at the last token hold all of it; the first layer there holds none."""
    model = load_model(name, device="cpu")
    top = int(model.cfg.n_layers) - 1
    options = {"spans": ["last"], "layers": [0, top]}
    result = sweep(model, atlas().sample(4, seed=0), site="resid_post", **options)
    table = result.to_dataframe().set_index("layer")
    torch.testing.assert_close(
        torch.tensor(table.loc[top, "patched"].tolist()),
        torch.tensor(table.loc[top, "clean"].tolist()),
        atol=1e-3,
        rtol=0,
    )
    shares = result.summary().set_index("layer")["share"]
    assert shares[top] == pytest.approx(1, abs=1e-3)
    assert abs(shares[0]) < 0.1
