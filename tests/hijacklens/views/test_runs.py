"""Views of runs: the patterns of a plain pass, probes on, spans, any hooked model, every form."""

from __future__ import annotations

import html
import re
import shutil

import numpy as np
import pytest
import torch
from sample_facts import sample_facts
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer

import hijacklens as hl
from hijacklens import views
from hijacklens.errors import InputError
from hijacklens.prompts.prompt import make_prompt
from probes import attention

FACT = sample_facts()[0]
TEXT = "Do not think of Guam. The Eiffel Tower is in the city of"


def bridge(family="llama"):
    return hl.load_model(tiny_model(family), tokenizer=tiny_tokenizer(family), device="cpu")


@pytest.fixture(scope="module")
def model():
    return bridge()


@pytest.fixture(scope="module")
def run(model):
    return views.run(model, FACT, scheme="do-not-think")


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_those_of_the_plain_model(family):
    plain, tokenizer = tiny_model(family), tiny_tokenizer(family)
    plain.set_attn_implementation("eager")
    ids = tokenizer(TEXT).input_ids
    with torch.no_grad():
        expected = torch.cat(plain(torch.tensor([ids]), output_attentions=True).attentions)
    found = views.run(bridge(family), FACT, scheme="do-not-think")
    assert found.text == TEXT
    np.testing.assert_allclose(found.patterns, expected.numpy(), atol=1e-5)
    shown = found.heads([(1, 3)])
    np.testing.assert_allclose(shown.props["attention"], expected[1, 3].numpy(), atol=1e-4)
    assert len(shown.props["tokens"]) == len(ids)


def test_a_fact_a_prompt_and_a_text_give_the_same_run(model, run):
    prompt = make_prompt(FACT, sentence="Do not think of Guam.", dose=1, scheme="mine")
    for subject in (prompt, TEXT):
        found = views.run(model, subject)
        assert found.tokens == run.tokens
        np.testing.assert_array_equal(found.patterns, run.patterns)
    assert views.run(model, FACT).text == FACT.prompt
    assert views.run(model, FACT, scheme="do-not-think", dose=2).text.count("Guam") == 2


def test_special_tokens_stay_visible(run):
    assert run.tokens[0] == "<s>"
    for view in (run.heads(), run.heads([(0, 0)]), run.attended()):
        assert view.props["tokens"][0].strip() == "\u2039s\u203a"
        assert not any("<" in token for token in view.props["tokens"])


def test_a_probe_shows_in_the_patterns(model, run):
    blind = attention.knock_out("last", "hijack", layers=[1])
    found = views.run(model, FACT, scheme="do-not-think", probes=[blind])
    hidden = list(found.positions("hijack"))
    assert found.probes == (blind.key,) and blind.key in found.heads().heading
    assert (found.patterns[1, :, -1, hidden] == 0).all()
    assert (run.patterns[1, :, -1, hidden] > 0).all()
    np.testing.assert_array_equal(found.patterns[0], run.patterns[0])
    again = views.run(model, FACT, scheme="do-not-think")
    np.testing.assert_array_equal(again.patterns, run.patterns)  # the model is unchanged


def test_heads_are_shown_in_the_order_of_the_arguments(run):
    shown = run.heads([(1, 2), (0, 1)])
    assert shown.component == "AttentionHeads"
    assert shown.props["attentionHeadNames"] == ["L1 H2", "L0 H1"]
    np.testing.assert_allclose(shown.props["attention"][0], run.patterns[1, 2], atol=1e-4)
    assert run.heads(layers=1).props["attentionHeadNames"] == [f"L1 H{i}" for i in range(4)]
    assert run.heads(3, layers=[0, 1]).props["attentionHeadNames"] == ["L0 H3", "L1 H3"]
    assert "layer 1;" in run.heads(layers=1).heading
    assert "layer 1 heads 0, 2;" in run.heads([0, 2], layers=1).heading
    assert len(run.heads().props["attention"]) == 8
    one = run.heads(2, layers=0)
    assert one.component == "AttentionPattern" and "layer 0 head 2" in one.heading


def test_attended_is_the_mean_over_sources_and_heads(run):
    rows = list(run.positions("subject"))
    assert len(rows) > 1
    expected = run.patterns[[0, 1], [1, 3]][:, rows].mean((0, 1))
    found = run.attended("subject", heads=[(0, 1), (1, 3)])
    np.testing.assert_allclose(found.props["values"], expected, atol=1e-4)
    bare = run.attended("subject", heads=[(0, 1), (1, 3)], without="bos")
    assert bare.props["values"][0] == 0
    np.testing.assert_allclose(bare.props["values"][1:], expected[1:], atol=1e-4)
    assert f"{expected[0]:.0%} of it to bos not shown" in bare.heading


def test_one_call_is_a_run_and_a_view(model, run):
    whole = views.attention(model, FACT, scheme="do-not-think", layers=1)
    assert whole == run.heads(layers=1)
    assert views.attended(model, TEXT, heads=[(1, 0)]) == run.attended(heads=[(1, 0)])


def test_contexts_of_the_one_layer_model(run):
    task = hl.ConceptTask(bits=3, support="first-bit", length=8)
    drawn = task.sample(1, torch.Generator().manual_seed(0)).tokens[0]
    model = hl.train(task, d_model=8, seeds=1, steps=2, learning_rates=(0.01,), quiet=True).models[
        0
    ]
    found = views.run(model, drawn, task=task, probes=[attention.redirect("last", "cluster")])
    inside = (drawn // 4 == drawn[-1] // 4).numpy()
    assert found.tokens == tuple(str(int(token)) for token in drawn)
    np.testing.assert_allclose(found.patterns[0, 0, -1], inside / inside.sum(), atol=1e-6)
    assert found.positions("cluster") == tuple(np.flatnonzero(inside))
    plain = views.run(model, drawn.tolist())
    with torch.no_grad():
        _, cache = model.run_with_cache(drawn[None])
    np.testing.assert_allclose(plain.patterns[0], cache["pattern", 0][0].numpy(), atol=1e-6)
    assert plain.positions("at:0+last") == (0, 7)
    with pytest.raises(InputError, match="give task="):
        plain.attended("cluster")
    with pytest.raises(InputError, match=r"reads no text; give token ids"):
        views.run(model, "Paris")
    with pytest.raises(InputError, match=r"shape \[pos\]"):
        views.run(model, drawn[None])


def test_a_hooked_transformer_of_3_9():
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        pytest.skip("HookedTransformer was removed in TransformerLens 4.0")
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=40, act_fn="gelu", seed=0
    )
    model = HookedTransformer(config).eval()
    found = views.run(model, [3, 1, 4, 1, 5], probes=[attention.knock_out("last", "at:0")])
    assert found.patterns.shape == (2, 2, 5, 5)
    assert (found.patterns[:, :, -1, 0] == 0).all()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m: views.run(m, " "), "the prompt is empty"),
        (lambda m: views.run(m, TEXT, scheme="do-not-think"), "a scheme hijacks a Fact"),
        (lambda m: views.run(m, FACT, scheme="do-not-thimk"), "did you mean 'do-not-think'"),
        (lambda m: views.run(m, "Paris " * 400), "1 to 160 tokens"),
        (lambda m: views.run(m, TEXT, probes=[attention.knock_out("last", "text:Oslo")]), "Oslo"),
        (lambda m: views.run(m, TEXT, probes=[attention.knock_out("last", "hijack")]), "span"),
        (lambda m: views.run(m, [1, 2]), "a text, a Prompt or a Fact, not a list"),
        (lambda m: views.attention(m, TEXT, layers=2), "layer 2 is not one .* it has 2"),
        (lambda m: views.attention(m, TEXT, heads=[(0, 4)]), "head 4 is not one .* it has 4"),
        (lambda m: views.attention(m, TEXT, heads=[(0, 1), 2]), "not both"),
        (lambda m: views.attention(m, TEXT, layers=0, heads=[(0, 1)]), "leave layers out"),
        (lambda m: views.attention(m, TEXT, heads=[]), "no layer or head is chosen"),
        (lambda m: views.attended(m, FACT, source="hijack"), "no token is in"),
        (lambda m: views.Sheet(()), "at least one"),
    ],
)
def test_what_cannot_be_viewed_is_refused(model, ask, message):
    with pytest.raises(InputError, match=message):
        ask(model)


def test_a_model_in_training_is_refused():
    model = bridge("gpt2")
    model.train()
    with pytest.raises(InputError, match="evaluation mode"):
        views.run(model, TEXT)


def test_the_figure_shows_the_numbers_of_the_page(run):
    shown = run.heads([(1, 2), (0, 1)])
    figure = shown.plot()
    for ax, pattern in zip(figure.axes, shown.props["attention"], strict=False):
        drawn = ax.images[0].get_array()
        assert drawn is not None
        np.testing.assert_array_equal(drawn.filled(0), np.tril(pattern))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == list(shown.props["tokens"])
    one = run.heads([(1, 2)])
    drawn = one.plot().axes[0].images[0].get_array()
    assert drawn is not None
    np.testing.assert_array_equal(drawn.filled(0), np.tril(one.props["attention"]))
    words = run.attended().plot().axes[0].texts
    assert [text.get_text() for text in words] == [views.visible(token) for token in run.tokens]


def test_many_heads_are_one_picture():
    patterns = np.tril(np.ones((20, 3, 3)))
    patterns[7, 2, 0] = 0.25
    view = views.attention_heads("all", ["a", "$x^2$", "c"], patterns, list("abcdefghijklmnopqrst"))
    (image,) = view.plot().axes[0].images
    whole = image.get_array()
    assert whole is not None
    assert (np.asarray(whole) == 0.25).sum() == 1 and (np.asarray(whole) == 1).sum() == 20 * 6 - 1


def test_colours_of_a_strip_follow_the_signs():
    strip = views.coloured_tokens("signs", ["a", "b", "c"], [1.0, -1.0, 0.0]).plot().axes[0]
    red, blue, white = (patch.get_facecolor() for patch in strip.patches)
    assert red[0] > red[2] and blue[2] > blue[0] and min(white[:3]) > 0.95


def test_a_cell_is_one_sandboxed_frame(run):
    sheet = views.Sheet((run.attended(), run.heads(layers=0)), note="a & b")
    (cell, picture) = (sheet._repr_mimebundle_()[kind] for kind in ("text/html", "image/png"))
    assert cell.count("<iframe") == 1 and 'sandbox="allow-scripts"' in cell
    assert not re.search(r"https?://", cell.split("srcdoc=")[0])
    inside = html.unescape(re.search(r'srcdoc="([^"]*)"', cell)[1])
    assert inside.count("CircuitsVis.render(") == 2 and "default-src 'none'" in inside
    assert len(inside) < 600_000  # one copy of the bundle, compressed
    assert "a &amp; b" in inside and picture.startswith(b"\x89PNG")
    assert cell == sheet._repr_mimebundle_(include=["text/html"])["text/html"]
    assert set(run.heads()._repr_mimebundle_(exclude=["image/png", "text/html"])) == {"text/plain"}


def test_a_heading_cannot_leave_the_frame():
    hostile = '"></iframe><script>alert(1)</script>'
    cell = views.coloured_tokens(hostile, [hostile], [1.0])._repr_mimebundle_()["text/html"]
    assert cell.count("<iframe") == 1 and cell.count("</iframe>") == 1 and "<script" not in cell


@pytest.mark.parametrize("name", ["view.html", "view.png", "view.svg", "view.pdf"])
def test_a_view_is_saved_by_its_ending(run, tmp_path, name):
    path = run.attended().save(tmp_path / name)
    start = {"html": b"<!doctype", "png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[name[5:]]
    assert path.read_bytes().startswith(start)
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_what_cannot_be_saved_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"unknown ending '\.gif'"):
        run.attended().save(tmp_path / "view.gif")
    with pytest.raises(InputError, match="make the folder"):
        run.attended().save(tmp_path / "none" / "view.png")
    with pytest.raises(InputError, match="this sheet has 2"):
        views.Sheet((run.attended(), run.heads())).save(tmp_path / "both.png")
    views.Sheet((run.attended(), run.heads())).save(tmp_path / "both.html")


@pytest.mark.slow
def test_a_browser_draws_a_cell_offline(run, tmp_path):
    sync = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser on this machine")
    cells = [view._repr_mimebundle_()["text/html"] for view in (run.attended(), run.heads())]
    path = tmp_path / "cells.html"
    path.write_text(f'<!doctype html><meta charset="utf-8">{"".join(cells)}', encoding="utf-8")
    said, asked = [], []
    with sync.sync_playwright() as play:
        started = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_context(offline=True).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        frames = page.frames[1:]
        for frame, words in zip(frames, ("Guam", "Head Selector"), strict=True):
            frame.wait_for_selector(f"text={words}", timeout=20_000)
        assert "\u2039s\u203a" in frames[0].inner_text("body")
        started.close()
    assert said == [] and asked == [path.as_uri()]
