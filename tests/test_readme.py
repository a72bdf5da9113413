"""What the README says works: its Python runs, its commands exist with those options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click import Context

from analyses.cli import COMMANDS, group

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words and words[0] == "hijacklens"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_and_their_options_exist(words):
    name, arguments = words[1], words[2:]
    assert name in COMMANDS
    command = group.get_command(Context(group), name)
    assert command is not None
    # Parsing refuses unknown options, missing values and wrong types; nothing is run.
    command.make_context(name, list(arguments))


@pytest.mark.packaged
def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, space)
    assert (tmp_path / "runs" / "capitals" / "summary.csv").exists()


def test_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
