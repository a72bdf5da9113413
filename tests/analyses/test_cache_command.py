"""`hijacklens cache`, `--no-cache`, and commands that are cut short and started again."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

from analyses.commands.group import main
from hijacklens.results.result import load_result
from hijacklens.scoring import execution, generation
from hijacklens.store.contents import Store
from hijacklens.store.store import OpenStore


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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The store of these tests: the usual one in a cache folder of their own."""
    monkeypatch.setenv("HIJACKLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HIJACKLENS_STORE")
    return tmp_path / "cache" / "readings-v3.sqlite"


def run(*arguments):
    """Exit status of a command line; 0 where it just returns."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def command(folders, out, *more, models=("gpt2",)):
    named = [word for model in models for word in ("--model", folders / f"tiny-{model}")]
    facts = ["--facts", folders / "facts.jsonl", "--doses", "0-1", "--quiet"]
    return ["hijack", *named, *facts, "--out", out, *more]


def test_info_and_clear(folders, cache, tmp_path, capsys, monkeypatch):
    assert run("cache", "info") == 0
    assert "no readings are stored" in capsys.readouterr().out
    assert run("cache", "clear") == 0
    assert capsys.readouterr().out == "no readings are stored\n"
    assert not cache.exists()

    assert run(*command(folders, tmp_path / "a", models=("gpt2", "llama"))) == 0
    assert "came from the store" not in capsys.readouterr().out
    assert run("cache", "info") == 0
    printed = capsys.readouterr().out
    gpt2, llama = (Store(cache).count(model=f"tiny-{name}") for name in ("gpt2", "llama"))
    size = cache.stat().st_size
    assert 8_000 < size < 100_000
    assert f"{cache}  ({size / 1024:.0f} KiB)" in printed
    assert f"tiny-gpt2   float32     none    {gpt2:>8}" in printed
    assert f"tiny-llama  float32     none    {llama:>8}" in printed

    monkeypatch.setattr("click.confirm", lambda question: asked.append(question))
    asked = []
    assert run("cache", "clear", "--model", "tiny-gpt2") == 0
    assert asked == [f"Delete {gpt2} readings of tiny-gpt2 from {cache}?"]
    assert capsys.readouterr().out == "nothing was deleted\n"
    assert run("cache", "clear", "--model", "tiny-gpt2", "--yes") == 0
    assert capsys.readouterr().out == f"deleted {gpt2} readings of tiny-gpt2 from {cache}\n"
    assert [row.model for row in Store(cache).contents().rows] == ["tiny-llama"]
    assert run("cache", "clear", "--model", "tiny-gpt") == 2
    assert "unknown model in the store 'tiny-gpt'. Allowed: tiny-llama." in capsys.readouterr().err
    assert run("cache", "clear", "--yes") == 0
    assert Store(cache).count() == 0
    assert len(asked) == 1


def test_no_cache_and_what_came_from_the_store(folders, cache, tmp_path, capsys):
    assert run(*command(folders, tmp_path / "a", "--no-cache")) == 0
    assert not cache.exists()
    assert run(*command(folders, tmp_path / "b")) == 0
    n = Store(cache).count()
    capsys.readouterr()
    assert run(*command(folders, tmp_path / "c")) == 0
    printed = capsys.readouterr().out
    assert f"tiny-gpt2: {n} readings came from the store, 0 were computed" in printed
    assert run(*command(folders, tmp_path / "d", "--no-cache")) == 0
    assert "came from the store" not in capsys.readouterr().out
    results = [load_result(tmp_path / name) for name in "abcd"]
    for result in results[1:]:
        pd.testing.assert_frame_equal(result.items, results[0].items)
        assert result.full_summary.equals(results[0].full_summary)
    counted = [result.settings.models[0].readings for result in results]
    assert [count.from_store for count in counted] == [0, 0, n, 0]
    assert [count.computed for count in counted] == [n, n, 0, n]


def interrupted_in_call(number, monkeypatch):
    """Ctrl-C after the first batch of a call of the engine that has readings; a trunk has none."""
    real, calls = execution.read, []

    def read(model, requests, options, finished):
        calls.append(1)

        def keep_and_stop(readings, fraction):
            finished(readings, fraction)
            if readings and len(calls) == number:
                raise KeyboardInterrupt

        return real(model, requests, options, keep_and_stop)

    monkeypatch.setattr(execution, "read", read)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    folders, cache, tmp_path, capsys, monkeypatch
):
    words = command(folders, tmp_path / "out", "--batch-tokens", "40", models=("gpt2", "llama"))
    interrupted_in_call(2, monkeypatch)
    assert run(*words) == 130
    printed = capsys.readouterr()
    assert printed.err.split("\n") == [
        "note: finished readings are kept; the same command resumes from there.",
        "",  # after the ^C of a terminal
        "hijacklens: stopped.",
        "",
    ]
    part = load_result(tmp_path / "out")
    assert set(part.items["model"]) == {"tiny-gpt2"}
    assert part.settings.unfinished["missing"] == [str(folders / "tiny-llama")]
    done = Store(cache).count(model="tiny-llama")
    assert done > 0
    monkeypatch.undo()

    monkeypatch.setenv("HIJACKLENS_CACHE", str(cache.parent))
    monkeypatch.delenv("HIJACKLENS_STORE")
    others = command(folders, tmp_path / "out", models=("gpt2",))
    assert run(*others) == 2  # the part is not overwritten by another run
    assert "already contains a result" in capsys.readouterr().err
    assert run(*words) == 0
    whole = load_result(tmp_path / "out")
    first, second = (model.readings for model in whole.settings.models)
    assert first.computed == 0
    assert second.from_store == done
    assert whole.settings.unfinished is None
    assert run(*command(folders, tmp_path / "new", "--no-cache", models=("gpt2", "llama"))) == 0
    anew = load_result(tmp_path / "new")
    pd.testing.assert_frame_equal(whole.items, anew.items, atol=1e-5, rtol=0)
    pd.testing.assert_frame_equal(whole.full_summary, anew.full_summary, atol=1e-5, rtol=0)
    assert run(*words) == 2  # and now it is whole
    assert "already contains a result" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [("--limit", "3"), ("--seed", "1"), ("--scheme", "think"), ("--doses", "0-2")]
)
def test_an_unfinished_run_is_resumed_by_the_same_settings_only(
    other, folders, cache, tmp_path, capsys, monkeypatch
):
    out, models = tmp_path / "out", ("gpt2", "llama")
    with monkeypatch.context() as patch:
        interrupted_in_call(2, patch)
        assert run(*command(folders, out, models=models)) == 130
    before = (out / "result.json").read_bytes()
    assert run(*command(folders, out, *other, models=models)) == 2
    assert "already contains a result" in capsys.readouterr().err
    assert (out / "result.json").read_bytes() == before


def meanwhile(work, monkeypatch):
    """Do something at the end of the next reading of a run."""
    real = execution.read

    def read(*given):
        readings = real(*given)
        monkeypatch.undo()
        work()
        return readings

    monkeypatch.setattr(execution, "read", read)


@pytest.mark.parametrize("models", [("gpt2",), ("gpt2", "llama")])
def test_a_result_that_came_while_a_command_ran_is_not_replaced(
    models, folders, tmp_path, capsys, monkeypatch
):
    variables = {"HIJACKLENS_STORE": str(tmp_path / "store.sqlite")}
    monkeypatch.setattr(os, "environ", {**os.environ, **variables})
    out = tmp_path / "out"
    others = command(folders, out, "--scheme", "think", models=models[:1])
    with monkeypatch.context() as patch:
        meanwhile(lambda: run(*others), patch)
        assert run(*command(folders, out, models=models)) == 2
    told = capsys.readouterr().err
    assert "already contains a result" in told
    assert "Readings are stored: with another --out it finishes soon" in told
    assert load_result(out).settings.schemes[0].name == "think"
    assert run(*command(folders, tmp_path / "b", models=models[:1])) == 0
    assert load_result(tmp_path / "b").settings.models[0].readings.computed == 0


def test_interrupted_answers_go_on(folders, cache, tmp_path, capsys, monkeypatch):
    """The result is whole when its answers are; until then the same command may write again."""
    words = command(folders, tmp_path / "out", "--generate", "--answer-tokens", "2")
    real = generation.answers

    def stopped(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "answers", stopped)
    assert run(*words) == 130
    assert "the same command resumes from there" in capsys.readouterr().err
    monkeypatch.setattr(generation, "answers", real)
    assert load_result(tmp_path / "out").settings.unfinished["missing"] == []
    assert run(*words) == 0
    assert load_result(tmp_path / "out").settings.unfinished is None
    assert load_result(tmp_path / "out").settings.models[0].readings.computed == 0
    assert len(load_result(tmp_path / "out" / "answers").to_dataframe())
    assert run(*words) == 2


def test_another_result_takes_the_answers_away(folders, cache, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*command(folders, out, "--generate", "--answer-tokens", "2")) == 0
    assert "answers/, result.json" in capsys.readouterr().out
    assert run(*command(folders, out, "--overwrite", models=("llama",))) == 0
    assert load_result(out).settings.title == "tiny-llama"
    assert not (out / "answers").exists()


def test_ctrl_c_after_the_store_failed_promises_nothing(
    folders, cache, tmp_path, capsys, monkeypatch
):
    def full(*given):
        raise sqlite3.OperationalError("disk is full")

    monkeypatch.setattr(OpenStore, "_write", full)
    interrupted_in_call(1, monkeypatch)
    assert run(*command(folders, tmp_path / "out")) == 130
    told = capsys.readouterr().err
    assert "cannot be used (disk is full)" in told
    assert "note: the same command computes again what the store lacks." in told
    assert "are kept" not in told


def test_ctrl_c_without_a_store_says_so(folders, cache, tmp_path, capsys, monkeypatch):
    interrupted_in_call(1, monkeypatch)
    assert run(*command(folders, tmp_path / "out", "--no-cache")) == 130
    assert (
        "note: there is no store, so the same command starts from scratch."
        in capsys.readouterr().err
    )


def test_a_broken_store_is_told_in_one_line(folders, cache, tmp_path, capsys):
    cache.parent.mkdir()
    cache.write_bytes(b"this is no database")
    assert run("cache", "info") == 0
    printed = capsys.readouterr()
    assert "readings-v3.sqlite.aside-1" in printed.out
    (told,) = printed.err.splitlines()
    assert "file is not a database" in told
    cache.write_bytes(b"nor is this")
    assert run(*command(folders, tmp_path / "out")) == 0
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"note: the store of finished readings '{cache}' is broken")
    assert "set aside as 'readings-v3.sqlite.aside-2'" in told
    assert cache.with_name(cache.name + ".aside-2").read_bytes() == b"nor is this"
    assert run("cache", "info") == 0
    assert capsys.readouterr().out.count("set aside as broken: ") == 2


def test_a_full_disk_at_the_end_is_one_line(folders, cache, tmp_path, capsys, monkeypatch):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    assert run(*command(folders, tmp_path / "out")) == 1
    printed = capsys.readouterr().err
    assert "items.parquet': No space left on device. Make room there" in printed
    assert "the same command resumes from there" in printed
    monkeypatch.undo()
    monkeypatch.setenv("HIJACKLENS_CACHE", str(cache.parent))
    monkeypatch.delenv("HIJACKLENS_STORE")
    assert run(*command(folders, tmp_path / "out")) == 0
    record = load_result(tmp_path / "out").settings.models[0]
    assert record.readings.computed == 0


SLOWLY = """
import time
from hijacklens.store.store import OpenStore
keep = OpenStore.keep
def keep_slowly(self, readings):
    keep(self, readings)
    time.sleep(0.05)
OpenStore.keep = keep_slowly
"""
"""Gives a signal the time to come before a tiny model is done."""


def shell(words, cache, prelude=""):
    """The command line in a process of its own."""
    threads = "import torch; torch.set_num_threads(1)"
    code = f"{threads}; {prelude}\nfrom analyses.commands.group import main; main()"
    environment = {
        **os.environ,
        "HIJACKLENS_STORE": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def readings_in(cache):
    return Store(cache).count() if cache.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_gets_a_signal_goes_on(folders, cache, tmp_path, which, capsys):
    words = command(
        folders, tmp_path / "out", "--batch-tokens", "1", "--scheme", "think", "--doses", "0-12"
    )
    child = shell(words, cache, SLOWLY)
    while readings_in(cache) < 20:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(which)
    told = child.communicate(timeout=120)[1]
    assert child.returncode == (130 if which == signal.SIGINT else -which)
    if which == signal.SIGINT:
        assert "the same command resumes from there" in told
        assert "Traceback" not in told
    done = readings_in(cache)
    child = shell(words, cache)
    told = child.communicate(timeout=120)[1]
    assert child.returncode == 0, told
    assert told == ""
    result = load_result(tmp_path / "out")
    count = result.settings.models[0].readings
    assert count.from_store == done
    assert count.computed > 0
    assert run(*words, "--no-cache", "--out", tmp_path / "b") == 0
    anew = load_result(tmp_path / "b")
    pd.testing.assert_frame_equal(result.items, anew.items, atol=1e-5, rtol=0)
    pd.testing.assert_frame_equal(result.full_summary, anew.full_summary, atol=1e-5, rtol=0)
