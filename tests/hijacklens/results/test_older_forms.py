"""Folders that earlier versions wrote: each is read, and gives the table that it gave then."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hijacklens as hl
from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.files import RECORD
from hijacklens.results.older_forms import FORM, MOVED, upgraded

FOLDERS = sorted((Path(__file__).parents[2] / "data" / "old_results").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_the_old_form_gives_its_table(folder, tmp_path, monkeypatch):
    write = plots.write

    def without_inner_legends(figure, path):  # one inside a panel would cover data
        assert not any(panel.get_legend() for panel in figure.axes)
        write(figure, path)

    monkeypatch.setattr(plots, "write", without_inner_legends)
    result = hl.load_result(folder)
    written = io.StringIO((folder / "reference.csv").read_text(encoding="utf-8"))
    table = io.StringIO(result.to_dataframe().to_csv(index=False, float_format="%.9g"))
    expected, found = pd.read_csv(written), pd.read_csv(table)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    # Saved again in the present form, it is the same result.
    result.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / RECORD).read_text())["form"] == FORM
    again = hl.load_result(tmp_path / "again")
    pd.testing.assert_frame_equal(again.to_dataframe(), result.to_dataframe(), check_exact=True)
    assert (repr(again), again.provenance) == (repr(result), result.provenance)
    np.testing.assert_equal(again.configuration(), result.configuration())


def test_there_is_a_folder_of_every_type():
    old = {json.loads((folder / RECORD).read_text())["type"] for folder in FOLDERS}
    assert len(old) == 16
    assert set(MOVED) <= old
    for kind in MOVED.values():
        module, name = kind.split(":")
        assert getattr(__import__(module, fromlist=[name]), name).__module__ == module


@pytest.mark.parametrize("form", [FORM + 1, "x"])
def test_a_record_of_a_later_form_is_refused(form):
    with pytest.raises(InputError, match="Install the version that wrote it"):
        upgraded({"type": "x:Y", "form": form})


def test_a_record_in_the_present_form_is_left_alone():
    record = {"type": "x:Y", "form": FORM, "settings": {"dim": 3}, "scheme": "a text"}
    assert upgraded(record) == record


def test_settings_get_their_own_key_and_their_present_shape():
    old = {
        "type": "x:Y",
        "models": [{"name": "a", "engine": {"way": "packed"}}],
        "scheme": {"name": "s", "template": None, "templates": {"P1": "t"}, "direction": "hijack"},
        "search": {"scheme": "s"},
        "shift": 0.5,
    }
    settings = upgraded(old)["settings"]
    assert settings["model"] == {"name": "a", "engine": {"sharing": "packed"}}
    assert settings["scheme"]["text"] == {"P1": "t"}
    assert settings["search"]["scheme"] == {"name": "s"}
    assert "settings" not in old and old["search"] == {"scheme": "s"}  # nothing is changed in place
