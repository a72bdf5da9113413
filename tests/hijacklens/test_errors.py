"""The one error: it names the value received, what is allowed, and what to do."""

from __future__ import annotations

import pytest
from IPython.core.interactiveshell import InteractiveShell

from hijacklens.errors import MOST_CHARACTERS, InputError, unknown


@pytest.mark.parametrize(
    ("given", "allowed", "hint", "text"),
    [
        pytest.param(
            "frist",
            ["sum", "first", "mean"],
            "",
            "unknown rule 'frist'; did you mean 'first'? Allowed: first, mean, sum.",
            id="a near name",
        ),
        pytest.param("x", ["b", "a"], "", "unknown rule 'x'. Allowed: a, b.", id="no near name"),
        pytest.param("x", ["a"], "Try a.", "unknown rule 'x'. Allowed: a. Try a.", id="a hint"),
        pytest.param(3, ["a"], "", "unknown rule 3. Allowed: a.", id="not a text"),
        pytest.param("", ["a"], "", "unknown rule ''. Allowed: a.", id="empty"),
    ],
)
def test_unknown(given, allowed, hint, text):
    error = unknown("rule", given, allowed, hint)
    assert isinstance(error, InputError)
    assert str(error) == text


def test_unknown_takes_any_iterable():
    assert "a, b" in str(unknown("rule", "x", iter({"b": 1, "a": 2})))


def test_an_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a\nb\r\n\tc", "a b   c"),
        ("\x1b[2J\x00\u202e", "\\x1b[2J\\x00\\u202e"),
        ("\ud800", "\\ud800"),
        ("Zürich 北京 ω", "Zürich 北京 ω"),
    ],
    ids=["lines", "terminal", "half a pair", "letters"],
)
def test_a_message_is_one_readable_line(given, said):
    assert str(InputError(given)) == said


def test_a_message_has_an_end():
    text = str(InputError(f"begins {'x' * 100_000} ends"))
    assert len(text) <= MOST_CHARACTERS
    assert text.startswith("begins x") and text.endswith("x ends")
    assert len(str(unknown("scheme", "y" * 100_000, ["think"]))) <= MOST_CHARACTERS


def test_a_notebook_shows_the_message_and_the_line_of_the_user(capsys):
    shell = InteractiveShell()
    shell.run_cell("import hijacklens as hl\nhl.load_facts('nowhere.jsonl')")
    shown = capsys.readouterr()
    message, line = (shown.out + shown.err).strip().splitlines()
    assert message.startswith("InputError: ")
    assert "nowhere.jsonl" in message
    assert line == "in: hl.load_facts('nowhere.jsonl')"
