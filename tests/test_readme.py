"""The README is what a visitor sees first: two screens, a real figure, links that lead somewhere.

That its commands and its Python run is tested with the pages of docs/ (`test_docs.py`).
"""

from __future__ import annotations

import re
import struct

from documentation import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TWO_SCREENS = 100
"""Lines, at some fifty a screen."""


def test_it_has_two_screens():
    assert len(README.splitlines()) <= TWO_SCREENS
    assert max(map(len, README.splitlines())) <= 110


def test_its_figure_is_a_picture():
    ((text, place),) = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    header = (ROOT / place).read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert min(struct.unpack(">II", header[16:24])) > 300  # pixels
    assert len(text) > 10  # for those who cannot see it


def test_its_numbers_are_those_of_the_study():
    study = (ROOT / "docs" / "hijacking" / "README.md").read_text(encoding="utf-8")
    before, after = re.findall(r"from \.(\d\d)\s+to \.(\d\d)", README)[0]
    retention = re.search(r"\| smollm2-135m \| \.(\d{3}) \| \.(\d{3}) \|", study)
    assert retention is not None
    # There are no ties in that study: efficacy and retention sum to 1.
    assert [round(1 - int(share) / 1000, 2) for share in retention.groups()] == [
        int(before) / 100,
        int(after) / 100,
    ]
