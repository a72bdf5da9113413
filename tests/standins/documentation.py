"""The code blocks of a Markdown page, and running them as a reader would, top to bottom.

A page has one namespace for its Python and one folder for its files; its shell commands run in this
process. HTML comments before a block say what is special about it:

    <!-- file: my.toml -->         the block is written to that file
    <!-- raises -->                it ends in an InputError; the next `text` block is the message
    <!-- prints -->                the next `text` block is what it prints
    <!-- hub: gpt2 -->             it runs with the hub of the tests (`hub_server`), not offline
    <!-- slow: ... -->             runs with the tests that are marked slow, with the reason
    <!-- not run: ... -->          checked, not run, with the reason

In an expected text `...` stands for anything and all white space is alike.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click import Context
from hub_server import online
from type_checks import unchecked

from analyses.commands.group import COMMANDS, group, main
from hijacklens.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.S | re.M
)
MARK = re.compile(
    r"<!--\s*(file|raises|prints|hub|slow|not run)\s*(?::\s*((?:(?!-->).)*?))?\s*-->\s*$",
    re.S,
)
MARKS_WITH_REASON = ("file", "hub", "slow", "not run")
SMALL = {
    "limit": 12,
    "candidates": 3,
    "size": 2,
    "tokens": 2,
    "random_sets": 1,
    "steps": 30,
    "evaluation": 256,
    "seeds": 2,
    "draws": 9,
}
"""Option or keyword -> the most of it that a run on the stand-in takes."""
FEWER = {"limit": 20, "candidates": 3, "size": 2, "random_sets": 1}
"""The same for a run on the real models."""
MENTIONED = ("git", "cd", "pip", "pytest", "ray", "source", "hf", "lm_eval", "inspect", "xdg-open")
"""Commands of other programs, which pages may name and the tests do not run."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order, each with the marks that stand before it."""
    text = page.read_text(encoding="utf-8")
    found = []
    end = 0
    for match in FENCE.finditer(text):
        before, marks = text[end : match.start()].rstrip(), {}
        while mark := MARK.search(before):
            name, reason = mark[1], " ".join((mark[2] or "").split())
            if name in MARKS_WITH_REASON and not reason:
                raise ValueError(f"{page}: the mark {name!r} needs a reason")
            marks[name] = reason
            before = before[: mark.start()].rstrip()
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match["language"], body, marks))
        end = match.end()
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as words, with the variables that it sets put in."""
    found: list[list[str]] = []
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        whole = re.sub(r"\$([A-Z]+)", lambda match: variables[match[1]], line)
        words = shlex.split(whole, comments=True)
        if words and all(re.fullmatch(r"[A-Z_]+=.*", word) for word in words):
            variables.update((name, value) for name, _, value in (w.partition("=") for w in words))
        elif words:
            found.append(words)
    return found


def check_command(words: list[str]) -> None:
    """Refuse what does not exist: commands, their options, make targets, extras of the package."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, rest = words[0] if words else "", words[1:]
    if program == "hijacklens":
        if rest[:1] in (["--help"], ["--version"]):
            return
        name, arguments = rest[0], rest[1:]
        assert name in COMMANDS, f"no command {name!r}"
        command = group.get_command(Context(group), name)
        assert command is not None
        if not {"--help", "-h"} & set(arguments):
            # Parsing refuses unknown options, missing values and wrong types; nothing is run.
            command.make_context(name, list(arguments))
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        asked = [word for word in rest if "=" not in word]
        assert set(asked) <= set(targets), f"no make target in {asked}"
    elif program in ("python", "bash"):
        if rest[:1] not in (["-m"], ["-c"]):
            assert (ROOT / rest[0]).exists(), rest[0]
    elif program == "export":
        assert all("=" in word for word in rest), words
    elif program:
        assert program in MENTIONED, f"{program!r} is not a command that pages use"
        extras = re.findall(r"hijacklens\[(\w+)\]", " ".join(rest))
        toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        known = project["optional-dependencies"]
        assert set(extras) <= set(known), extras


@dataclass
class Reader:
    """Someone who types a page, block by block."""

    environ: Any
    """What sets environment variables, such as `monkeypatch`."""
    most: Mapping[str, int]
    """Option or keyword -> the most of it, such as `SMALL`."""
    space: dict[str, Any] = field(default_factory=lambda: {"__name__": "__page__"})

    def run(self, block: Block, expected: str | None) -> None:
        """Run a block; compare what it prints, or the message of its error, where that is asked."""
        printed = io.StringIO()
        with contextlib.ExitStack() as around:
            if "hub" in block.marks:
                around.enter_context(online())
            if "raises" in block.marks:
                around.enter_context(unchecked())
            if block.language == "python":
                message = self._python(block, printed)
            else:
                message = self._shell(block, printed)
        if "raises" in block.marks:
            assert message is not None, f"{block.place}: no error was raised"
            assert expected is not None, f"{block.place}: no text block with the message follows"
            assert_like(message, expected, block.place)
        else:
            assert message is None, f"{block.place}: {message}"
        if "prints" in block.marks:
            assert expected is not None, f"{block.place}: no text block with the output follows"
            assert_like(printed.getvalue(), expected, block.place)

    def _python(self, block: Block, printed: io.StringIO) -> str | None:
        # Line numbers of an error are those of the page.
        tree = ast.parse("\n" * (block.line - 1) + block.text, filename=str(block.page))
        tree = ast.fix_missing_locations(Smaller(self.most).visit(tree))
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(tree, str(block.page), "exec"), self.space)
            except InputError as error:
                return str(error)
        return None

    def _shell(self, block: Block, printed: io.StringIO) -> str | None:
        for words in commands(block.text):
            check = list(words)
            if "raises" not in block.marks:
                check_command(check)
            if words[:1] == ["export"]:
                for word in words[1:]:
                    self.environ.setenv(*word.split("=", 1))
            said = io.StringIO()
            status: Any = 0
            with (
                self.environ.context() as environ,
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(said),
            ):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    environ.setenv(*words.pop(0).split("=", 1))
                if words[:1] != ["hijacklens"]:
                    continue
                try:
                    main(smaller(words[1:], self.most))
                except SystemExit as stop:
                    status = stop.code
            if status:
                return said.getvalue().strip() or f"exit status {status}"
        return None


class Smaller(ast.NodeTransformer):
    """Makes numbers small where they are given as keywords."""

    def __init__(self, most: Mapping[str, int]) -> None:
        self.most = most

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        """A keyword argument of a call."""
        self.generic_visit(node)
        given, most = node.value, self.most.get(node.arg or "")
        if most and isinstance(given, ast.Constant) and isinstance(given.value, int):
            node.value = ast.copy_location(ast.Constant(min(given.value, most)), given)
        return node


def smaller(words: list[str], most: Mapping[str, int]) -> list[str]:
    """The words of a command with numbers made small."""
    found = list(words)
    for i, word in enumerate(found[:-1]):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in most and found[i + 1].isdigit():
            found[i + 1] = str(min(int(found[i + 1]), most[name]))
    return found


def assert_like(text: str, expected: str, place: str) -> None:
    """Whether a text is the expected one; `...` stands for anything, all white space is alike."""
    parts = [re.escape(" ".join(part.split())) for part in expected.split("...")]
    pattern = r"\s*.*?\s*".join(parts)
    given = " ".join(text.split())
    assert re.fullmatch(pattern, given, re.S), f"{place}: expected\n{expected}\ngot\n{given}"


def steps(page: Path) -> Iterator[tuple[Block, str | None]]:
    """The blocks of a page that do something, each with the text block that follows it."""
    found = blocks(page)
    for block, following in zip(found, [*found[1:], None], strict=False):
        text = following.text if following is not None and following.language == "text" else None
        if block.language in ("python", "sh") or "file" in block.marks:
            yield block, text
