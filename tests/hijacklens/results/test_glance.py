"""What results show of themselves: short, useful, and never markup or control characters."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import pytest

from hijacklens.results.glance import MOST_ROWS, Glance, Shown


@dataclass(frozen=True, slots=True)
class Measured(Shown):
    """A value with a table and a glance of its own."""

    table: pd.DataFrame
    name: str = "atlas"
    rows: int = 1

    def glance(self) -> Glance:
        rows = tuple((f"fact {i} of {self.name}", f"{i}.5") for i in range(self.rows))
        return Glance(f"{self.name}, {self.rows} facts", ("fact", "nats"), rows, ("table",))


def value(**changes):
    return Measured(pd.DataFrame({"a": range(100)}), **changes)


def test_a_dataclass_shows_its_glance_and_not_its_fields():
    assert repr(value()) == (
        "Measured · atlas, 1 facts\n"
        "  fact             nats\n"
        "  fact 0 of atlas   0.5\n"
        "  next: .table"
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
