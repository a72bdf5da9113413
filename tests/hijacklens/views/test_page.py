"""Pages of circuitsvis views: one copy of the bundle, no network, every token visible."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hijacklens import views
from hijacklens.errors import InputError

TOKENS = ["<s>", "Do", "</script>", "\n", " "]
PATTERNS = np.tril(np.full((2, 5, 5), 0.123456))


def sample(folded=False):
    return [
        views.coloured_tokens("Parts & sums", TOKENS, [0.5, -2.0, 0.0, 1.0, 0.25]),
        views.attention_heads("Heads", TOKENS, PATTERNS, ["L0 H0", "L0 H1"], folded=folded),
    ]


def test_views_share_one_bundle_and_need_no_network():
    text = views.page(sample(), title="A <title>", note="note & more")
    bundle = Path(__import__("circuitsvis").__file__).parent / "dist/cdn/iife.js"
    start = bundle.read_text(encoding="utf-8")[:200]
    assert text.count(start) == 1
    assert text.count("CircuitsVis.render(") == 2
    assert len(text) < bundle.stat().st_size + 20_000
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", text)
    assert "A &lt;title&gt;" in text and "note &amp; more" in text and "Parts &amp; sums" in text


def test_a_token_cannot_end_the_script():
    text = views.page(sample(), title="t")
    assert text.count("</script>") == 2  # the bundle's end and that of the calls
    assert "\u2039/script\u203a" in text and "\u2039s\u203a" in text


def test_numbers_are_rounded_and_scales_are_symmetric():
    tokens, heads = sample()
    assert tokens.props["values"] == [0.5, -2.0, 0.0, 1.0, 0.25]
    assert (tokens.props["minValue"], tokens.props["maxValue"]) == (-2.0, 2.0)
    assert heads.props["attention"][0][1][:2] == [0.1235, 0.1235]
    assert json.loads(json.dumps(heads.props)) == heads.props
    assert views.coloured_tokens("none", ["a"], [0.0]).props["maxValue"] == 1.0


def test_a_folded_view_is_drawn_when_it_is_opened():
    text = views.page(sample(folded=True), title="t")
    assert '<details id="view-fold1"><summary>Heads</summary>' in text
    assert re.search(r'getElementById\("view-fold1"\)\.addEventListener\("toggle"', text)


@pytest.mark.parametrize(
    ("token", "shown"),
    [("<s>", "\u2039s\u203a"), ("\n", "↵"), ("  ", "␣␣"), ("", "∅"), (" Guam", " Guam")],
)
def test_every_token_is_visible(token, shown):
    assert views.visible(token) == shown


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="2 tokens need as many values, not 1"):
        views.coloured_tokens("x", ["a", "b"], [1.0])
    with pytest.raises(InputError, match="given 4 tokens and 2 names"):
        views.attention_heads("x", TOKENS[:4], PATTERNS, ["a", "b"])
    with pytest.raises(InputError, match="given 5 tokens and 1 names"):
        views.attention_heads("x", TOKENS, PATTERNS, ["a"])


def test_a_page_is_written_whole(tmp_path):
    views.save_page(sample(), tmp_path / "page.html", title="t")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8").endswith("</html>")


@pytest.mark.slow
def test_a_browser_draws_it_offline(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser on this machine")
    path = tmp_path / "page.html"
    views.save_page(sample(), path, title="t")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    drawn = re.sub(r"<script>.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert "\u2039s\u203a" in drawn and "Head Selector" in drawn and "L0 H1" in drawn
