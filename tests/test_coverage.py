"""The simulation of docs/site/coverage.py: intervals cover and tests err as often as stated."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def load():
    path = Path(__file__).parents[1] / "docs" / "site" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(rows, *, slack):
    """Rates of a number of draws; `slack` is their sampling error."""
    for row in rows:
        for name in ("change", "fraction", "nats", "ratio"):
            assert 0.93 - slack <= row[name] <= 0.97 + slack, (name, row)
        assert row["false positives"] <= 0.055 + slack, row
        if row["power, formula"] != "-":
            assert row["power"] == pytest.approx(row["power, formula"], abs=0.03 + slack), row
        if row["ICC"] >= 0.089:
            assert row["change, facts"] < 0.75, row


def test_intervals_over_relations_cover_and_those_over_facts_do_not(monkeypatch):
    simulation = load()
    monkeypatch.setattr(simulation, "RELATIONS", ((20, 48, 48),))
    monkeypatch.setattr(simulation, "ICCS", (0.119,))
    monkeypatch.setattr(simulation, "MORE", 1)
    check(simulation.rows(150), slack=0.045)


@pytest.mark.slow
def test_every_row_of_the_table():
    check(load().rows(1000), slack=0.02)


def test_the_printed_table_is_that_of_the_simulation():
    """Its rows and columns; the numbers are written by `make coverage-table`."""
    simulation = load()
    page = simulation.PAGE.read_text(encoding="utf-8")
    lines = page.partition(simulation.START)[2].partition(simulation.END)[0].strip().splitlines()
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert len(body) == len(simulation.RELATIONS) * len(simulation.ICCS)
    for cells in body:
        row = {
            name: value if name == head[0] or value == "-" else float(value)
            for name, value in zip(head, cells, strict=True)
        }
        check([row], slack=0.005)
