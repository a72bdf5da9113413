"""Names and texts with control characters: no command passes one on to the terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios

import pytest
from command_calls import CALLS, WRITING, make_places, run, words_of
from forked import FORK, finish

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\u2066\u200b\u00ad\rnote: done"
SLOW = ("defend", "heads", "law", "sweep", "train", "reproduce")
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CALLS]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    places = make_places(tmp_path_factory.mktemp("names"), model=f"tiny{EVIL}", subject=EVIL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIJACKLENS_STORE", str(places["m"].parent / "store.sqlite"))
        assert run(*words_of("hijack", {**places, "o": places["h"]}), "--quiet") == 0
        yield places


@pytest.mark.parametrize("name", NAMES)
def test_output_has_no_control_characters(name, places, tmp_path, capsys):
    words = words_of(name, {**places, "o": tmp_path / f"out{EVIL}"})
    assert run(*words) == 0
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert re.sub(r"[\n\t]", "", text).isprintable(), repr(text)
    if name in WRITING:
        words += [] if name in ("sweep", "reproduce") else ["--overwrite"]
    assert run(*words, "--json") == 0
    printed = capsys.readouterr()
    assert printed.out.replace("\n", "").isprintable()
    if name == "facts":
        assert EVIL in {fact["subject"] for fact in json.loads(printed.out)["facts"]}


REFUSED = (
    "hijack --model ./{e}",
    "hijack --model {m} --facts {e}.json",
    "hijack --model {m} --scheme {e}",
    "hijack --model {m} --template {e}",
    "hijack --model {m} --probe {e}",
    "facts --relation {e}",
    "trace --model {m} --prompt {e} --subject {e}",
    "report {e}",
    "sweep {e}",
    "ask",
    "ask {e} --{e}",
    "{e}",
    "probes {e}",
    "schemes {e}",
    "reproduce {e}",
    "cache {e}",
    "train --bits {e}",
)


@pytest.mark.parametrize("line", REFUSED)
def test_errors_have_no_control_characters(line, places, capsys):
    assert run(*(word.format(e=EVIL, **places) for word in line.split())) == 2
    said = capsys.readouterr().err
    assert re.sub(r"[\n\t]", "", said).isprintable(), repr(said)
    assert "note: done" not in said.splitlines()


def test_a_terminal_gets_our_colours_and_nothing_else(places, tmp_path):
    """The progress bar and the colours are ours; the rest of a name is escaped."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))

    def work() -> None:
        for stream in (1, 2):
            os.dup2(theirs, stream)
        os.environ.pop("NO_COLOR", None)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os._exit(run(*words_of("hijack", {**places, "o": tmp_path / "out"}), "--no-cache"))

    child = FORK.Process(target=work)
    child.start()
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 65536):
            seen += piece
    except OSError:  # the other end is closed
        pass
    assert finish(child) == 0
    text = seen.decode()
    assert "facts [" in text and "\x1b[1m" in text  # a bar was drawn, a title is bold
    rest = re.sub(r"\x1b\[[\d;]*[mA]|[\r\n\t]", "", text)
    assert rest.isprintable(), repr(text)
    assert not re.search(r"\x1b\[2J|\x1b\]|\x9b", text)
