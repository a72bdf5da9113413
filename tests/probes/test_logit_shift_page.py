"""Traces in a report: maps, attention views that run under the page's policy, parts."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import rows
from browser import Visit, chromium
from bs4 import BeautifulSoup
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens import views
from hijacklens.errors import InputError
from hijacklens.models.agreement import agreement_of
from hijacklens.models.loading import load_model
from hijacklens.results.result import load_result
from hijacklens.scoring.pairs import pairs
from hijacklens.views import visible
from hijacklens.views.page import bundle
from hijacklens.views.runs import with_attention
from probes.logit_shift import average, trace
from probes.logit_shift.page import save_attention_page, with_patterns


@pytest.fixture(scope="module")
def model():
    return load_model(
        copy.deepcopy(tiny_model("gpt2")), tokenizer=tiny_tokenizer("gpt2"), device="cpu"
    )


@pytest.fixture(scope="module")
def account(model):
    return with_patterns(model, trace(model, pairs(model, sample_facts())[0]))


def test_patterns_are_saved_with_the_account(account, tmp_path):
    folder = account.save(tmp_path / "trace")
    found = load_result(folder)
    np.testing.assert_array_equal(found.patterns, account.patterns)
    assert found.tokens == account.tokens
    *_, queries, keys = found.patterns.shape
    assert queries == keys == len(found.tokens)
    np.testing.assert_allclose(found.patterns.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(found.patterns, np.tril(found.patterns))


def test_an_account_without_patterns_has_no_views(model, tmp_path):
    bare = trace(model, pairs(model, sample_facts())[0])
    assert "patterns.npz" not in bare.files()
    with pytest.raises(InputError, match="with_patterns"):
        bare.attention_views()
    path = hl.write_report(bare, out=tmp_path / "r.html")
    text = path.read_text(encoding="utf-8")
    assert "Where the heads look" not in text and "CircuitsVis" not in text


def test_the_page_is_the_same_with_and_without_saved_patterns(model, account, tmp_path):
    bare = replace(account, tokens=(), patterns=None)
    for name, given in (("a.html", account), ("b.html", bare)):
        save_attention_page(model, given, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_several_traces_share_one_bundle(account, tmp_path):
    path = hl.write_report([account, account], out=tmp_path / "r.html")
    text = path.read_text(encoding="utf-8")
    assert text.count(bundle()[:200]) == 1
    assert text.count("CircuitsVis.render(") == 4


def test_an_average_has_maps_parts_and_facts(model, tmp_path):
    mean = average(model, pairs(model, sample_facts()), quiet=True)
    path = hl.write_report(mean.save(tmp_path / "mean"), out=tmp_path / "r.html")
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    assert len(page.find_all("img")) == 2
    table = page.find("h3", string="Facts").find_parent("section").table
    column = [head.text for head in table.thead.find_all("th")].index("shift (logits)")
    rows = [row.find_all(["th", "td"]) for row in table.tbody.find_all("tr")]
    np.testing.assert_array_equal(
        [float(cells[column]["title"]) for cells in rows], mean.facts["shift"]
    )


def test_views_run_under_the_policy_and_tokens_are_text(account, tmp_path):
    hostile = [
        "<s>",
        "</script><script>alert(1)</script>",
        "<img src=x onerror=alert(2)>",
        "\u202e",
    ]
    tokens = tuple(hostile + list(account.tokens[len(hostile) :]))
    table = account.table.assign(
        token=account.table["token"].mask(account.table["position"] == 1, "<b>$\\x$\x00</b>")
    )
    path = hl.write_report(replace(account, tokens=tokens, table=table), out=tmp_path / "r.html")
    with chromium() as browser, Visit(browser, path) as visit:
        page = visit.page
        page.locator("h3", has_text="Where the heads look").scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        card = page.locator(".card", has=page.locator(".words"))
        assert card.locator("canvas").count() > 0
        words = card.locator(".words").inner_text()
        assert visible("<s>") in words and visible("</script>") in words
        assert page.locator("img[src=x], b").count() == 0
        for image in page.locator(".card img").all():
            assert image.evaluate("(e) => e.complete && e.naturalWidth") > 100
        parts = page.locator("section", has=page.locator("h3", has_text="Every part")).last
        with page.expect_download() as waiting:
            parts.get_by_role("button", name="Download account.csv").click()
        saved = pd.read_csv(waiting.value.path(), keep_default_na=False, na_values={"layer": ""})
        assert saved["shift"].sum() == pytest.approx(account.table["shift"].sum())
        assert visit.said == [] and visit.asked == []


@pytest.mark.parametrize("family", ["jamba", "qwen3_next", "lfm2", "granitemoehybrid:rope"])
def test_a_hybrid_shows_the_layers_that_have_attention(family, tmp_path):
    tokenizer = rows.tokenizer_of(family)
    hybrid = load_model(rows.make(family), tokenizer=tokenizer, dtype="float32", device="cpu")
    if version("transformer-lens").startswith("3.") and agreement_of(hybrid).hooked:
        pytest.skip("TransformerLens 3.9 does not compute what this model does, so it is refused")
    pair = next(p for p in pairs(hybrid, sample_facts()) if not p.same_first_token)
    account = with_patterns(hybrid, trace(hybrid, pair))
    assert with_attention(account.patterns) == [1]
    np.testing.assert_allclose(account.patterns[1].sum(-1), 1, atol=1e-5)
    path = tmp_path / "page.html"
    save_attention_page(hybrid, account, path)
    text = path.read_text(encoding="utf-8")
    assert "Layer 1" in text and "Layer 0" not in text and "L0 H" not in text
    found = load_result(account.save(tmp_path / "trace"))
    np.testing.assert_array_equal(found.patterns, account.patterns)

    run = views.run(hybrid, "Rome is the capital of")
    heads = run.heads()
    assert len(heads.props["attention"]) == run.patterns.shape[1] and "all heads" in heads.heading
    assert sum(run.attended().props["values"]) == pytest.approx(1, abs=1e-3)
    with pytest.raises(InputError, match="in the layers 1 alone"):
        run.heads(layers=0)
