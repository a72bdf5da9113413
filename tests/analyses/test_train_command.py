"""`hijacklens train`: its table and files, its refusals, and a run that is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from analyses.commands import group
from hijacklens.one_layer.checkpoint import FILE
from hijacklens.results.result import load_result

COLUMNS = "seed,lr,accuracy,accuracy_low,accuracy_high,bayes_accuracy,constructed_accuracy,loss"
QUICK = "train --bits 3 --length 32 --d-model 8 --steps 130 --batch 16 --evaluation 500 --quiet"


def call(text: str, out: Path) -> None:
    group.main([*text.split(), "--out", str(out)])


def test_it_prints_a_table_and_writes_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    call(f"{QUICK} --omega 0.5 --beta 1 --support all --seeds 2 --lr 0.05,0.01 --freeze wv", out)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("m = 3, ") and "W_V frozen · seeds 0, 1, " in lines[0]
    assert lines[1].split() == ["lr", "seed", "accuracy", "Bayes", "eq.", "5.1", "loss", "(nats)"]
    assert [line.split()[:2] for line in lines[2:6]] == [
        ["0.05", "0"], ["0.05", "1"], ["0.01", "0"], ["0.01", "1"],
    ]  # fmt: skip
    assert lines[7].startswith("best learning rate, by mean accuracy over the seeds: 0.0")
    assert lines[8].startswith(f"written to {out}/")
    text = (out / "summary.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    assert len(text.splitlines()) == 5
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {"result.json", "curves.csv", "curve.svg", "curve.png"} <= files
    assert "models/seed1-lr0.05/model.safetensors" in files
    assert FILE not in files
    result = load_result(out)
    recipe = result.configuration()["recipe"]
    assert recipe["freeze"] == ["W_V"]
    assert (recipe["d_model"], recipe["steps"], recipe["batch"]) == (8, 130, 16)


def test_the_printed_accuracy_is_that_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(f"{QUICK} --seeds 1 --lr 0.05", tmp_path)
    row = capsys.readouterr().out.splitlines()[2]
    accuracy = pd.read_csv(tmp_path / "summary.csv")["accuracy"][0]
    assert f" {accuracy:.3f}".replace(" 0.", " .") in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bits 3 --freeze wx", "unknown part to freeze 'wx'"),
        ("--bits 3 --lr fast", "--lr is 'fast'"),
        ("--bits 3 --lr 0.1,-1", "lr is -1.0"),
        ("--bits 3 --seeds 0", "seeds is 0"),
        ("--bits 0", "bits is 0; give a whole number of at least 1"),
        ("--bits 3 --support near", "unknown --support 'near'"),
        ("--bits 3 --value-init zero", "unknown --value-init 'zero'"),
        ("--bits 3 --dtype half", "unknown --dtype 'half'"),
    ],
)
def test_bad_options_give_one_line(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call(f"train --d-model 4 {options}", tmp_path / "run")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("hijacklens: ") and message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_finished_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{QUICK} --seeds 1 --lr 0.05"
    call(command, tmp_path)
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        call(command, tmp_path)
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_bytes() == before
    call(f"{command} --overwrite", tmp_path)


def test_help_keeps_its_lines() -> None:
    said = CliRunner().invoke(group.group, ["train", "--help"]).output
    assert "\n    hijacklens train --bits 6 --d-model 32 --out runs/six-bits\n" in said


@pytest.mark.slow
def test_the_same_command_after_a_kill_ends_the_same(tmp_path: Path) -> None:
    """SIGKILL in the middle of a run, then the same command: the table of an unbroken run."""
    command = (
        "train --bits 4 --length 32 --d-model 8 --steps 2000 --seeds 2 --lr 0.01,0.001 --batch 32 "
        "--evaluation 500 --quiet --checkpoint-seconds 0"
    )

    def start(out: Path) -> subprocess.Popen[bytes]:
        arguments = [*command.split(), "--out", str(out)]
        code = f"from analyses.commands.group import main; main({arguments!r})"
        # One thread each: two processes that wait for threads would slow each other down.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL
        )

    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    process = start(killed)
    until = time.monotonic() + 120
    while not (killed / FILE).exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (killed / FILE).exists() and not (killed / "result.json").exists()

    both = [start(killed), start(unbroken)]
    assert [process.wait() for process in both] == [0, 0]
    for name in ("summary.csv", "curves.csv"):
        assert (killed / name).read_bytes() == (unbroken / name).read_bytes()
    weights = "models/seed1-lr0.001/model.safetensors"
    assert (killed / weights).read_bytes() == (unbroken / weights).read_bytes()
    assert not list(killed.glob("*checkpoint*"))
