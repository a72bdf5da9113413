"""Fuzz: facts files of every layout and ending, damaged in every way."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from campaign import campaign, holds, writing_only_below
from hostile import HOSTILE, words
from hypothesis import given
from hypothesis import strategies as st

from hijacklens.errors import InputError
from hijacklens.facts.loading import ENDINGS, counterfact
from hijacklens.facts.records import facts_from_records

TEXT = st.sampled_from(HOSTILE) | st.text(max_size=12) | st.just("Paris")
NUMBER = (
    st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.booleans()
    | st.sampled_from(["7", "7.0", "\uff11", "\u0663", "-1", "9" * 30, "9" * 5000])
)
VALUE = st.recursive(
    st.none() | TEXT | NUMBER,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
FIELDS = words(
    "case_id relation_id subject template prompt target_true target_false target_new ground_truth "
    "near_true near_false target_true_id relation requested_rewrite"
)
GOOD: tuple[dict[str, Any], ...] = (
    {
        "case_id": 1,
        "relation_id": "P36",
        "subject": "Italy",
        "template": "The capital of {} is",
        "target_true": "Rome",
        "target_false": "Tokyo",
    },
    {
        "case_id": 2,
        "requested_rewrite": {
            "prompt": "{} speaks",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": "Danielle",
        },
    },
    {
        "case_id": 3,
        "relation": "{} plays",
        "prompt": "Federer plays",
        "relation_id": "P641",
        "target_true": " tennis",
        "target_false": " chess",
        "subject": "Federer",
    },
    {"case_id": 4, "prompt": "Lyon is in", "subject": "Lyon", "ground_truth": "France",
     "target_new": "Peru"},
)  # fmt: skip


@st.composite
def a_record(draw: Any) -> Any:
    """A good record of some layout with some of its fields changed, or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUE)
    record = dict(draw(st.sampled_from(GOOD)))
    if "requested_rewrite" in record and draw(st.booleans()):
        inner = dict(record["requested_rewrite"])
        inner[draw(st.sampled_from(list(inner)))] = draw(VALUE)
        record["requested_rewrite"] = inner
    for _ in range(draw(st.integers(0, 3))):
        field = draw(st.sampled_from(FIELDS))
        if draw(st.booleans()):
            record.pop(field, None)
        else:
            record[field] = draw(VALUE)
    return record


RECORDS = st.lists(a_record(), max_size=5)


def use(records: Any) -> None:
    """What a run does with facts before a model sees them."""
    facts = facts_from_records(records, name="fuzz")
    facts.content_hash()
    facts.to_dataframe().to_csv(os.devnull)
    assert str(facts)
    facts.limit(1).relations()
    facts.without_leaks().without_disputed()
    for relation in facts.relations():
        facts.where(relation=relation)
    facts.where(case_ids=[facts[0].case_id])


@campaign(50, 5_000)
@given(RECORDS)
def test_records(records):
    holds("facts: records", lambda: use(records))


def as_bytes(records: list[Any], ending: str) -> bytes:
    """A facts file; records that its format cannot hold are left out."""
    stem = ending.removesuffix(".gz")
    if stem == ".json":
        data = json.dumps(records).encode()
    elif stem == ".jsonl":
        data = "\n".join(map(json.dumps, records)).encode()
    elif stem == ".csv":
        stream = io.StringIO()
        rows = [{str(k): v for k, v in r.items()} for r in records if isinstance(r, dict)]
        names = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
        data = stream.getvalue().encode(errors="replace")
    else:
        stream = io.BytesIO()
        rows = [r for r in records if isinstance(r, dict)]
        try:
            pd.DataFrame(rows).to_parquet(stream)
        except (ValueError, TypeError, OverflowError, pyarrow.ArrowException):  # mixed types
            pd.DataFrame(list(GOOD[:1])).to_parquet(stream)
        data = stream.getvalue()
    return gzip.compress(data) if ending.endswith(".gz") else data


@st.composite
def damage(draw: Any, data: bytes) -> bytes:
    """Bytes as they are, cut short, with some changed, or in another encoding."""
    way = draw(st.sampled_from(["none", "cut", "change", "insert", "utf-16", "latin-1", "bom"]))
    if way == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if way in ("change", "insert"):
        array = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, max(0, len(array) - 1)))
            piece = draw(st.binary(min_size=1, max_size=3) | st.sampled_from([b"\0", b"\xff\xfe"]))
            array[place : place + (len(piece) if way == "change" else 0)] = piece
        return bytes(array)
    if way == "bom":
        return b"\xef\xbb\xbf" + data
    if way in ("utf-16", "latin-1"):
        return (data.decode("utf-8", errors="replace") + "é").encode(way, errors="replace")
    return data


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("facts")


@campaign(50, 5_000)
@given(data=st.data())
def test_files(data, room):
    ending = data.draw(st.sampled_from(ENDINGS))
    content = data.draw(damage(as_bytes(data.draw(RECORDS), ending)))
    path = room / f"facts{ending}"
    path.write_bytes(content)
    with writing_only_below(room):
        holds("facts: files", lambda: counterfact(path).content_hash(), says="facts")


NAMES = st.sampled_from(
    ["", ".", "..", "~", "~nobody/x.json", "/", "/dev/null", "a\0b", "x" * 5000, "a/b/c", "\ud800",
     "nope.json", "-", "https://example.com/x.json", "C:\\x.json"]
) | st.text(max_size=8)  # fmt: skip


@campaign(15, 300)
@given(NAMES)
def test_names(name):
    holds("facts: names", lambda: counterfact(name))


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("ending", ENDINGS)
def test_things_that_are_no_files(ending, tmp_path):
    pipe, folder = tmp_path / f"pipe{ending}", tmp_path / f"folder{ending}"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder, tmp_path / f"missing{ending}"):
        assert holds("facts: no files", lambda path=path: counterfact(path), says=path.name) == (
            "refused"
        )


def test_deep_nesting_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    assert holds("facts: deep", lambda: counterfact(path), says="deep.json") == "refused"
    path = tmp_path / "deep.jsonl"
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert holds("facts: deep", lambda: counterfact(path), says="deep.jsonl") == "refused"


def test_a_cell_of_megabytes(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_text(f"subject,template,target_true,target_false\n{'x' * 500_000},{{}} is,a,b\n")
    holds("facts: huge", lambda: counterfact(path), says="wide.csv")


@pytest.mark.parametrize("ending", [".json.gz", ".csv.gz", ".parquet"])
def test_a_small_file_with_far_too_much_is_refused(ending, tmp_path):
    """Ten thousand times the size of the file, and millions of equal rows."""
    path = tmp_path / f"bomb{ending}"
    if ending == ".parquet":
        rows = pyarrow.array(["x"]).take(pyarrow.array([0] * 2_000_000))
        pyarrow.parquet.write_table(pyarrow.table({"subject": rows}), path)
    else:
        with gzip.open(path, "wb") as stream:
            for _ in range(30):
                stream.write(b" " * 1_000_000)
    assert holds("facts: bombs", lambda: counterfact(path), says="could use up the memory") == (
        "refused"
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("[]")
    path.chmod(0)
    assert holds("facts: permission", lambda: counterfact(path), says="mine.json") == "refused"


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    path.write_text("[]")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"mine\.json.*Permission denied"):
        counterfact(path)
