"""`hijacklens trace`: its printed account, its files, its refusals."""

from __future__ import annotations

import copy
import json
import re

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from analyses.commands import group
from hijacklens.results.result import load_result

FILES = {
    "account.parquet",
    "summary.csv",
    "token_layer.svg",
    "token_layer.png",
    "layer_head.svg",
    "layer_head.png",
    "attention.html",
    "patterns.npz",
    "result.json",
}
OWN = ("--prompt", "The Eiffel Tower is in the city of", "--subject", "Eiffel Tower")
OWN += ("--true", "Paris", "--false", "Guam")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(root / "tiny-llama")
    tiny_tokenizer("llama").save_pretrained(root / "tiny-llama")
    table = sample_facts().to_dataframe().drop(columns="prompt")
    table.to_json(root / "facts.jsonl", orient="records", lines=True)
    return root


def run(*arguments):
    try:
        group.main(["trace", *(str(argument) for argument in arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def plain_difference(prompt):
    tokenizer, model = tiny_tokenizer("llama"), copy.deepcopy(tiny_model("llama"))
    before = tokenizer(prompt).input_ids
    true, false = (
        tokenizer(f"{prompt} {target}").input_ids[len(before)] for target in ("Paris", "Guam")
    )
    with torch.no_grad():
        logits = model(torch.tensor([before])).logits[0, -1]
    return float(logits[false] - logits[true])


def test_a_fact_of_a_file_and_the_same_of_ones_own(folders, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--model", folders / "tiny-llama", "--facts", folders / "facts.jsonl"]
    command += ["--case", 0, "--scheme", "do-not-think", "--dose", 1, "--out", out]
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    record = json.loads((out / "result.json").read_text())
    prompt = sample_facts()[0].prompt
    bare, hijacked = map(plain_difference, (prompt, f"Do not think of Guam. {prompt}"))
    assert record["shift"] == pytest.approx(hijacked - bare, abs=1e-4)
    assert abs(record["residual"]) <= 1e-4 * abs(record["shift"])
    assert record["settings"]["fact"]["case_id"] == 0 and record["provenance"]["versions"]["torch"]
    table = pd.read_parquet(out / "account.parquet")
    assert table["shift"].sum() == pytest.approx(record["shift"] - record["residual"], abs=1e-9)
    assert load_result(out).shift == record["shift"]
    assert "Do not think of Guam. The Eiffel Tower is in the city of" in printed
    whole = re.search(r"logit 'Guam' - 'Paris' +(\S+) +(\S+) +(\S+)\n", printed)
    assert whole is not None
    assert whole.groups() == tuple(f"{number:+.2f}" for number in (bare, hijacked, hijacked - bare))
    assert re.search(r"residual of the shift: [+-]\d\.\de-\d\d logits", printed)
    assert f"written to {out}/" in printed

    assert run(*command) == 2  # a finished result is not overwritten in silence
    assert "already contains a result" in capsys.readouterr().err

    page = (out / "attention.html").read_text(encoding="utf-8")
    assert '"\u2039s\u203a"' in page
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)
    assert page.count("AttentionHeads,") == 3  # the biggest heads, and each of two layers

    own = ["--model", folders / "tiny-llama", *OWN, "--out", out, "--overwrite", "--top", 3]
    assert run(*own) == 0
    printed = capsys.readouterr().out
    assert len(printed.split("biggest parts")[1].split("\nresidual")[0].splitlines()) == 4
    pd.testing.assert_frame_equal(load_result(out).to_dataframe(), table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name a fact: --case ID"),
        (("--case", 10**6), "atlas has no case 1000000"),
        ((*OWN, "--case", 0), "either a fact of your own"),
        (OWN[:4], "also needs --true and --false"),
        ((*OWN[:3], "Louvre", *OWN[4:]), "occurs 0 times in the prompt"),
        ((*OWN, "--dose", 0), "--dose is 0"),
        ((*OWN, "--scheme", "do-think"), "unknown scheme 'do-think'"),
    ],
)
def test_bad_options_give_one_line(folders, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert run("--model", folders / "tiny-llama", *options, "--out", out) == 2
    said = capsys.readouterr().err
    assert said.startswith("hijacklens: ") and message in said
    assert len(said.splitlines()) == 1
    assert not out.exists()


def test_help_keeps_its_lines():
    said = CliRunner().invoke(group.group, ["trace", "--help"]).output
    assert "\n    hijacklens trace --model smollm2-135m --case 42 --out runs/krakow\n" in said
