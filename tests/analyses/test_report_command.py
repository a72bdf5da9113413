"""`hijacklens report` as a user meets it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hijack_runs import made_up_run

from analyses.commands.group import main
from hijacklens.facts.atlas import atlas
from hijacklens.results.glance import drawn
from hijacklens.results.result import load_result


def run(*arguments):
    """Exit status of a command line; 0 where it just returns."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name in ("first", "second"):
        made_up_run(models=(name,), schemes=("do-not-think",)).save(root / "runs" / name)
    return root


@pytest.fixture
def folders(saved, tmp_path, monkeypatch):
    (tmp_path / "runs").symlink_to(saved / "runs", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_folders_become_one_page(folders, capsys):
    assert run("report", folders / "first", folders / "second", "--title", "A & B") == 0
    assert capsys.readouterr().out.startswith("written to report.html  (0.")
    text = (folders.parent / "report.html").read_text(encoding="utf-8")
    assert "<h1>A &amp; B</h1>" in text
    assert "Hijack result: first</h2>" in text and "Hijack result: second</h2>" in text


def test_the_status_of_a_comparison_is_the_verdict_of_its_gate(tmp_path, capsys):
    base = made_up_run(models=("a",), schemes=("s",), doses=(0, 1), facts=atlas().facts[::20])
    worse = base.items.assign(first_false=base.items["first_false"] + 9)
    opened = replace(base.settings, facts=replace(base.settings.facts, opening="Well."))
    runs = {
        "base": base,
        "worse": replace(base, items=worse),
        "opened": replace(base, settings=opened),
    }
    for name, one in runs.items():
        one.save(tmp_path / name)
    for name, verdict, status in (
        ("base", "PASS", 0),
        ("worse", "FAIL", 1),
        ("opened", "INCONCLUSIVE", 3),
    ):
        command = ["compare", tmp_path / "base", tmp_path / name, "--max-rise", "0.2"]
        assert run(*command, "--claim", "facts", "--json") == status
        gate = json.loads(capsys.readouterr().out)["gate"]
        assert (gate["verdict"], gate["claim"], gate["max_rise"]) == (verdict, "facts", 0.2)
        assert run(*command, "--claim", "facts") == status
        assert f"{verdict}: efficacy " in capsys.readouterr().out
    gated = ["compare", tmp_path / "base", tmp_path / "worse", "--max-rise", "0.2"]
    assert run(*gated, "--out", tmp_path / "gate", "--quiet") == 1
    page = tmp_path / "r.html"
    assert run("report", tmp_path / "base", tmp_path / "gate", "--out", page, "--quiet") == 0
    text = page.read_text(encoding="utf-8")
    assert text.index("Comparison: gate</h2>") < text.index("Hijack result: base</h2>")
    assert "Verdict of the gate</h3>" in text and "FAIL: efficacy " in text
    capsys.readouterr()
    assert run("compare", tmp_path / "base", tmp_path / "opened", "--strict") == 2
    assert "more than the model (opening '' -> 'Well.')" in capsys.readouterr().err
    assert run("compare", tmp_path / "base", tmp_path / "worse", "--strict", "--quiet") == 0


def test_every_reason_why_records_cannot_be_read_is_listed(tmp_path, capsys):
    row = {"template": "{} has", "subject": "Wales", "target_true": "coal", "target_false": "oil"}
    rows = [row, row | {"target_true": ""}, row | {"subject": 3}, row | {"target_true": ""}]
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    assert run("facts", "--facts", tmp_path / "mine.json") == 0
    said = capsys.readouterr().out
    assert "2 records could not be read (2, 4): target_true is empty." in said
    assert "1 record could not be read (3): subject must be text, not 3." in said


def test_a_folder_of_results_stands_for_all_of_them(folders, capsys):
    assert run("report", folders) == 0
    text = (folders.parent / "report.html").read_text(encoding="utf-8")
    assert "Hijack result: first</h2>" in text and "Hijack result: second</h2>" in text


def test_a_page_is_not_overwritten_in_silence(folders, capsys):
    out = folders.parent / "r.html"
    command = ["report", folders / "first", "--out", out]
    assert run(*command, "--quiet") == 0
    assert capsys.readouterr().out == ""
    before = out.read_bytes()
    assert run(*command) == 2
    assert "already exists" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run(*command, "--overwrite", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "bytes": len(before),
        "file": str(out),
        "results": [str(folders / "first")],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no result in 'nowhere'"),
        (["."], "no result in '.'"),
        (["runs/first", "--out", "runs"], "is a folder"),
        (["runs/first", "--out", "no/such/r.html"], "there is no folder"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_gets_one_clear_error_and_no_file(folders, capsys, arguments, message):
    assert run("report", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (folders.parent / "report.html").exists()


def test_show_prints_several_kinds_of_folders(folders, capsys):
    old = Path(__file__).parents[1] / "data" / "old_results"
    kinds = [
        old / name for name in ("lens-gpt2", "search-nasty", "sweep-training", "training-tiny")
    ]
    assert run("show", *kinds) == 0
    printed = capsys.readouterr().out
    for folder in kinds:
        lines = drawn(load_result(folder).glance())
        assert f"{lines}\nread from {folder}/; made 20" in printed


def test_show_names_results_inside_and_the_dtype(folders, capsys):
    result = made_up_run(models=("alpha",), schemes=("do-not-think",))
    models = tuple(replace(model, dtype="bfloat16") for model in result.settings.models)
    settings = replace(result.settings, models=models, probes=("knock-out:layers=1",))
    replace(result, settings=settings).save(folders.parent / "run")
    result.save(folders.parent / "run" / "answers")
    assert run("show", "run") == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("alpha (bfloat16) with knock-out:layers=1 · ")
    assert last == "results inside: run/answers"


def test_show_prints_worlds(tmp_path, capsys):
    call = "world --bits 1 --subjects 2 --d-model 8 --steps 2 --batch 2 --length 8 --vary seed=0,1"
    assert run(*call.split(), "--out", tmp_path / "worlds", "--quiet") == 0
    trained = capsys.readouterr().out
    assert run("show", tmp_path / "worlds") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line and not line.startswith("read from")] == (
        trained.splitlines()
    )
