"""Full disks, closed outputs and impossible folders: one line, and the good result stays."""

from __future__ import annotations

import io
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_calls import CALLS, WRITING, make_places, run, words_of
from forked import FORK, finish

SLOW = pytest.mark.slow
QUICK = ("hijack", "report", "schemes")
"""Commands of the default tests."""
NAMES = [pytest.param(name, marks=() if name in QUICK else SLOW) for name in CALLS]
WRITERS = [pytest.param(name, marks=() if name in QUICK else SLOW) for name in WRITING]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    places = make_places(tmp_path_factory.mktemp("no-room"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIJACKLENS_STORE", "off")
        assert run(*words_of("hijack", {**places, "o": places["h"]}), "--quiet") == 0
        yield places


def child(errors: Path, words: list[str], prepare: Callable[[], object]) -> tuple[int, list[str]]:
    """Run a command in a forked process; return its status and the lines of standard error."""

    def work() -> None:
        sys.stderr = errors.open("w", encoding="utf-8")
        sys.stdout = io.StringIO()
        prepare()
        status = run(*words)
        sys.stderr.flush()
        os._exit(status)

    process = FORK.Process(target=work)
    process.start()
    return finish(process), errors.read_text(encoding="utf-8").splitlines()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def files_may_have(size: int) -> None:
    """Limit the size of files, so that writing more fails as on a full disk.

    Standard error is a file here too, so the limit leaves it a few lines.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name, places, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    words = [*words_of(name, {**places, "o": work / "out"}), "--quiet"]
    assert run(*words) == 0
    good = contents(work)
    assert good
    again = [] if name == "sweep" else ["--overwrite"]
    if name == "sweep":  # its cells are kept, and only the table is written again
        for folder in (work / "out" / "scoring").iterdir():
            shutil.rmtree(folder)
        good = contents(work)
    status, lines = child(tmp_path / "errors", [*words, *again], lambda: files_may_have(900))
    assert status == 1, lines
    assert lines[-1].startswith("hijacklens: cannot use ") and "Make room there" in lines[-1], lines
    assert str(work) in lines[-1], lines
    assert "Traceback" not in str(lines)
    left = contents(work)
    left.pop("out/checkpoint.safetensors", None)  # from which training resumes
    assert left == good
    fresh = [*words_of(name, {**places, "o": tmp_path / "new" / "out"}), "--quiet"]
    (tmp_path / "new").mkdir()
    assert child(tmp_path / "errors", fresh, lambda: files_may_have(900))[0] == 1
    assert not contents(tmp_path / "new")


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_full(name, places, tmp_path):
    def full() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")

    words = words_of(name, {**places, "o": tmp_path / "out"})
    status, lines = child(tmp_path / "errors", words, full)
    assert status == 1, lines
    assert lines[-1].startswith("hijacklens: cannot use 'standard output'"), lines
    assert "Traceback" not in str(lines)
    if name in ("hijack", "trace", "train", "heads", "reproduce"):
        assert contents(tmp_path / "out")  # complete before anything is printed


IMPOSSIBLE = (os.fsdecode(b"caf\xe9"), "/proc/x/y", "{f}", "{f}/x", "/dev/null/x", "x" * 300, "")


@pytest.mark.parametrize("name", WRITING)
def test_an_impossible_folder_is_refused_before_anything_is_loaded(name, places, tmp_path, capsys):
    nothing = {**places, "m": tmp_path / "missing", "s": tmp_path / "missing", "h": tmp_path / "m"}
    words = words_of(name, {**nothing, "f": tmp_path / "missing"})
    for path in IMPOSSIBLE:
        out = path.format(f=places["f"])
        words[words.index("--out") + 1] = out
        assert run(*words, "--quiet") == 2, out
        line = capsys.readouterr().err
        assert line.startswith("hijacklens: ") and "missing" not in line, line
        start = out.encode(errors="ignore").decode()[:20]
        assert (start or "--out") in line, line
