"""The report in a real Chromium with the network off: what a reader sees, sorts, finds, saves."""

from __future__ import annotations

import csv
import io
import json
import re
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from browser import Visit, chromium
from hijack_runs import made_up_run
from hostile import HOSTILE
from PIL import Image

import hijacklens as hl
from hijacklens.facts.fact import Fact
from hijacklens.facts.relations import relation_title
from hijacklens.report.tables import FIRST_ROWS, number
from hijacklens.scoring import efficacy
from hijacklens.views.page import visible

WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
"""Pixels by which the page is wider than the screen."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run():
    return made_up_run()


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    return hl.write_report(run, out=tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def visit(browser, report):
    with Visit(browser, report) as found:
        yield found
        assert found.asked == [] and found.said == []


class Sheet:
    """A table of the page and its controls, found by its heading."""

    def __init__(self, visit, heading):
        self.place = visit.page.locator(
            "section", has=visit.page.locator("h3", has_text=heading)
        ).last

    def choose(self, label, value):
        self.place.get_by_label(label, exact=True).select_option(value)

    def search(self, text):
        self.place.get_by_label("search").fill(text)
        self.place.page.wait_for_timeout(250)

    def sort(self, label):
        self.place.locator("thead button", has_text=label).click()

    @property
    def status(self):
        return self.place.get_by_role("status").inner_text()

    @property
    def total(self):
        found = re.search(r"of ([\d,]+)", self.status)
        return int(found[1].replace(",", "")) if found and "Rows" in self.status else 0

    def column(self, label):
        heads = self.place.locator("thead th").all_inner_texts()
        at = [head.split("\xa0")[0].strip() for head in heads].index(label)
        cells = self.place.locator(f"tbody tr > :nth-child({at + 1})")
        return [text.strip() for text in cells.all_inner_texts()]

    def download(self, name):
        with self.place.page.expect_download() as waiting:
            self.place.get_by_role("button", name=f"Download {name}").click()
        assert waiting.value.suggested_filename == name
        return waiting.value.path()


def test_the_summary_sorts_filters_and_turns_pages(visit, run):
    sheet, whole = Sheet(visit, "Efficacy and retention"), run.full_summary
    assert sheet.status == f"Rows 1 to 12 of 12 (of {len(whole)} in all)"
    assert sheet.column("model") == list(run.summary()["model"])

    sheet.choose("rule", "mean")
    sheet.choose("facts", "known")
    sheet.choose("model", "beta")
    expected = run.summary(rule="mean", known_only=True)
    expected = expected[expected["model"] == "beta"]
    assert sheet.column("efficacy") == [number(v, 3) for v in expected["efficacy"]]

    sheet.sort("efficacy")
    falling = [float(text) for text in sheet.column("efficacy")]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) > 1
    head = sheet.place.locator("th", has=visit.page.get_by_role("button", name="efficacy"))
    assert head.get_attribute("aria-sort") == "descending"
    sheet.sort("efficacy")
    assert [float(text) for text in sheet.column("efficacy")] == falling[::-1]
    assert head.get_attribute("aria-sort") == "ascending"

    for label in ("rule", "facts", "model", "relation"):
        sheet.choose(label, "" if label != "facts" else "all")
    whole = whole[whole["facts"] == "all"]
    assert sheet.total == len(whole)
    sheet.place.get_by_role("button", name="Next").click()
    first = FIRST_ROWS + 1
    assert sheet.status.startswith(f"Rows {first} to {2 * FIRST_ROWS} of {len(whole)}")
    assert sheet.place.get_by_role("button", name="Previous").is_enabled()


@pytest.mark.parametrize("rule", efficacy.RULES)
def test_the_facts_that_flip_are_those_of_the_items(visit, run, rule):
    items = run.items.assign(now=efficacy.margin(run.items, rule))
    keys = ["model", "scheme", "case_id"]
    bare = items[items["dose"] == 0].set_index(keys)["now"].rename("bare")
    items = items.join(bare, on=keys)
    items = items[items["dose"] > 0]
    flips = {
        "to-false": (items["bare"] < 0) & (items["now"] > 0),
        "to-true": (items["bare"] > 0) & (items["now"] < 0),
        "tie": (items["bare"] == 0) != (items["now"] == 0),
        "": items["now"].notna(),
    }
    sheet = Sheet(visit, "Facts before and after")
    sheet.choose("rule", rule)
    assert sheet.total == (flips["to-false"] & (items["dose"] == 1)).sum()
    sheet.choose("dose", "")
    for value, expected in flips.items():
        sheet.choose("which", value)
        assert sheet.total == expected.sum(), value
    sheet.choose("model", "alpha")
    sheet.choose("dose", "2")
    sheet.choose("which", "to-false")
    chosen = items[flips["to-false"] & (items["model"] == "alpha") & (items["dose"] == 2)]
    sheet.sort("shift")
    shifts = sorted(chosen["now"] - chosen["bare"], reverse=True)
    shown = [text for text in sheet.column("shift (nats)") if text]
    assert shown == [f"+{number(shift, 2)}" for shift in shifts[:20]]


def test_a_fact_shows_both_prompts_targets_scores_and_answers(visit, run):
    sheet = Sheet(visit, "Facts before and after")
    sheet.choose("which", "")
    sheet.choose("model", "alpha")
    sheet.choose("scheme", "do-not-think")
    sheet.choose("dose", "2")
    sheet.search("danielle")
    assert sheet.total == 1
    bare, now = sheet.place.locator("tbody tr").all()
    text = run.prompts[run.prompts["case_id"] == 2].iloc[0]
    assert bare.locator(".prompt").inner_text() == text["query"]
    sentences = f"{text['sentence']} {text['sentence']}"
    assert now.locator(".prompt").inner_text() == f"{sentences} {text['query']}"
    assert now.locator("mark").inner_text() == sentences
    words = bare.locator("th").first.inner_text()
    assert "true: French" in words and "false: English" in words
    assert "P103 native language · case 2" in words
    items = run.items[(run.items["model"] == "alpha") & (run.items["scheme"] == "do-not-think")]
    for row, dose in ((bare, 0), (now, 2)):
        item = items[(items["case_id"] == 2) & (items["dose"] == dose)].iloc[0]
        scores = [float(cell.get_attribute("title")) for cell in row.locator("td[title]").all()]
        assert scores == [item["first_true"], item["first_false"]]
        assert f"“{item['top_token']}”" in row.inner_text()


@pytest.mark.parametrize(
    ("needle", "hits"),
    [("EIFFEL", "subject"), ("yamoussoukro", "target"), ("北京", "subject"), ("no such", None)],
)
def test_facts_are_found_by_any_of_their_texts(visit, needle, hits):
    sheet = Sheet(visit, "Facts before and after")
    sheet.choose("which", "")
    sheet.choose("dose", "")
    sheet.search(needle)
    assert sheet.total == (8 if hits else 0)  # two models, schemes and doses
    if not hits:
        assert sheet.status == "No row (of 80 in all)"


def test_downloads_hold_the_data_to_the_last_digit(visit, run, tmp_path):
    run.save(tmp_path / "run")
    summary = Sheet(visit, "Efficacy and retention").download("summary.csv")
    written = pd.read_csv(tmp_path / "run" / "summary.csv")
    written["relation"] = written["relation"].map(relation_title)
    pd.testing.assert_frame_equal(pd.read_csv(summary), written, rtol=0, atol=0)
    facts = Sheet(visit, "Facts before and after")
    items = pd.read_csv(facts.download("items.csv"), keep_default_na=False)
    pd.testing.assert_frame_equal(items, run.items, check_dtype=False, rtol=0, atol=0)
    prompts = pd.read_csv(facts.download("prompts.csv"), keep_default_na=False)
    pd.testing.assert_frame_equal(prompts, run.prompts, check_dtype=False)
    record = json.loads(Sheet(visit, "Record").download("record.json").read_text())
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert all(written[key] == value for key, value in record.items())


def test_the_page_is_used_by_keyboard_alone(visit):
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    sheet = Sheet(visit, "Efficacy and retention")
    sheet.place.locator("thead button").first.focus()
    page.keyboard.press("Enter")
    head = sheet.place.locator("thead th").first
    assert head.get_attribute("aria-sort") == "ascending"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    sheet.choose("rule", "")
    sheet.place.get_by_role("button", name="Next").focus()
    while sheet.place.get_by_role("button", name="Next").is_enabled():
        page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "Previous"


def test_every_control_has_a_name_and_every_row_is_announced(visit):
    page = visit.page
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input, summary, [role=region]')].filter("
        "(e) => !(e.labels?.[0]?.textContent || e.textContent.trim() || e.ariaLabel)).length"
    )
    assert unnamed == 0
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1
    # A live region for each table of the page, the folded ones too.
    assert page.locator("[role=status]").count() == 4
    assert all(page.locator("[role=status]").all_text_contents())
    assert page.locator("thead th:not([scope=col])").count() == 0
    assert page.locator("tbody th:not([scope])").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_nothing_is_wider_than_the_screen(browser, report, scheme):
    with Visit(browser, report, color_scheme=scheme) as visit:
        page = visit.page
        for selector in (
            "main p",
            ".source",
            "nav a",
            "td.number",
            "thead button",
            ".status",
            "label",
            "caption",
            "mark",
            ".facts small",
            "footer p",
            "dt",
        ):
            assert contrast(page, selector) >= 4.5, selector
        assert page.evaluate(WIDER) == 0
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate(WIDER) == 0
        assert visit.said == []


def contrast(page, selector):
    """The contrast of the first such element, as WCAG 2 defines it."""
    colours = page.locator(selector).first.evaluate(
        "(e) => { const ink = getComputedStyle(e).color; let paper;"
        "for (; e; e = e.parentElement) { paper = getComputedStyle(e).backgroundColor;"
        "if (!/, 0\\)$/.test(paper)) break; } return [ink, paper]; }"
    )
    light = []
    for colour in colours:
        parts = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        light.append(float(parts @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_paper_has_what_is_open_and_no_controls(visit):
    page = visit.page
    page.emulate_media(media="print")
    assert not page.locator(".controls").first.is_visible()
    assert not page.get_by_role("navigation").is_visible()
    visible = [fold.is_visible() for fold in page.locator("details").all()]
    printed = [fold.is_visible() for fold in page.locator("details.printed").all()]
    assert all(printed) and sum(visible) == len(printed)  # the provenance, and nothing folded
    assert page.get_by_text("Python session").first.is_visible()
    assert Sheet(visit, "Facts before and after").place.locator("caption").is_visible()
    for place in page.locator(".scroll").all():
        assert place.evaluate("(e) => e.scrollHeight <= e.clientHeight + 1"), "a table is cut"


def test_figures_and_views_are_dark_where_the_page_is(browser, report):
    with Visit(browser, report, color_scheme="dark") as visit:
        image = visit.page.locator("figure.card").first.screenshot()
        shown = np.asarray(Image.open(BytesIO(image)).convert("L"))
        assert np.median(shown) < 60  # the ground is dark
        assert shown.max() > 180  # and the ink light


def test_without_scripts_the_main_numbers_are_there(browser, report, run):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(report.as_uri())
    table = page.locator("section", has=page.locator("h3", has_text="Efficacy and retention")).last
    assert table.locator("tbody tr").count() == len(run.summary())
    assert page.locator("img").first.is_visible()
    assert "open the file in a browser" in page.locator("noscript p").inner_text()
    context.close()


def test_numbers_and_texts_are_written_as_in_python(visit):
    values = [0.0625, -0.0625, 2.675, 1e-12, -1e-7, 0.0, -0.0, 9.96e-8, 12345.678, 3.25e22, 1e15]
    for digits in (0, 1, 3, 6):
        found = visit.page.evaluate("([v, d]) => v.map((x) => written(x, d))", [values, digits])
        assert found == [number(value, digits) for value in values]
    for code in (0, 7, 10, 0x7F, 0x85, 0x200B, 0x200D, 0x202E, 0x2028, 0x2066, 0xFEFF, 0xE0041):
        page_says = visit.page.evaluate("(code) => visible(String.fromCodePoint(code))", code)
        assert page_says == visible(chr(code)), hex(code)


def test_hostile_texts_are_text(browser, tmp_path):
    # Of a broken code point no fact and no table can be made.
    bad = [text for text in HOSTILE if text.strip() and text != "\ud800"]
    bad += ["<style>*{display:none}</style>"]
    bad += ["<!--<script>", "]]>", "{{7*7}}", '" onmouseover="alert(1)', "&lt;b&gt;", 'a,b"c\nd']
    facts = tuple(
        Fact(
            case_id=i,
            relation_id=f"P{text}"[:200],
            subject=text,
            template="{} is in",
            target_true=f"{text} true",
            target_false=f"{text} false",
        )
        for i, text in enumerate(bad)
        if "{}" not in text
    )
    run = made_up_run(
        models=("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>"),
        schemes=('"><svg onload=alert(3)>',),
        facts=facts,
        answers=tuple(bad),
    )
    path = hl.write_report(run, out=tmp_path / "r.html", title="</title><script>alert(4)</script>")
    with Visit(browser, path) as visit:
        page = visit.page
        sheet = Sheet(visit, "Facts before and after")
        sheet.choose("which", "")
        while sheet.place.get_by_role("button", name="Next").is_enabled():
            sheet.place.get_by_role("button", name="Next").click()
            page.wait_for_timeout(5)
        sheet.search("<script>")
        assert sheet.total > 0
        assert "true: <script>alert(1)</script> true" in sheet.place.inner_text()
        for fold in page.locator("summary").all():
            fold.click()
        page.mouse.move(600, 400)
        page.wait_for_timeout(200)
        assert page.locator("script").count() == path.read_text(encoding="utf-8").count("<script")
        for selector in ("img:not(.card img)", "svg", "style:not(head style)", "[onerror]"):
            assert page.locator(selector).count() == 0, selector
        assert page.locator("[onload], [onmouseover], b, iframe, object").count() == 0
        assert page.evaluate(WIDER) == 0
        seen = page.locator("body").inner_text()
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u0000\u2028\ud800]", seen)
        assert "<img src=x onerror=alert(1)>" in seen
        items = sheet.download("items.csv").read_bytes().decode()
        assert visit.said == [] and visit.asked == []
    # The data keeps what the page writes out.
    rows = list(csv.DictReader(io.StringIO(items, newline="")))
    safe = [re.sub(r"^'*[=+@\t\r-]", r"'\g<0>", text) for text in run.items["subject"]]
    assert [row["subject"] for row in rows] == safe
