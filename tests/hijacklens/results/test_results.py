"""What every result shares: a folder that is whole or not a result, and where it came from."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Annotated, Any, ClassVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jaxtyping import Float

from hijacklens import plots
from hijacklens.errors import InputError
from hijacklens.files import RECORD, claim_folder, write_json, write_whole
from hijacklens.one_layer.task import ConceptTask, TaskRecord
from hijacklens.results.result import PACKAGES, Provenance, Result, load_result, staged
from hijacklens.results.stored import NOT_STORED, Stored


@dataclass(frozen=True)
class Counts(Result):
    """The smallest result: a few numbers."""

    values: tuple[int, ...]
    provenance: Provenance
    derived: ClassVar = {"items.csv": "to_dataframe"}

    def to_dataframe(self) -> pd.DataFrame:
        return pd.DataFrame({"value": self.values})

    def plot(self):
        with plots.canvas() as (figure, axes):
            axes[0].plot(self.values)
        return figure

    def findings(self) -> dict[str, Any]:
        return {"n": len(self.values), "mean": float("nan")}


@dataclass(frozen=True)
class Unfinished(Counts):
    """A result whose second file cannot be written."""

    def files(self):
        def fail(path: Path) -> None:
            path.write_text("half of it")
            raise OSError("disk full")

        return {**super().files(), "more.csv": fail}


class NoFigure(Counts):
    figures: ClassVar = {}


@pytest.fixture
def counts(monkeypatch) -> Counts:
    """A result of a type that load_result can find."""
    module = ModuleType("hijacklens.standin_of_the_tests")
    vars(module).update(globals(), __name__=module.__name__)  # type hints are resolved there
    module.NOT_A_TYPE = 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Counts, "__module__", module.__name__)
    return Counts((3, 1, 2), Provenance.now(seed=7))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------- save and load


def test_a_saved_result_comes_back(counts, tmp_path):
    folder = counts.save(tmp_path / "runs" / "one")
    assert folder == tmp_path / "runs" / "one"
    assert names(folder) == {"items.csv", "curve.svg", "curve.png", RECORD}
    assert load_result(folder) == counts
    assert load_result(str(folder)) == counts
    assert load_result(folder / "result.json") == counts
    record = (folder / RECORD).read_text(encoding="utf-8")
    (folder / RECORD).write_text(record, encoding="utf-8-sig")  # as some editors save it
    assert load_result(folder) == counts


def test_the_record_says_what_and_where_from(counts, tmp_path):
    record = json.loads((counts.save(tmp_path) / RECORD).read_text())
    assert record == {
        "type": "hijacklens.standin_of_the_tests:Counts",
        "form": 2,
        "values": [3, 1, 2],
        "n": 3,
        "mean": None,
        "files": ["items.csv", "curve.svg", "curve.png"],
        "sha256": {},
        "provenance": asdict(counts.provenance),
    }
    assert Provenance(**record["provenance"]) == counts.provenance


def test_figures_are_written_in_their_format(counts, tmp_path):
    folder = counts.save(tmp_path)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "curve.svg").read_text()
    assert plt.get_fignums() == []


def test_the_same_result_gives_the_same_files(counts, tmp_path):
    one, two = counts.save(tmp_path / "1"), counts.save(tmp_path / "2")
    for name in names(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_result_may_have_no_figure(tmp_path):
    result = NoFigure((1,), Provenance.now())
    assert names(result.save(tmp_path)) == {"items.csv", RECORD}


def test_a_folder_with_a_result_is_not_overwritten_unasked(counts, tmp_path):
    counts.save(tmp_path)
    other = Counts((9,), counts.provenance)
    with pytest.raises(InputError) as caught:
        other.save(tmp_path)
    for part in (str(tmp_path), "already contains a result", "--overwrite"):
        assert part in str(caught.value)
    assert load_result(tmp_path) == counts
    other.save(tmp_path, overwrite=True)
    assert load_result(tmp_path) == other


def test_a_save_that_fails_changes_nothing(counts, tmp_path):
    """A good result stays until the new one is complete; a new folder is not left behind."""
    counts.save(tmp_path / "good")
    for folder in (tmp_path / "good", tmp_path / "a" / "b"):
        with pytest.raises(OSError, match="disk full") as caught:
            Unfinished((1,), counts.provenance).save(folder, overwrite=True)
        assert caught.value.filename == str(folder / "more.csv")
    assert names(tmp_path) == {"good"}
    assert names(tmp_path / "good") == {"items.csv", "curve.svg", "curve.png", RECORD}
    assert load_result(tmp_path / "good") == counts


def test_what_is_made_inside_a_result_is_replaced_with_it(counts, tmp_path):
    (tmp_path / "mine.txt").write_text("stays")
    with staged(tmp_path) as place:
        counts.save(place)
        counts.save(place / "inner")
        (place / "page.html").write_text("")
    assert load_result(tmp_path / "inner") == counts
    counts.save(tmp_path, overwrite=True)
    kept = {"items.csv", "curve.svg", "curve.png", RECORD, "mine.txt"}
    assert names(tmp_path) == kept
    assert not (tmp_path / "inner").exists()


def test_a_save_leaves_the_files_of_a_save_that_is_running(counts, tmp_path):
    """Of a process that was killed, it removes them."""
    rest = tmp_path / ".part-killed"
    rest.mkdir()
    with staged(tmp_path, overwrite=True) as place:
        assert not rest.exists()
        Counts((9,), counts.provenance).save(place)
        counts.save(tmp_path)
        assert load_result(tmp_path) == counts
    assert load_result(tmp_path) == Counts((9,), counts.provenance)
    assert names(tmp_path) == {"items.csv", "curve.svg", "curve.png", RECORD}


def test_a_result_that_came_meanwhile_stays(counts, tmp_path):
    with pytest.raises(InputError, match="already contains a result"), staged(tmp_path) as place:
        Counts((9,), counts.provenance).save(place)
        counts.save(tmp_path)
    assert load_result(tmp_path) == counts


def _save_often(counts, folder):
    for _ in range(8):
        counts.save(folder, overwrite=True)


def test_saves_at_the_same_time_give_one_whole_result(counts, tmp_path, monkeypatch):
    monkeypatch.setattr(Counts, "figures", {})  # Matplotlib draws in one thread
    both = [counts, Counts(tuple(range(50)), counts.provenance)]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(_save_often, one, tmp_path) for one in both]:
            done.result()
    assert load_result(tmp_path) in both
    assert names(tmp_path) == {"items.csv", RECORD}


FORMULAS = ["=1+1", "+1", "-1", "@A1", "\tx", "\rx", "'=1", "''-1", "'x", "x=1", "", "日本", "NA"]


def test_no_text_of_a_csv_file_is_a_formula(many, tmp_path):
    """A cell of a spreadsheet that begins so is run; our own reader gives back the text."""
    texts = pd.DataFrame({"name": FORMULAS, "count": range(-1, len(FORMULAS) - 1)})
    result = replace(many, texts=texts.astype({"count": "Int64"}))
    result.save(tmp_path)
    with (tmp_path / "texts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [row["name"] for row in rows if row["name"][:1] in tuple("=+-@\t\r")]
    assert rows[0]["count"] == "-1"  # a number is not a text
    pd.testing.assert_frame_equal(load_result(tmp_path).texts, result.texts)


def without_hashes(folder):
    """Make a record as earlier versions wrote it."""
    record = json.loads((folder / RECORD).read_text())
    del record["sha256"]
    (folder / RECORD).write_text(json.dumps(record))


def test_line_ends_of_texts_may_change(many, tmp_path):
    """As git changes them."""
    folder = many.save(tmp_path)
    texts = folder / "texts.csv"
    texts.write_bytes(texts.read_bytes().replace(b"\n", b"\r\n"))
    assert load_result(folder).texts.equals(many.texts)


def test_a_small_file_with_millions_of_rows_is_refused(many, tmp_path):
    many.save(tmp_path)
    columns = {"x": pa.array([0.0]).take(pa.array(np.zeros(2_000_000, int)))}
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    without_hashes(tmp_path)
    with pytest.raises(InputError, match="2,000,000 rows"):
        load_result(tmp_path)


# ---------------------------------------------------------------- fields by their types


@dataclass(frozen=True, kw_only=True)
class Part:
    weights: Mapping[str, float]
    pairs: tuple[tuple[int, str], ...] = ()
    task: TaskRecord | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Many(Result):
    """A field of every kind."""

    table: pd.DataFrame
    texts: Annotated[pd.DataFrame, Stored("texts.csv", ("name",), {"name": str, "count": "Int64"})]
    plain: Annotated[pd.DataFrame, Stored("plain.csv")]
    array: Annotated[Float[np.ndarray, "a b"], Stored("arrays.npz")]
    other: Annotated[np.ndarray | None, Stored("arrays.npz")] = None
    part: Part
    ends: tuple[float, float]
    note: str | None = None
    live: Annotated[object, NOT_STORED] = None
    provenance: Provenance

    def to_dataframe(self) -> pd.DataFrame:
        return self.table

    def plot(self):
        with plots.canvas() as (figure, _):
            return figure


@pytest.fixture
def many(counts, monkeypatch) -> Many:
    monkeypatch.setattr(Many, "__module__", Counts.__module__)
    return Many(
        table=pd.DataFrame({"x": [0.1 + 0.2, np.nan], "name": ["NA", ""]}),
        texts=pd.DataFrame({"name": ["NA", ""], "count": [None, 2]}).astype({"count": "Int64"}),
        plain=pd.DataFrame({"loss": [0.1 + 0.2, 1 / 3, 5e-324]}),
        array=np.arange(6.0).reshape(2, 3) / 7,
        part=Part(
            weights=MappingProxyType({"a": float("nan")}),
            pairs=((1, "x"),),
            task=ConceptTask(bits=3),
        ),
        ends=(-float("inf"), float("inf")),
        live=object(),
        provenance=counts.provenance,
    )


def test_every_field_is_stored_by_its_type(many, tmp_path):
    folder = many.save(tmp_path)
    assert names(folder) == {
        "table.parquet", "texts.csv", "plain.csv", "arrays.npz", "curve.svg", "curve.png", RECORD,
    }  # fmt: skip
    again = load_result(folder)
    assert isinstance(again, Many)
    for name in ("table", "texts", "plain"):  # exact, to the last bit
        pd.testing.assert_frame_equal(getattr(again, name), getattr(many, name), check_exact=True)
    assert np.array_equal(again.array, many.array) and again.other is None
    assert (again.ends, again.note, again.live) == (many.ends, None, None)
    assert np.isnan(again.part.weights["a"])
    assert (again.part.pairs, again.part.task) == (many.part.pairs, many.part.task)


@pytest.mark.parametrize("name", ["table.parquet", "texts.csv", "arrays.npz", "ends", "part"])
def test_a_result_that_is_not_complete_is_refused(name, many, tmp_path):
    folder = many.save(tmp_path / "run")
    if name == "part":
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({**record, name: {"pairs": [[1, 2, 3]]}}))
    elif name == "ends":
        record = json.loads((folder / RECORD).read_text())
        del record["ends"]
        (folder / RECORD).write_text(json.dumps(record))
    else:
        (folder / name).unlink()
    with pytest.raises(InputError, match="is not complete") as caught:
        load_result(folder)
    assert str(folder) in str(caught.value) and "--overwrite" in str(caught.value)


def test_a_table_without_its_columns_is_refused(many, tmp_path):
    folder = many.save(tmp_path)
    (folder / "texts.csv").write_text("title\nx\n")
    with pytest.raises(InputError, match=r"texts\.csv is not the file that was saved"):
        load_result(folder)
    without_hashes(folder)
    with pytest.raises(InputError, match=r"texts\.csv lacks columns: \['name'\]"):
        load_result(folder)


# ---------------------------------------------------------------- folders that cannot be used


def test_a_folder_without_a_record(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError) as caught:
            load_result(folder)
        for part in (str(folder), RECORD, "--out"):
            assert part in str(caught.value)


def test_a_file_for_a_folder(tmp_path):
    path = tmp_path / "items.parquet"
    path.write_text("")
    with pytest.raises(InputError, match=r"items\.parquet"):
        load_result(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"kind": "x"}', b"\xff\xfe"],
    ids=["empty", "cut short", "list", "null", "no fields", "no type", "not UTF-8"],
)
def test_a_record_that_is_none(text, tmp_path):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / RECORD).write_bytes(data)
    with pytest.raises(InputError, match="is not the record of a result") as caught:
        load_result(tmp_path)
    assert str(tmp_path / RECORD) in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        "os:system",
        "pathlib:Path",
        "tests.hijacklens.test_results:Counts",
        "hijacklens:Fact",
        "hijacklens.results.result:Provenance",
        "hijacklens.results.result:Result",
        "hijacklens.results.result:Nothing",
        "hijacklens.no_such_module:Counts",
        "hijacklens.standin_of_the_tests:NOT_A_TYPE",
        "hijacklens..results:Result",
        "hijacklens.results.result",
        "hijacklensx.results:Result",
        "",
        "3",
    ],
)
def test_a_type_that_is_no_result_of_ours(kind, counts, tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"type": kind}))
    with pytest.raises(InputError) as caught:
        load_result(tmp_path)
    for part in (str(tmp_path / RECORD), repr(kind), "this version of hijacklens"):
        assert part in str(caught.value)


def test_nothing_outside_our_packages_is_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module_of_a_record.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / RECORD).write_text(json.dumps({"type": "evil_module_of_a_record:Result"}))
    with pytest.raises(InputError):
        load_result(tmp_path)
    assert "evil_module_of_a_record" not in sys.modules


def test_claiming_a_folder_makes_it_and_its_parents(tmp_path):
    folder = claim_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    (folder / "notes.txt").write_text("mine")
    assert claim_folder(folder) == folder  # other files do no harm
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("below", [False, True], ids=["a file", "below a file"])
def test_claiming_a_file_is_refused(below, tmp_path):
    path = tmp_path / "taken"
    path.write_text("mine")
    target = path / "run" if below else path
    with pytest.raises(InputError) as caught:
        claim_folder(target, overwrite=True)
    assert str(target) in str(caught.value)
    assert path.read_text() == "mine"


# ---------------------------------------------------------------- whole files


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_written_whole_or_not_at_all(error, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        assert part.suffix == ".csv"  # writers choose their format by it
        assert path.read_text() == "old"
        raise error

    with pytest.raises(error):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"table.csv"}
    write_whole(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new"
    assert names(tmp_path) == {"table.csv"}


@pytest.mark.parametrize(
    ("value", "read"),
    [
        pytest.param(float("nan"), None, id="nan"),
        pytest.param(float("inf"), None, id="inf"),
        pytest.param(-float("inf"), None, id="-inf"),
        pytest.param(np.float64("nan"), None, id="numpy nan"),
        pytest.param(np.float64(0.5), 0.5, id="numpy float"),
        pytest.param(np.float32(0.5), 0.5, id="numpy float32"),
        pytest.param(np.int64(3), 3, id="numpy int"),
        pytest.param((1, (2.0, float("nan"))), [1, [2.0, None]], id="nested tuples"),
        pytest.param({"a": {1: float("nan")}}, {"a": {"1": None}}, id="nested, number for a key"),
        pytest.param(range(3), [0, 1, 2], id="range"),
        pytest.param("Zürich 北京", "Zürich 北京", id="text"),
        pytest.param(True, True, id="bool"),
        pytest.param(None, None, id="None"),
    ],
)
def test_a_record_is_strict_json(value, read, tmp_path):
    write_json(tmp_path / "r.json", {"value": value})
    text = (tmp_path / "r.json").read_text(encoding="utf-8")

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(text, parse_constant=no_constant) == {"value": read}
    assert text.endswith("}\n")
    if isinstance(value, str):
        assert value in text  # readable, not escaped


def test_a_set_is_written_in_one_order(tmp_path):
    words = {f"P{i}" for i in range(50)}
    write_json(tmp_path / "r.json", {"value": words})
    assert json.loads((tmp_path / "r.json").read_text())["value"] == sorted(words)


# ---------------------------------------------------------------- provenance


def test_provenance_of_this_process():
    before = datetime.now(timezone.utc).replace(microsecond=0)
    found = Provenance.now(seed=3)
    assert before <= datetime.fromisoformat(found.created) <= datetime.now(timezone.utc)
    assert found.seed == 3
    assert Provenance.now().seed is None
    assert set(found.versions) == set(PACKAGES)
    assert "not installed" not in found.versions.values()
    assert found.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/hijacklens", "hijack", "--model", "gpt2"], "hijacklens hijack --model gpt2"),
        (["/tmp/script.py", "--x"], "python"),
        ([""], "python"),
        ([], "python"),
    ],
    ids=["command line", "script", "notebook", "embedded"],
)
def test_the_command(argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert Provenance.now().command == command


def test_the_command_can_be_typed_again(monkeypatch):
    argv = ["hijacklens", "ask", "The Eiffel Tower is in", "--template", "Don't say {target_false}"]
    monkeypatch.setattr(sys, "argv", argv)
    assert shlex.split(Provenance.now().command) == argv
