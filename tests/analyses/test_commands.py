"""The command line as a user meets it: output, files, exit status, errors without traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
from click import Context
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from analyses.commands.group import COMMANDS, group, main
from analyses.commands.one_fact import WrittenFact
from analyses.commands.options import read_template
from analyses.texts import read_doses
from hijacklens.errors import InputError
from hijacklens.results.result import load_result
from hijacklens.scoring.efficacy import SUMMARY_COLUMNS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny models saved as folders, and a facts file."""
    root = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama"):
        tiny_model(family).save_pretrained(root / f"tiny-{family}")
        tiny_tokenizer(family).save_pretrained(root / f"tiny-{family}")
    table = sample_facts().to_dataframe().drop(columns="prompt")
    table.to_json(root / "facts.jsonl", orient="records", lines=True)
    return root


def run(*arguments):
    """Exit status of a command line; 0 where it just returns."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def test_without_out_every_run_gets_a_folder_of_its_own(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["hijack", "--model", folders / "tiny-gpt2", "--facts", folders / "facts.jsonl"]
    command += ["--doses", "0", "--quiet"]
    for more in ([], [], ["--overwrite"]):
        assert run(*command, *more) == 0
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert first.endswith("-tiny-gpt2")
    assert second == f"{first}-2"
    assert run(*command, "--dtype", "bfloat16", "--probe", "knock-out:source=last,target=at:0") == 0
    assert (tmp_path / "runs" / f"{first}-bfloat16-knock-out").exists()
    assert capsys.readouterr().out.count(f"written to runs/{first}/") == 2


def test_hijack_writes_the_files_of_the_design(folders, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["hijack", "--model", folders / "tiny-gpt2", "--model", folders / "tiny-llama"]
    command += ["--facts", folders / "facts.jsonl", "--doses", "0-2", "--out", out, "--quiet"]
    command += ["--scheme", "do-not-think", "--template", "never-say=Never say {target_false}."]
    assert run(*command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(
        "tiny-gpt2, tiny-llama · facts.jsonl, 10 facts · do-not-think, never-say · rule first\n"
    )
    assert (
        len(re.findall(r"^tiny-(gpt2|llama) +(do-not|never).* +10 +[0-2] ", printed.out, re.M))
        == 12
    )
    assert f"written to {out}/" in printed.out
    assert printed.err == ""
    assert {path.name for path in out.iterdir()} == {
        "items.parquet",
        "prompts.parquet",
        "summary.csv",
        "rules.csv",
        "skipped.csv",
        "result.json",
        "curve.svg",
        "curve.png",
    }
    assert len(pd.read_parquet(out / "items.parquet")) == 2 * 10 * 2 * 3
    summary = pd.read_csv(out / "summary.csv")
    assert tuple(summary.columns) == SUMMARY_COLUMNS
    record = json.loads((out / "result.json").read_text())
    assert [model["name"] for model in record["settings"]["models"]] == ["tiny-gpt2", "tiny-llama"]
    assert record["settings"]["doses"] == [0, 1, 2]
    assert record["provenance"]["versions"]["torch"]
    assert load_result(out).summary()["n"].tolist() == [10] * 12

    assert run(*command) == 2  # a finished result is not overwritten in silence
    assert "already contains a result" in capsys.readouterr().err
    assert run(*command, "--overwrite") == 0


def test_progress_goes_to_standard_error(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hijacklens.progress.watched", lambda: True)
    out = tmp_path / "out"
    command = ["hijack", "--model", folders / "tiny-gpt2", "--limit", "3", "--out", out]
    assert run(*command, "--facts", folders / "facts.jsonl", "--doses", "1") == 0
    printed = capsys.readouterr()
    assert "facts" in printed.err
    assert "3/3" in printed.err
    assert "\r" not in printed.out


def test_relation_and_case_filters(folders, tmp_path):
    common = ["hijack", "--model", folders / "tiny-gpt2", "--facts", folders / "facts.jsonl"]
    common += ["--doses", "1", "--quiet"]
    assert run(*common, "--relation", "P190", "--relation", "P36", "--out", tmp_path / "a") == 0
    assert set(load_result(tmp_path / "a").items["relation_id"]) == {"P190", "P36"}
    assert run(*common, "--case", "3", "--case", "7", "--out", tmp_path / "b") == 0
    assert set(load_result(tmp_path / "b").items["case_id"]) == {3, 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["hijack", "--model", "{gpt2}", "--scheme", "do-not-thinc"],
            "did you mean 'do-not-think'",
        ),
        (["hijack", "--model", "{gpt2}", "--doses", "5-0"], "neither a number nor a rising range"),
        (
            ["ask", "--model", "{gpt2}", "It is in", "--true", "A", "--false", " a"],
            "--true 'A' and --false ' a' name one thing",
        ),
        (["hijack", "--model", "{gpt2}", "--facts", "nope.json"], "does not exist"),
        (
            ["hijack", "--model", "{gpt2}", "--relation", "P9999"],
            "unknown relation in atlas 'P9999'",
        ),
        (["hijack", "--model", "{gpt2}", "--case", "-4"], "atlas has no case -4"),
        (
            ["hijack", "--model", "{gpt2}", "--limit", "0"],
            "--limit is 0; give a whole number of at least 1",
        ),
        (["hijack", "--model", "{gpt2}", "--dtype", "float8"], "unknown --dtype 'float8'"),
        (["hijack", "--model", "{gpt2}", "--device", "cuda:9"], "'cuda:9' does not exist"),
        (["hijack", "--model", "{gpt2}", "--template", "x"], "has no name"),
        (["hijack", "--model", "{gpt2}", "--template", "think=No."], "'think' exists"),
        (["hijack", "--model", "{gpt2}", "--template", "x=Say {foo}."], "{foo}"),
        (["hijack", "--model", "./no/such/folder"], "does not exist"),
        (["hijack", "--model", "no-such-model-anywhere"], "cannot load the model"),
        (["hijack", "--modle", "x"], "No such option"),
        (["hijack"], "Missing option '--model'"),
        (["hijak"], "did you mean 'hijack'"),
        (["ask", "Rome is", "--model", "{gpt2}", "--scheme", "think"], "needs --false"),
        (["ask", "", "--model", "{gpt2}"], "the prompt is empty"),
        (["ask", "Rome is", "--model", "{gpt2}", "--tokens", "500"], "context window"),
        (["facts", "--relation", "P1"], "unknown relation in atlas"),
        (
            ["trace", "--model", "{gpt2}", "--case", "1", "--top", "0"],
            "--top is 0; give a whole number of at least 1",
        ),
        (["trace", "--model", "{gpt2}", "--case", "1", "--out", ""], "--out is empty"),
        (["sweep", "", "--out", "x"], "config is empty"),
        (["ask", "caf\udce9 is in", "--model", "{gpt2}"], "'caf\\udce9 is in', which is not UTF-8"),
        (["facts", "--facts", "caf\udce9.json"], "which is not UTF-8"),
        (["ask", "It is", "--model", "{gpt2}", "--sentence", "caf\udce9."], "which is not UTF-8"),
        (["hijack", "--model", "{gpt2}", "--doses", "caf\udce9"], "which is not UTF-8"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, folders, tmp_path, capsys):
    words = [word.replace("{gpt2}", str(folders / "tiny-gpt2")) for word in arguments]
    if words[0] == "hijack" and len(words) > 1:
        words += ["--out", str(tmp_path / "out")]
    assert run(*words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()  # nothing is left of a command that did not run


def test_interrupt_ends_with_status_130_and_keeps_what_is_done(folders, tmp_path, monkeypatch):
    from hijacklens.scoring import execution

    real, calls = execution.read, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(execution, "read", interrupted)
    command = ["hijack", "--model", folders / "tiny-gpt2", "--model", folders / "tiny-llama"]
    command += ["--facts", folders / "facts.jsonl", "--doses", "1", "--quiet"]
    assert run(*command, "--out", tmp_path / "out") == 130
    assert set(load_result(tmp_path / "out").items["model"]) == {"tiny-gpt2"}


def test_ask_shows_bare_and_hijacked_side_by_side(folders, capsys):
    command = ["ask", "The Eiffel Tower is in the city of", "--model", folders / "tiny-gpt2"]
    command += ["--true", "Paris", "--false", "Guam", "--tokens", "4", "--top", "3"]
    assert run(*command, "--scheme", "do-not-think", "--dose", "2") == 0
    printed = capsys.readouterr().out
    assert "Do not think of Guam. Do not think of Guam. The Eiffel Tower is in" in printed
    assert "' Paris' (rank" in printed
    assert printed.count("->") == 2
    bare, hijacked, shift = map(float, re.findall(r"[-+]\d+\.\d\d", printed.splitlines()[-1]))
    assert shift == pytest.approx(hijacked - bare, abs=0.011)
    assert run(*command) == 0
    alone = capsys.readouterr().out
    assert alone.count("->") == 1
    assert alone.splitlines()[-1] == f"  false - true, nats (rule first): bare {bare:+.2f}"


def test_ask_takes_relation_near_word_and_own_sentences(folders, capsys):
    base = ["ask", "The mother tongue of Danielle Darrieux is", "--model", folders / "tiny-llama"]
    base += ["--tokens", "2", "--top", "1", "--subject", "Danielle Darrieux"]
    base += ["--true", "French", "--false", "English"]
    cases = {
        ("--scheme", "relation", "--relation", "P103"): "Danielle Darrieux cannot speak English.",
        ("--scheme", "near-word"): "Do not think of England.",
        ("--sentence", "She never spoke it."): "She never spoke it.",
    }
    for options, sentence in cases.items():
        assert run(*base, *options) == 0
        assert f"{sentence} The mother tongue of" in capsys.readouterr().out
    assert run(*base, "--scheme", "relation") == 2
    assert "has no sentence for relation (none)" in capsys.readouterr().err


def test_lists(capsys):
    assert run("models") == 0
    assert "smollm2-135m" in capsys.readouterr().out
    assert run("schemes", "--relations") == 0
    printed = capsys.readouterr().out
    assert "Do not think of {target_false}." in printed
    assert "The twin city of {subject} is not {target_false}." in printed
    assert run("facts") == 0
    assert "twin city" in capsys.readouterr().out
    assert run("facts", "--relation", "P36", "--limit", "2", "--show") == 0
    assert capsys.readouterr().out.count("P36") == 2


def test_every_command_has_help_worth_reading(capsys):
    for name in COMMANDS:
        assert run(name, "--help") == 0
        text = capsys.readouterr().out
        assert len(text.splitlines()) > 5
        # Every option says what it does.
        options = group.get_command(Context(group), name).params
        assert all(option.help for option in options if option.param_type_name == "option")


def test_help_imports_no_torch():
    code = (
        "import sys; from analyses.commands.group import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'transformer_lens' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("text", "doses"),
    [("0-5", (0, 1, 2, 3, 4, 5)), ("3", (3,)), ("5,1,1", (1, 5)), (" 0-1 , 4-5 ", (0, 1, 4, 5))],
)
def test_doses(text, doses):
    assert read_doses(text) == doses


@pytest.mark.parametrize("text", ["", "-1", "a", "1-", "1..3", "0-99999", "3-1", "1.5"])
def test_bad_doses(text):
    with pytest.raises(InputError, match="--doses"):
        read_doses(text)


@pytest.mark.parametrize("text", ["99999", "0-10000", "1,99999-100000"])
def test_too_many_sentences_are_refused_as_python_does(text):
    with pytest.raises(InputError, match=r"--doses '.*': a dose, which .* and at most 9999\."):
        read_doses(text)
    assert read_doses("9999") == (9999,)


def test_template_option():
    assert read_template("a=b=c {target_false}") == ("a", "b=c {target_false}")
    assert read_template("a = as written ") == ("a", " as written ")
    with pytest.raises(InputError, match="has no name"):
        read_template("Never say {target_false}.")


def test_a_written_fact_says_what_was_dropped():
    for true, note in (("Paris ", "white space"), (" Paris", ""), ("Paris", "")):
        facts = WrittenFact(target_true=true, target_false="Rome").facts("It is in")
        assert facts[0].target_true == "Paris"
        assert (note in facts.note) and bool(facts.note) == bool(note)


def test_old_names_work_with_a_note(folders, capsys):
    base = ["plan", "--model", folders / "tiny-gpt2", "--facts", folders / "facts.jsonl"]
    for words in (["--way", "plain"], ["--way=plain"], ["--sharing", "plain"]):
        assert run(*base, *words) == 0
        printed = capsys.readouterr()
        assert "plain, as" in printed.out
        note = "note: --way is now called --sharing; the next release drops the old name.\n"
        assert printed.err == (note if "--way" in words[0] else "")
    assert run("plan", "--help") == 0
    assert "--way" not in capsys.readouterr().out
    ask = ["ask", "Rome is", "--model", folders / "tiny-gpt2", "--tokens", "1", "--top", "1"]
    assert run(*ask, "--probe", "knock-out:from=last,to=at:0") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "from is now called source" in notes[0]


def test_output_that_a_terminal_cannot_encode_is_escaped(folders):
    """Windows encodes redirected output in cp1252."""
    facts = ["facts", "--facts", str(folders / "facts.jsonl"), "--show"]

    def printed(*options):
        code = "import sys; from analyses.commands.group import main; main(sys.argv[1:])"
        return subprocess.run(
            [sys.executable, "-c", code, *facts, *options],
            env={**os.environ, "PYTHONIOENCODING": "cp1252"},
            capture_output=True,
            check=True,
        ).stdout.decode("cp1252")

    assert "\\u5317\\u4eac" in printed()
    document = json.loads(printed("--json"))
    assert "北京" in {fact["subject"] for fact in document["facts"]}
