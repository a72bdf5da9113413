"""The one error: it names what was given, what is allowed, and what to do."""

from __future__ import annotations

import pytest

from hijacklens.errors import InputError, unknown


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
