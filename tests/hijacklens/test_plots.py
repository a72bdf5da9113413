"""Lines are distinguishable."""

from __future__ import annotations

import pytest

from hijacklens import plots


@pytest.mark.parametrize("n", [12, 32])
def test_lines_differ_in_colour_marker_or_dash(n):
    styles = [tuple(plots.line(i).items()) for i in range(n)]
    assert len(set(styles)) == n
    assert len({plots.series(i) for i in range(n)}) == n


def test_lines_of_one_colour_differ_in_marker_and_dash():
    first, again = plots.line(1), plots.line(1 + len(plots.COLOURS))
    assert first["color"] == again["color"]
    assert first["marker"] != again["marker"] and first["linestyle"] != again["linestyle"]
