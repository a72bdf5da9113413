"""How spans are written: their parts, their positions, and what cannot be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.prompts.spans import atoms, depends_on_place, placed_atoms, positions

PARTS = {
    "hijack": ("hijack",),
    "hijack+subject+last": ("hijack", "subject", "last"),
    " hijack + subject ": ("hijack", "subject"),
    "hijack+hijack": ("hijack",),
    "at:-3": ("at:-3",),
    "at:2..5+at:-1": ("at:2..5", "at:-1"),
    "at:1..-2": ("at:1..-2",),
    "token:17+all": ("token:17", "all"),
    "text:Eiffel Tower": ("text:Eiffel Tower",),
    "text: Guam": ("text: Guam",),
    "hijack+text:a+b, at:x": ("hijack", "text:a+b, at:x"),
    "text:text:": ("text:text:",),
}
WRONG = [
    "", " ", "+", "hijack+", "+hijack", "text:", "hijack+text:", "at:", "at:x", "at:1.5",
    "at:1...3", "at:5..2", "at:-1..-3", "token:", "token:-1", "token:Guam", "hijack text:Guam",
]  # fmt: skip


@pytest.mark.parametrize("span", PARTS)
def test_parts(span):
    assert atoms(span) == PARTS[span]


@pytest.mark.parametrize("span", WRONG)
def test_what_cannot_be_read(span):
    with pytest.raises(InputError, match="cannot read the span"):
        atoms(span)


def test_a_span_is_a_text():
    with unchecked(), pytest.raises(InputError, match=r"a span is a text .*, not 5"):
        atoms(5)


def test_what_depends_on_place():
    spans = ["hijack+at:-1", "token:3", "all+at:-1", "last+text:a+b"]
    assert placed_atoms(spans) == ("at:-1", "hijack", "last", "text:a+b")
    assert not depends_on_place("all")
    assert not depends_on_place("token:3")


PLACES = {
    ("at:0", 4): (0,),
    ("at:3", 4): (3,),
    ("at:4", 4): (),
    ("at:-1", 4): (3,),
    ("at:-4", 4): (0,),
    ("at:-5", 4): (),
    ("at:1..2", 4): (1, 2),
    ("at:2..9", 4): (2, 3),
    ("at:-9..1", 4): (0, 1),
    ("at:1..-2", 4): (1, 2),
    ("at:3..-3", 4): (),
    ("at:-2..-1", 1): (0,),
    ("at:0", 0): (),
}


@pytest.mark.parametrize(("atom", "length"), PLACES)
def test_positions(atom, length):
    assert positions(atom, length) == PLACES[atom, length]


@given(st.integers(-8, 8), st.integers(-8, 8), st.integers(0, 8))
def test_positions_are_those_of_a_slice(first, last, length):
    start, end = (i + length if i < 0 else i for i in (first, last))
    expected = tuple(i for i in range(length) if start <= i <= end)
    assert positions(f"at:{first}..{last}", length) == expected
