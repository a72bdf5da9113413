"""Ctrl-C and kills: finished work stays, files are complete or absent, the next run resumes."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from campaign import LONG, holds, tally
from forked import FORK, kill, start
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer

import hijacklens as hl
from analyses.commands.group import main
from analyses.reproduction import reproduction
from analyses.reproduction.analysis import analyses
from hijacklens.errors import InputError
from hijacklens.files import RECORD
from hijacklens.one_layer.checkpoint import FILE
from hijacklens.results.result import FILES, load_result
from hijacklens.store.store import OpenStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama"):
        tiny_model(family).save_pretrained(root / f"tiny-{family}")
        tiny_tokenizer(family).save_pretrained(root / f"tiny-{family}")
    table = sample_facts().to_dataframe().drop(columns="prompt")
    table.to_json(root / "facts.jsonl", orient="records", lines=True)
    return root


def command(arguments: list[str], errors: Path):
    """A child that runs a command line; its status is that of the command."""

    def run() -> None:
        status: object = 0
        sys.stderr = errors.open("w")
        sys.stdout = io.StringIO()
        try:
            main(arguments)
        except SystemExit as stop:
            status = stop.code
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)

    child = FORK.Process(target=run)
    child.start()
    return child


def interrupted(arguments: list[str], mark: Path, errors: Path) -> str:
    """Send Ctrl-C to a command once a file exists; return its standard error."""
    child = command(arguments, errors)
    until = time.monotonic() + 60
    while not mark.exists() and child.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert mark.exists(), errors.read_text()
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode == 130, (child.exitcode, errors.read_text())
    text = errors.read_text()
    assert "Traceback" not in text
    assert text.splitlines()[-1] == "hijacklens: stopped."
    assert len(text.splitlines()) <= 3, text
    tally("Ctrl-C", "status 130")
    return text


def test_hijack_keeps_its_readings(folder, tmp_path, monkeypatch):
    mark, out = tmp_path / "mark", tmp_path / "out"
    monkeypatch.setenv("HIJACKLENS_STORE", str(tmp_path / "store.sqlite"))
    line = ["hijack", "--model", str(folder / "tiny-gpt2"), "--quiet", "--batch-tokens", "64"]
    line += ["--facts", str(folder / "facts.jsonl"), "--doses", "0-1", "--out", str(out)]
    keep = OpenStore.keep

    def slow(self: OpenStore, readings: object) -> None:
        keep(self, readings)  # pyright: ignore[reportArgumentType]
        if readings:  # a batch of what others begin with reads nothing
            mark.touch()
        time.sleep(0.2)

    with monkeypatch.context() as patch:
        patch.setattr(OpenStore, "keep", slow)
        text = interrupted(line, mark, tmp_path / "errors")
    assert "the same command resumes from there" in text
    assert not (out / RECORD).exists()
    main(line)
    found = load_result(out)
    assert isinstance(found, hl.HijackResult)
    (model,) = found.settings.models
    assert model.readings.from_store > 0
    assert model.readings.computed > 0
    monkeypatch.setenv("HIJACKLENS_STORE", "off")
    main([*line[:-1], str(tmp_path / "unbroken")])
    unbroken = load_result(tmp_path / "unbroken").to_dataframe()
    pd.testing.assert_frame_equal(found.to_dataframe(), unbroken, rtol=0, atol=1e-4)


def test_training_goes_on_from_its_state(tmp_path):
    out = tmp_path / "out"
    line = words_of(
        "train --bits 2 --d-model 2 --length 4 --seeds 1 --lr 0.1 --batch 2 --evaluation 4"
    )
    line += ["--steps", "3200", "--checkpoint-seconds", "0", "--quiet", "--out", str(out)]
    interrupted(line, out / FILE, tmp_path / "errors")
    assert (out / FILE).exists()
    assert not (out / RECORD).exists()
    main(line)
    assert load_result(out).to_dataframe()["accuracy"].notna().all()
    assert not (out / FILE).exists()


@pytest.mark.slow
def test_reproducing_keeps_what_is_done(tmp_path, monkeypatch):
    mark, out = tmp_path / "mark", tmp_path / "out"
    second = next(name for name in analyses() if name != "lemma5")
    real = reproduction.reproduce

    def slow(name: str, **options: object):
        if name == second:
            mark.touch()
            time.sleep(60)
        return real(name, **options)  # pyright: ignore[reportArgumentType]

    line = ["reproduce", "lemma5", second, "--out", str(out), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(reproduction, "reproduce", slow)
        interrupted(line, mark, tmp_path / "errors")
    before = (out / "lemma5" / RECORD).read_bytes()
    assert load_result(out / "lemma5").to_dataframe() is not None
    main(["reproduce", "lemma5", "--out", str(out), "--quiet"])
    assert (out / "lemma5" / RECORD).read_bytes() == before  # it was not run again


def words_of(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_kill_while_saving_leaves_a_whole_result_or_none(kills, tmp_path, monkeypatch):
    monkeypatch.setattr(hl.HijackResult, "figures", {})  # drawing them takes most of the time
    facts = sample_facts().where(case_ids=[0, 3])
    model = hl.load_model(tiny_model("gpt2"), tokenizer=tiny_tokenizer("gpt2"))
    execution = hl.Execution(store=False)
    one, two = (
        hl.hijack(model, facts, doses=range(n), execution=execution, quiet=True) for n in (2, 3)
    )
    draw, out = random.Random(0), tmp_path / "out"
    one.save(out)
    began = time.monotonic()
    two.save(out, overwrite=True)
    seconds = time.monotonic() - began

    def save_over_and_over() -> None:
        while True:
            for result in (one, two):
                result.save(out, overwrite=True)

    for _ in range(200 if LONG else kills):
        assert kill(start(save_over_and_over), after=draw.uniform(0, 3 * seconds))
        if not (out / RECORD).exists():
            with pytest.raises(InputError, match="cut short"):
                load_result(out)
            tally("kills while saving", "no result")
            continue
        record = json.loads((out / RECORD).read_text())
        assert all((out / name).exists() for name in record[FILES])
        expected = {str([0, 1]): one, str([0, 1, 2]): two}[str(record["settings"]["doses"])]
        pd.testing.assert_frame_equal(load_result(out).to_dataframe(), expected.items)
        tally("kills while saving", "whole")
    # The next save removes the rest of a killed run.
    one.save(out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {RECORD, *one.files()}


def test_a_result_of_another_kind_leaves_nothing_behind(tmp_path):
    task = hl.ConceptTask(bits=2, length=4)
    options = {"d_model": 2, "seeds": 1, "steps": 1, "batch": 2, "evaluation": 4, "quiet": True}
    trained = hl.train(task, learning_rates=(0.1, 0.2), **options)
    mine = tmp_path / "out" / "mine.txt"
    trained.save(tmp_path / "out")
    mine.write_text("not of the result")
    reproduction.reproduce("lemma5").save(tmp_path / "out", overwrite=True)
    kept = {"result.json", "table.csv", "figure.svg", "figure.png", "mine.txt"}
    assert {path.name for path in (tmp_path / "out").rglob("*")} == kept
    hl.train(task, learning_rates=(0.1,), out=tmp_path / "out", overwrite=True, **options)
    assert not (tmp_path / "out" / "table.csv").exists()
    assert mine.exists()


@pytest.mark.parametrize("name", ["../mine.txt", "{root}/mine.txt", "a/../../mine.txt", "link/x"])
def test_a_record_removes_nothing_outside_its_folder(name, tmp_path, monkeypatch):
    out, mine = tmp_path / "out", tmp_path / "mine.txt"
    mine.write_text("mine")
    monkeypatch.setattr(reproduction.Reproduction, "figures", {})  # they take seconds
    result = reproduction.reproduce("lemma5")
    result.save(out)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("mine")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    (out / "a").mkdir()
    record = json.loads((out / RECORD).read_text())
    record[FILES] = [name.format(root=tmp_path), 3, None, "", "\0", "..", ["x"], "a"]
    (out / RECORD).write_text(json.dumps(record))
    result.save(out, overwrite=True)
    assert mine.exists()
    assert (tmp_path / "elsewhere" / "x").exists()
    assert holds("results: removal", lambda: load_result(out)) == "works"
