"""Lines are distinguishable."""

from __future__ import annotations

import warnings
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure

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


def test_every_token_of_a_map_has_a_label_on_one_line():
    """A digit is a token as any other; of layers only some have a label."""
    tokens = ["\n\n", *map(str, range(29))]
    with plots.canvas() as (_, (ax,)):
        plots.heat_map(ax, np.eye(30), rows=tokens, columns=range(30), label="")
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == ["↵↵", *tokens[1:]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [*map(str, range(0, 30, 2))]


def test_figures_are_saved_complete_and_can_be_opened(tmp_path, monkeypatch):
    """An SVG file with a control character is refused by every reader."""
    with plots.canvas() as (figure, (ax,)):
        ax.set_title(plots.escape("a\x07b\n\u202ec"))
    plots.write(figure, tmp_path / "a.svg")
    texts = ElementTree.parse(tmp_path / "a.svg").getroot().itertext()
    assert "a⟨U+0007⟩b" in "".join(texts)
    boxes = []
    save = lambda *given, **options: boxes.append(matplotlib.rcParams["savefig.bbox"])  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", save)
    figure.savefig(tmp_path / "b.png")  # as readers do, with a legend that is wider than the figure
    assert boxes == ["tight"]


def drawn(name: str, path: Path, font: str = "") -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always", plots.FigureWarning)
        plots.warn_of_boxes.cache_clear()
        for _ in range(2):
            with plots.canvas() as (figure, (ax,)):
                ax.plot([0, 1], label=name)
                (label,) = ax.legend().get_texts()
            plots.write(figure, path)
    assert not font or font in label.get_fontfamily()
    # pytest has removed the filter of matplotlib's own warnings.
    return [one for one in shown if issubclass(one.category, plots.FigureWarning)]


def test_letters_without_a_glyph_give_one_note(tmp_path):
    (shown,) = drawn("\U000f1234\U000f1235", tmp_path / "a.png")  # of private use
    assert shown.category is plots.FigureWarning
    assert "no installed font has some letters" in str(shown.message)
    assert len(drawn("\U000f1234", tmp_path / "a.svg")) == 1
    assert "\U000f1234" in (tmp_path / "a.svg").read_text()
    assert drawn("Île-de-France", tmp_path / "b.png") == []


def test_an_installed_font_is_used_where_the_usual_one_lacks_a_letter(tmp_path, monkeypatch):
    builder = FontBuilder(unitsPerEm=1000)
    builder.setupGlyphOrder([".notdef", "north"])
    builder.setupCharacterMap({ord("北"): "north"})
    pen = TTGlyphPen(None)
    for point in ((0, 0), (800, 0), (800, 800)):
        (pen.lineTo if point != (0, 0) else pen.moveTo)(point)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "north": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "north": (900, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Tiny North", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "north.ttf")
    fonts = font_manager.fontManager
    monkeypatch.setattr(fonts, "ttflist", list(fonts.ttflist))
    fonts.addfont(tmp_path / "north.ttf")
    assert drawn("To 北", tmp_path / "a.png", "Tiny North") == []
