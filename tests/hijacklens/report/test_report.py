"""The report as a file: exact numbers, text as text, one file that fetches nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from hijack_runs import made_up_run
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_facts import sample_facts

import hijacklens as hl
from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.facts.relations import relation_title
from hijacklens.report.page import description
from hijacklens.report.tables import links, number, pack, table_part
from hijacklens.results.exhibits import Drawing, Table
from hijacklens.results.result import Provenance, Result
from hijacklens.views.page import templates


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "saved"
    made_up_run().save(folder)
    return folder


@pytest.fixture(scope="module")
def page(run):
    path = hl.write_report(run, out=run.parent / "report.html")
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def section(page, heading):
    found = page.find("h3", string=heading)
    return found.find_parent("section")


def unpack(text):
    """The table that was packed, as the page's script reads it."""
    data = gzip.decompress(base64.b64decode(text))
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    start, columns = 4 + length, {}
    for column in header["columns"]:
        start += -start % 8
        kind = "<f8" if column["kind"] == "float" else "<i4"
        array = np.frombuffer(data, kind, header["rows"], start)
        start += array.nbytes
        if column["kind"] == "text":
            values = [*column.get("values", []), None]
            array = pd.Series([values[code] for code in array], dtype="str")
        columns[column["name"]] = array
    return pd.DataFrame(columns)


def packed(place, end):
    return unpack(place.find("script", id=re.compile(f"{end}$")).string)


def test_numbers_are_those_of_the_files(page, run):
    found = packed(section(page, "Efficacy and retention"), "-data")
    written = pd.read_csv(run / "summary.csv")
    written["relation"] = written["relation"].map(relation_title)
    pd.testing.assert_frame_equal(found, written, check_dtype=False, check_exact=False, rtol=1e-15)
    facts = section(page, "Facts before and after")
    items = pd.read_parquet(run / "items.parquet")
    items["same_first_token"] = items["same_first_token"].astype(str)  # as a CSV has it
    pd.testing.assert_frame_equal(packed(facts, "-items"), items, check_dtype=False, rtol=0)
    prompts = pd.read_parquet(run / "prompts.parquet")
    pd.testing.assert_frame_equal(packed(facts, "-prompts"), prompts, check_dtype=False)
    rules = packed(section(page, "How often the rules differ"), "-data")
    pd.testing.assert_frame_equal(
        rules, pd.read_csv(run / "rules.csv"), check_dtype=False, check_exact=False, rtol=1e-15
    )
    skipped = packed(section(page, "Facts that could not be scored"), "-data")
    assert skipped.to_dict("list") == pd.read_csv(run / "skipped.csv").to_dict("list")


def test_rows_in_the_html_are_the_summary_of_the_pooled_facts(page, run):
    table = section(page, "Efficacy and retention").find("table")
    names = [head.text for head in table.find("thead").find_all("th")]
    result = hl.load_result(run)
    assert isinstance(result, hl.HijackResult)
    summary = result.summary()
    rows = table.find("tbody").find_all("tr")
    assert len(rows) == len(summary) == 12
    for row, expected in zip(rows, summary.to_dict("records"), strict=True):
        cells = dict(zip(names, row.find_all(["th", "td"]), strict=True))
        assert cells["model"].text == expected["model"]
        assert cells["efficacy"].text == f"{expected['efficacy']:.3f}"
        assert float(cells["efficacy"]["title"]) == expected["efficacy"]
        assert float(cells["low"]["title"]) == expected["efficacy_low"]
        assert cells["ties"].text == str(expected["ties"])


def test_the_record_is_that_of_the_run(page, run):
    text = page.find("script", id=re.compile("-record$")).string
    found = json.loads(json.loads(text))
    record = json.loads((run / "result.json").read_text())
    for key, value in found.items():
        assert value == record[key], key
    assert {"provenance", "settings", "items", "skipped"} <= set(found)


def test_curves_say_in_words_what_they_show(page, run):
    images = page.find_all("img")
    assert len(images) == 3
    result = hl.load_result(run)
    assert isinstance(result, hl.HijackResult)
    first = result.summary().iloc[0]
    assert f"alpha, do-not-think: {first['efficacy']:.3f} at dose 0" in images[0]["alt"]
    for image in images:
        assert image["src"].startswith("data:image/svg+xml;base64,")
        assert b"<svg" in base64.b64decode(image["src"].split(",")[1])


def test_the_page_may_fetch_nothing_and_runs_its_own_scripts_only(page):
    policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    rule = re.search(r"script-src ([^;]*)", policy)
    assert rule and "unsafe-inline" not in rule[1]
    scripts = [script.string for script in page.find_all("script", type=False)]
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    ]
    assert hashes == rule[1].split()
    for element in page.find_all(True):
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert re.match(r"(#|data:|$)", element.get(name, ""))


def test_headings_step_down_one_at_a_time_and_ids_are_unique(page):
    levels = [int(element.name[1]) for element in page.find_all(re.compile("^h[1-6]$"))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    for link in page.find_all("a", href=re.compile("^#.")):
        assert link["href"][1:] in ids
    for table in page.find_all("table"):
        assert table.caption.text
        assert all(head["scope"] == "col" for head in table.thead.find_all("th"))


def test_what_is_said_of_a_run_is_on_the_page(tmp_path):
    """The notes of the command, counts of one, what is around the prompts, and names with `$`."""
    run = made_up_run(models=("US$",), schemes=("think",), facts=tuple(sample_facts()[:1]))
    settings = replace(run.settings, facts=replace(run.settings.facts, opening="Well."))
    path = hl.write_report(replace(run, settings=settings), out=tmp_path / "one.html")
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    assert "after 'Well.', 1 fact · think" in page.find("p", class_="what").text
    assert "one relation: these facts say nothing about relations like these" in page.text
    facts = section(page, "Facts before and after").text
    assert "Every prompt begins with 'Well.', which is not shown." in facts
    assert plots_in(run)[0].startswith("Figure. think: efficacy") and "US$ (n" in plots_in(run)[0]


def plots_in(result):
    return [description(part.figure) for part in result.exhibits() if isinstance(part, Drawing)]


def test_several_results_share_a_page(run, tmp_path):
    path = hl.write_report([run, made_up_run(models=("gamma",))], out=tmp_path / "both.html")
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    assert [head.text for head in page.find_all("h2")] == ["Hijack result: saved", "Hijack result"]
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids))


def test_a_result_that_was_saved_without_texts_has_a_report(run, tmp_path):
    (tmp_path / "old").mkdir()
    for file in run.iterdir():
        if file.name != "prompts.parquet":
            (tmp_path / "old" / file.name).write_bytes(file.read_bytes())
    path = hl.write_report(tmp_path / "old", out=tmp_path / "old.html")
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    facts = section(page, "Facts before and after")
    assert len(packed(facts, "-prompts")) == 0
    assert (packed(facts, "-links")["prompt"] == -1).all()


@dataclass(frozen=True, eq=False)
class Weights(Result):
    """A type of result without its own exhibits."""

    provenance: Provenance

    def to_dataframe(self):
        return pd.DataFrame({"layer": [0, 1], "weight": [0.25, np.nan], "kept": [True, False]})

    def plot(self):
        with plots.canvas() as (figure, (ax,)):
            ax.plot([0, 1], [0.25, 0.5], label="rank <1>")
            ax.set(title="Weights", xlabel="layer", ylabel="weight")
            plots.legend_below(figure, [ax])
        return figure

    def findings(self):
        return {"n_heads": 2, "parts": [{"a": 1}], "nothing": None, "many": list(range(50))}


def test_any_result_has_its_figure_its_table_and_its_record(tmp_path):
    path = hl.write_report(Weights(Provenance.now()), out=tmp_path / "w.html", title="A <title>")
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    assert page.h1.text == page.title.text == "A <title>"
    assert page.h2.text == "Weights"
    assert page.img["alt"] == "Figure. Weights: weight against layer; rank <1>"
    cells = [
        [cell.text for cell in row.find_all(["th", "td"])] for row in page.tbody.find_all("tr")
    ]
    assert cells == [["0", "0.25", "True"], ["1", "", "False"]]
    words = page.find("summary", string="Configuration").parent.get_text(" ")
    assert "n heads 2" in words and "nothing none" in words and "and 10 more" in words


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one result"),
        (["nowhere"], "no result in 'nowhere'"),
        (["."], "it has no result.json"),
        ([""], "named by a text"),
    ],
)
def test_invalid_results_are_refused_before_anything_is_written(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        hl.write_report(given, out=tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_overwritten_silently(run, tmp_path):
    out = tmp_path / "r.html"
    out.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        hl.write_report(run, out=out)
    assert out.read_text() == "mine"
    hl.write_report(run, out=out, overwrite=True)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("out", "message"), [(".", "is a folder"), ("no/r.html", "no folder")])
def test_an_impossible_file_is_refused(run, tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        hl.write_report(run, out=out)


def test_a_report_that_fails_leaves_the_old_file(run, tmp_path, monkeypatch):
    out = hl.write_report(run, out=tmp_path / "r.html")
    before = out.read_bytes()
    monkeypatch.setattr(Weights, "plot", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hl.write_report([run, Weights(Provenance.now())], out=out, overwrite=True)
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]


def test_equal_results_give_equal_pages(run, tmp_path):
    pages = [hl.write_report(run, out=tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.text()),
            st.floats(allow_nan=True),
            st.integers(-(2**31) + 1, 2**31 - 1),
        )
    )
)
def test_packing_keeps_every_value(rows):
    table = pd.DataFrame(rows, columns=["text", "float", "whole"])
    table = table.astype({"text": object, "float": float, "whole": int})
    found = unpack(pack(table))
    for name, kept in (("text", lambda v: v), ("float", repr), ("whole", int)):
        missing = pd.isna(table[name])
        assert (pd.isna(found[name]) == missing).all()
        pairs = zip(table[name][~missing], found[name][~missing], strict=True)
        assert all(kept(a) == kept(b) for a, b in pairs)


def test_packing_of_odd_columns():
    table = pd.DataFrame(
        {
            "big": [2**40, 1],
            "flag": [True, False],
            "gap": pd.array([1, None], dtype="Int64"),
            "list": [[1, 2], None],
            "label": pd.Categorical(["b", "a"]),
        }
    )
    found = unpack(pack(table)).to_dict("list")
    assert found["big"] == [str(2**40), "1"]
    assert found["flag"] == ["True", "False"]
    assert found["gap"][0] == 1 and np.isnan(found["gap"][1])
    assert found["list"][0] == "[1, 2]" and pd.isna(found["list"][1])
    assert found["label"] == ["b", "a"]
    assert unpack(pack(table.head(0))).empty


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stays_text_and_nothing_in_it_is_unseen(text):
    template = templates(Path()).from_string('<p title="{{ text }}">{{ text }}</p>')
    html = template.render(text=text)
    soup = BeautifulSoup(html, "html.parser")
    assert len(soup.find_all(True)) == 1 and set(soup.p.attrs) == {"title"}
    assert soup.p.text == soup.p["title"]
    assert html.isprintable()


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0.5, 0, "1"),
        (-0.0625, 3, "-0.063"),
        (-0.0, 2, "0.00"),
        (1e-12, 3, "1.0e-12"),
        (float("-inf"), 1, "-∞"),
        (3.25e22, 1, "3.250e+22"),
        (np.float64(2.0), 2, "2.00"),
        (None, 2, ""),
        (pd.NA, 2, ""),
        (7, None, "7"),
    ],
)
def test_numbers_as_the_page_writes_them(value, digits, expected):
    assert number(value, digits) == expected


def test_decimals_suit_the_column():
    table = Table("t", pd.DataFrame({"lr": [0.01, 0.001], "big": [12345.6, 0.5], "n": [1, 2]}))
    assert [table.column(name).digits for name in ("lr", "big", "n")] == [3, 1, None]
    assert table.column("lr").label == "lr"


def test_a_table_starts_with_the_rows_that_are_chosen():
    data = pd.DataFrame({"rule": ["first", "sum"] * 20, "value": range(40)})
    rows = table_part(Table("t", data, chosen={"rule": "sum"}, filters=("rule",)))["rows"]
    assert len(rows) == 20 and all(row[0]["text"] == "sum" for row in rows)


def test_items_know_their_bare_query_and_their_texts():
    run = made_up_run()
    items = run.items.sample(frac=1, random_state=1).reset_index(drop=True)
    found = links(items, run.prompts)
    for i, row in items.iterrows():
        bare, text = items.iloc[found["bare"][i]], run.prompts.iloc[found["prompt"][i]]
        keys = ["model", "scheme", "case_id"]
        assert list(bare[keys]) == list(row[keys]) and bare["dose"] == 0
        assert list(text[keys[1:]]) == list(row[keys[1:]])


def test_a_drawing_may_have_its_own_alternative_text(tmp_path, monkeypatch):
    result = Weights(Provenance.now())
    drawing = Drawing("Other", result.plot(), alt='"quoted" & <b>')
    monkeypatch.setattr(Weights, "exhibits", lambda self: [drawing])
    page = hl.write_report(result, out=tmp_path / "r.html").read_text(encoding="utf-8")
    assert BeautifulSoup(page, "html.parser").img["alt"] == '"quoted" & <b>'
