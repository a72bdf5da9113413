"""What every command has in common: one JSON document, quiet, colour, status, completion."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings

import pandas as pd
import pytest
from click import Context
from command_calls import CALLS, commands, make_places, run, words_of

from analyses.commands.group import group
from analyses.commands.screen import warnings_as_notes
from analyses.reproduction import check, reproduction
from hijacklens import progress
from hijacklens.plots import FigureWarning


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("screen"))


def test_every_command_has_a_call_here():
    assert {name for name, _ in commands()} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_json_is_one_document_with_the_keys_of_the_help(
    name, places, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HIJACKLENS_STORE", str(tmp_path / "store.sqlite"))
    (option,) = [p for n, c in commands() if n == name for p in c.params if p.name == "as_json"]
    promised = option.help.split("Its keys: ")[1].rstrip(".").split(", ")
    places = {**places, "o": tmp_path / "out", "h": tmp_path / "hijack"}
    if name in ("report", "compare", "show", "export"):
        assert run(*words_of("hijack", {**places, "o": places["h"]}), "--quiet") == 0
    capsys.readouterr()
    assert run(*words_of(name, places), "--json", "--quiet") == 0
    printed = capsys.readouterr()

    def strict(text):
        raise AssertionError(f"{text} is no JSON")

    found = json.loads(printed.out, parse_constant=strict)
    assert list(found) == promised == sorted(promised)
    assert printed.err == ""
    if "seed" in found:
        assert found["seed"] == 0


def test_the_document_has_the_numbers_of_the_table(places, tmp_path, capsys):
    call = words_of("hijack", {**places, "o": tmp_path / "out"})
    assert run(*call, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["dose"] for row in found["summary"]] == [0, 1]
    assert run(*call, "--overwrite") == 0
    printed = capsys.readouterr().out
    for row in found["summary"]:
        assert f"{row['efficacy']:.3f} [".removeprefix("0") in printed
    assert "seed 0" in printed


def test_a_list_that_is_quiet_gives_no_hints(capsys):
    for name in ("models", "schemes", "probes"):
        assert run(name) == 0
        whole = capsys.readouterr().out
        assert run(name, "--quiet") == 0
        assert len(capsys.readouterr().out) < len(whole)


def test_known_facts_are_counted_once_whatever_a_scheme_skips(places, tmp_path, capsys):
    """near-word has no word for some facts; they are known or not all the same."""
    model, facts = places["m"], places["f"]
    call = ["hijack", "--model", model, "--facts", facts, "--doses", "1", "--out", tmp_path / "out"]
    assert run(*call, "--scheme", "near-word", "--scheme", "think", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    counts = {row["scheme"]: row["n"] for row in found["summary"]}
    assert counts["near-word"] < counts["think"] == 10
    assert found["known"][0]["n"] == 10
    retention = next(row["retention"] for row in found["summary"] if row["scheme"] == "think")
    assert found["known"][0]["first"] == round(10 * retention)
    rules = pd.read_csv(tmp_path / "out" / "rules.csv")
    # Of all items, and not of the groups, which are of different sizes.
    weighted = (rules["any"] * rules["n"]).sum() / rules["n"].sum()
    assert found["disagreement"] == pytest.approx(weighted)


def test_a_failed_check_ends_with_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check.Check, "_holds", lambda self, found: False)
    assert run("reproduce", "lemma5", "--out", tmp_path, "--quiet") == 1
    assert "1 with a failed check" in capsys.readouterr().out


def test_ctrl_c_ends_with_status_130(tmp_path, capsys, monkeypatch):
    def stopped(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduction, "reproduce", stopped)
    assert run("reproduce", "lemma5", "--out", tmp_path) == 130
    assert "stopped" in capsys.readouterr().err


def test_the_help_says_what_each_status_means(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    for status in ("0 done", "1 a check failed", "2 bad input", "130 stopped"):
        assert status in said


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(("variable", "coloured"), [(None, True), ("1", False), ("", True)])
def test_colour_is_for_terminals_and_no_color_turns_it_off(
    variable, coloured, tmp_path, monkeypatch
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert run("reproduce", "lemma5", "--out", tmp_path, "--quiet") == 0
    assert ("\x1b[32mpass" in screen.getvalue()) is coloured
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    assert run("reproduce", "lemma5", "--out", tmp_path, "--quiet") == 0
    assert "pass" in pipe.getvalue() and "\x1b" not in pipe.getvalue()


def test_a_bar_is_drawn_where_somebody_is_watching(monkeypatch, capsys):
    for stream, quiet, drawn in (
        (Terminal(), False, True),
        (Terminal(), True, False),
        (io.StringIO(), False, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.bar(2, unit="facts", label="atlas", quiet=quiet) as shown:
            shown.update(2)
        assert ("2/2 facts" in stream.getvalue()) is drawn
    assert capsys.readouterr().out == ""


def test_a_bar_is_drawn_in_a_notebook(monkeypatch):
    class Shell:
        kernel = object()

    class IPython:
        @staticmethod
        def get_ipython():
            return Shell()

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "IPython", IPython)
    assert progress.watched()
    Shell.kernel = None
    assert not progress.watched()


def test_a_bar_that_nobody_watches_writes_a_line_now_and_then(capsys):
    with progress.bar(3, unit="facts", label="gpt2") as bar:
        assert bar.delay == bar.mininterval == 30
        bar.delay = bar.mininterval = bar.miniters = 0
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    with progress.bar(0.3, unit="facts", label="rounding") as bar:
        for _ in range(3):
            bar.update(0.1)  # 0.30000000000000004 in all
        assert bar.n == bar.total
    assert all(line.startswith("gpt2: ") and "3 facts" in line for line in lines)


COMPLETED = [
    ("hijacklens ", "hijack", 1),
    ("hijacklens hijack --model sm", "smollm2-135m", 3),
    ("hijacklens hijack --scheme do-not-think-o", "do-not-think-other", 3),
    ("hijacklens facts --relation P10", "P103", 3),
    ("hijacklens trace --probe kn", "knock-out:", 3),
    ("hijacklens probes kn", "knock-out", 2),
    ("hijacklens reproduce theorem", "theorem4", 2),
    ("hijacklens completion z", "zsh", 2),
]
ASK = """
import sys
from analyses.commands.group import main
try:
    main([])
except SystemExit:
    pass
heavy = {"torch", "pandas", "transformer_lens"} & set(sys.modules)
print("imported", sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(("typed", "offered", "place"), COMPLETED)
def test_the_shell_completes_names_without_torch(typed, offered, place):
    asked = {
        "_HIJACKLENS_COMPLETE": "bash_complete",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(place),
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, **asked}, capture_output=True, text=True
    )
    assert f"plain,{offered}" in done.stdout.splitlines()
    assert done.stderr.strip() == "imported []"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell(shell, capsys):
    assert run("completion", shell) == 0
    said = capsys.readouterr().out
    assert "_HIJACKLENS_COMPLETE" in said and "hijacklens" in said
    assert run("completion", "powershell") == 2
    assert "Allowed: bash, fish, zsh" in capsys.readouterr().err


def test_listing_analyses_imports_nothing_heavy():
    code = ASK.replace("main([])", "main(['reproduce', '--list'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "theorem1" in done.stdout
    assert done.stderr.strip() == "imported []"


def test_a_reader_that_stops_reading_is_no_error():
    code = "from analyses.commands.group import main; main(['schemes', '--relations'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as done:
        assert done.stdout is not None and done.stderr is not None
        done.stdout.close()
        assert b"Traceback" not in done.stderr.read()


@pytest.mark.parametrize("option", ["", "quiet", "as_json"])
def test_quiet_commands_do_not_speak_of_figures(option, capsys):
    with warnings_as_notes(), Context(group) as context:
        context.params[option] = True
        warnings.warn("some letters are boxes", FigureWarning, stacklevel=1)
    assert capsys.readouterr().err == ("" if option else "note: some letters are boxes\n")


def test_plan_says_how_many_facts_find_a_change(capsys):
    assert run("plan", "--power", "--change", "0.1", "--icc", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] is None
    assert found["power"]["facts"] > 100 and len(found["power"]["relations"]) == 4
    assert run("plan", "--power", "--change", "2") == 2
    assert "change is 2.0" in capsys.readouterr().err
    assert run("plan", "--doses", "1") == 2
    assert "--tokenizer, or --power" in capsys.readouterr().err
