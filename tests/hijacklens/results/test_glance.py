"""What results show of themselves: short, useful, and never markup or control characters."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pandas as pd
import pytest

from hijacklens.results.glance import MOST_ROWS, Glance, Grid, Shown, drawn


@dataclass(frozen=True, slots=True)
class Measured(Shown):
    """A value with a table and a glance of its own."""

    table: pd.DataFrame
    name: str = "atlas"
    rows: int = 1

    def glance(self) -> Glance:
        rows = [{"fact": f"fact {i} of {self.name}", "nats": i + 0.5} for i in range(self.rows)]
        grid = Grid.of(rows, {"fact": "{fact}", "nats": "{nats:.1f}"})
        return Glance(f"{self.name}, {self.rows} facts", (grid,), steps=("table",))


def value(**changes):
    return Measured(pd.DataFrame({"a": range(100)}), **changes)


def test_a_dataclass_shows_its_glance_and_not_its_fields():
    assert repr(value()) == (
        "Measured · atlas, 1 fact\nfact             nats\nfact 0 of atlas   0.5\nnext: .table"
    )


def test_a_glance_stays_short_and_counts_what_it_leaves_out():
    shown = repr(value(rows=1000))
    assert len(shown.splitlines()) == MOST_ROWS + 4
    assert f"and {1000 - MOST_ROWS} more" in shown
    assert f"and {1000 - MOST_ROWS} more" in value(rows=1000)._repr_html_()
    assert value(rows=1000)._repr_html_().count("<tr>") == MOST_ROWS + 1


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a\x1b[2Jb", "a\nb", "\u202egnal"])
def test_texts_are_shown_as_text(name):
    found = value(name=name)
    html = found._repr_html_()
    assert ("<script" not in html and "script&gt;" in html) or "<" not in name
    for shown in (repr(found), html):
        assert "\x1b" not in shown and "\u202e" not in shown
    assert len(repr(found).splitlines()) == 4


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self):
        return True


def test_a_narrow_terminal_wraps_cells_and_a_pipe_does_not(monkeypatch):
    grid = Grid(("id", "what"), (("fig1", "a long line " * 9), ("fig2", "short")))
    assert len(drawn(grid).splitlines()) == 3
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    lines = drawn(grid).splitlines()
    assert max(map(len, lines)) <= 60
    assert [line[:4].strip() for line in lines] == ["id", "fig1", "", "fig2"]
    monkeypatch.setenv("COLUMNS", "9")
    words = "".join("".join(line[6:] for line in drawn(grid).splitlines()).split())
    assert words == "what" + "alongline" * 9 + "short"  # nothing is cut


def test_details_are_for_commands_and_an_endless_interval_is_put_in_words():
    rows = [{"value": 0.25, "low": float("-inf"), "high": float("inf")}]
    grid = Grid.of(rows, {"change": "{value:+.3f} [{low:+.3f}, {high:+.3f}]"})
    glance = Glance("one", (grid,), notes=("of 1 facts",), details=("seed 0",))
    assert drawn(glance) == "one\nchange\n+0.250 [too few for an interval]\nof 1 fact\nseed 0"
    assert "seed" not in drawn(*glance.parts("One")) + glance.html("One")


def test_numbers_are_on_the_right_and_what_is_missing_is_a_dash():
    table = pd.DataFrame({"name": ["a", None], "x": [0.25, None], "low": [-0.001, 2.0]})
    columns = {"name": "{name}", "x": "{x:fraction}", "ends": "[{low:signed}, {x:.1f}]"}
    assert drawn(Grid.of(table, columns)) == (
        "name     x  ends\na     .250  [0.00, 0.2]\n-        -  [+2.00, -]"
    )
