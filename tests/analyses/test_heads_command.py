"""`hijacklens heads` as a user meets it: two tables, files, errors without traceback."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
from planted_head import planted_facts, planted_model
from tiny_models import tiny_tokenizer

from analyses.commands.group import main
from hijacklens.results.result import load_result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model with a planted head, and its facts."""
    root = tmp_path_factory.mktemp("planted")
    planted_model().save_pretrained(root / "planted")
    tiny_tokenizer("llama").save_pretrained(root / "planted")
    table = planted_facts().to_dataframe().drop(columns="prompt")
    table.to_json(root / "facts.jsonl", orient="records", lines=True)
    return root


def run(*arguments):
    """Exit status of a command line; 0 where it just returns."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def test_search_and_held_out_test(folders, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["heads", "--model", folders / "planted", "--facts", folders / "facts.jsonl"]
    command += ["--size", 1, "--candidates", 2, "--split", "relation", "--random-sets", 2]
    command += ["--test-scheme", "do-not-think", "--test-scheme", "relation", "--quiet"]
    command += ["--out", out]
    assert run(*command) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].startswith("planted · facts.jsonl, search on 12 facts · do-not-think, dose 1")
    assert lines[1].split()[-1] == "chosen"
    assert lines[2].startswith("1.2 ")
    assert lines[2].endswith("yes")
    assert "held out: facts.jsonl, 6 facts · planted without heads 1.2 · rule first" in printed.out
    assert re.search(r"relation +1  new \(6\)", printed.out)
    assert "side effects on the bare query" in printed.out
    assert "layers: 2 random, in the same layers" in printed.out
    files = {path.name for path in out.iterdir()}
    assert files >= {"result.json", "items.parquet", "summary.csv", "side_effects.csv", "search"}
    assert f"written to {out}/" in printed.out
    record = json.loads((out / "result.json").read_text())
    assert record["settings"]["heads"] == "1.2"
    assert record["provenance"]["versions"]["torch"]
    search, test = load_result(out / "search"), load_result(out)
    assert search.heads == ((1, 2),)
    relations = set(search.facts.relations())
    assert relations.isdisjoint(test.items["relation_id"])
    assert set(pd.read_csv(out / "summary.csv")["scheme"]) == {"do-not-think", "relation"}

    assert run(*command) == 2  # a finished result is not overwritten in silence
    assert "already contains a result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "do-not-thinc"], "did you mean 'do-not-think'"),
        (["--test-scheme", "thinc"], "did you mean 'think'"),
        (["--size", "9", "--candidates", "4"], "cannot choose 9 heads from 4 candidates"),
        (["--random-sets", "-1"], "--random-sets is -1"),
        (["--test-doses", "2-1"], "neither a number nor a rising range"),
        (["--dose", "0"], "--dose is 0"),
        (["--case", "3"], "1 facts among its 1 facts"),
        (["--relation", "P36", "--split", "relation"], "a split by relation needs at least 2"),
        (["--split", "subject"], "--split"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, folders, tmp_path, capsys):
    command = ["heads", "--model", folders / "planted", "--facts", folders / "facts.jsonl"]
    assert run(*command, *arguments, "--out", tmp_path / "out", "--quiet") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()
