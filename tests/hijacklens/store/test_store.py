"""The store by itself: what is kept comes back bit for bit, or not at all, whatever the file."""

from __future__ import annotations

import os
import random
import sqlite3
import warnings
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from forked import finish, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hijacklens.engine.reading import Reading
from hijacklens.errors import InputError
from hijacklens.prompts.prefixes import prefix_of
from hijacklens.store import database
from hijacklens.store.contents import Store, chosen_store
from hijacklens.store.database import (
    Database,
    StoreWarning,
    aside_from,
)
from hijacklens.store.fingerprint import Fingerprint
from hijacklens.store.store import OpenStore, names_of

FINGERPRINT = Fingerprint(
    model="tiny",
    revision=None,
    architecture="A",
    parameters=7,
    arithmetic="float32",
    weights="w",
    computation="c",
    tokenizer="t",
    probes=(),
    spans=(),
    versions="torch 2",
)
ONE = Reading({7: -0.5}, top_token=7, top_logprob=-0.5)


@contextmanager
def opened(path, fingerprint=FINGERPRINT, **options):
    with closing(Database(path, **options)) as database_:
        yield OpenStore(database_, fingerprint)


@pytest.mark.parametrize("value", ["off", "OFF", "0", "no", "False", " none "])
def test_the_switch_is_off_in_every_usual_spelling(value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIJACKLENS_STORE", value)
    assert chosen_store(True) is None


@pytest.mark.parametrize("value", ["", "on", "ON", "1", "yes", "true"])
def test_the_switch_may_also_be_on(value, monkeypatch, tmp_path):
    monkeypatch.setenv("HIJACKLENS_CACHE", str(tmp_path))
    monkeypatch.setenv("HIJACKLENS_STORE", value)
    found = chosen_store(True)
    assert found is not None and found.path.parent == tmp_path
    monkeypatch.setenv("HIJACKLENS_STORE", "caf\udce9.sqlite")
    with pytest.raises(InputError, match="HIJACKLENS_STORE is not UTF-8"):
        chosen_store(True)


def some_readings(n=2000, seed=0):
    draw = random.Random(seed)
    return {
        tuple(draw.randrange(50_000) for _ in range(draw.randrange(1, 30))): Reading(
            {draw.randrange(50_000): -draw.random() for _ in range(draw.randrange(3))},
            draw.randrange(50_000),
            -draw.random(),
        )
        for _ in range(n)
    }


def wanted(readings):
    return {prefix: set(reading.logprobs) for prefix, reading in readings.items()}


logprobs = st.floats(max_value=0, allow_nan=False, allow_infinity=False)
tokens = st.integers(0, 2**31 - 1)


def execute(path, statement, *values):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(st.integers(0, 2**63 - 1), min_size=1).map(tuple),
    st.dictionaries(tokens, logprobs, max_size=4),
    tokens,
    logprobs,
)
def test_any_reading_comes_back_bit_for_bit(tmp_path, prefix, values, token, logprob):
    reading = Reading(values, token, logprob)
    with opened(tmp_path / "s.sqlite") as store:
        Store(store.path).clear()
        store.keep({prefix: reading})
        assert store.find({prefix: set(values)}) == {prefix: reading}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE readings SET top_token = 8",
        "UPDATE readings SET top_logprob = top_logprob * (1 + 1e-15)",
        "UPDATE readings SET top_logprob = 'text'",
        "UPDATE readings SET top_token = x'00'",
        "UPDATE readings SET prefix = x'00112233445566778899aabbccddeeff'",
        "UPDATE readings SET checksum = checksum + 1",
        "UPDATE readings SET fingerprint = 2",
        "UPDATE readings SET logprobs = replace(logprobs, '7', '8')",
        "UPDATE readings SET logprobs = '{}'",
        "UPDATE readings SET logprobs = CAST(x'ff00fe' AS TEXT)",
        "UPDATE readings SET logprobs = x'7b7d'",
    ],
)
def test_a_value_that_was_not_written_is_never_read(tmp_path, change):
    path = tmp_path / "s.sqlite"
    with opened(path) as store:
        store.keep({(1, 2): ONE})
    execute(path, change)
    damaged = not any(word in change for word in ("SET prefix", "SET fingerprint"))
    warned = (
        pytest.warns(StoreWarning, match="the checksum of a reading is wrong")
        if damaged
        else nullcontext()
    )
    with opened(path) as store, warned:
        assert store.find({(1, 2): {7}}) == {}
    assert len(aside_from(path)) == damaged


def test_readings_that_change_their_fingerprint_are_never_read(tmp_path):
    path, other = tmp_path / "s.sqlite", replace(FINGERPRINT, weights="other")
    for fingerprint in (FINGERPRINT, other):
        with opened(path, fingerprint) as store:
            store.keep({(1, 2): ONE})
    execute(path, "UPDATE fingerprints SET key = 'x' WHERE id = 1")
    execute(path, "UPDATE fingerprints SET key = ? WHERE id = 2", FINGERPRINT.key)
    with opened(path) as store, pytest.warns(StoreWarning, match="the checksum of a reading"):
        assert store.find({(1, 2): {7}}) == {}


def test_prefixes_have_different_names():
    symbols = [(1,), (1, 0), (0, 1), (1 | 1 << 32,), (2**62,), (256,), (1, 1)]
    assert len(set(names_of([prefix_of(prefix) for prefix in symbols]))) == len(symbols)


def test_what_is_kept_is_found(tmp_path):
    readings = some_readings()
    with opened(tmp_path / "new" / "folders" / "s.sqlite") as store:
        assert store.find(wanted(readings)) == {}
        store.keep(readings)
        assert store.find(wanted(readings)) == readings
        assert store.find({(-1,): set(), **wanted(readings)}) == readings
        path = store.path
    with opened(path) as again:
        assert again.find(wanted(readings)) == readings
    with closing(sqlite3.connect(path)) as connection:
        # Who reads does not stop who writes.
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_readings_of_one_prefix_are_merged_and_do_not_change(tmp_path):
    with opened(tmp_path / "s.sqlite") as store:
        store.keep({(1, 2): ONE})
        assert store.find({(1, 2): {7, 8}}) == {}  # a token is missing: it is to be read again
        store.keep({(1, 2): Reading({7: -0.6, 8: -2.0}, 9, -0.1)})
        assert store.find({(1, 2): {7, 8}}) == {(1, 2): Reading({7: -0.5, 8: -2.0}, 7, -0.5)}
        store.keep({(1, 2): Reading({}, 9, -0.1)})
        assert store.find({(1, 2): {8}}) == {(1, 2): Reading({8: -2.0}, 7, -0.5)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_kept(tmp_path, value):
    with opened(tmp_path / "s.sqlite") as store:
        store.keep({(1,): Reading({7: -0.5, 8: value}, 7, -0.5)})
        store.keep({(2,): Reading({7: -0.5}, 7, value), (3,): ONE})
        assert store.find({(1,): (), (2,): (), (3,): {7}}) == {(3,): ONE}


def test_fingerprints_do_not_mix(tmp_path):
    fingerprints = [
        FINGERPRINT,
        replace(FINGERPRINT, probes=("knock-out",)),
        replace(FINGERPRINT, arithmetic="bfloat16"),
        replace(FINGERPRINT, weights="edited"),
    ]
    for i, fingerprint in enumerate(fingerprints):
        with opened(tmp_path / "s.sqlite", fingerprint) as store:
            assert store.find({(1,): {7}}) == {}
            store.keep({(1,): Reading({7: -float(i)}, 7, 0.0)})
    for i, fingerprint in enumerate(fingerprints):
        with opened(tmp_path / "s.sqlite", replace(fingerprint, model="renamed")) as store:
            assert store.find({(1,): {7}})[1,].logprobs == {7: -float(i)}


def full_store(path):
    """A store with many readings, in one file without a log."""
    readings = some_readings()
    with opened(path) as store:
        store.keep(readings)
    assert not path.with_name(path.name + "-wal").exists()
    return readings


def is_true_or_missing(path, readings):
    """Whatever is found is what was written; then the store works."""
    with opened(path) as store:
        found = store.find(wanted(readings))
        assert found.items() <= readings.items()
        store.keep({(1, 2): ONE})
        assert store.find({(1, 2): {7}}) == {(1, 2): ONE}
        store.keep(readings)
        assert store.find(wanted(readings)) == readings
        assert not store.off
    return found


@pytest.mark.parametrize("fraction", [0.002, 0.02, 0.3, 0.5, 0.75, 0.999])
def test_a_truncated_file_is_set_aside(tmp_path, fraction):
    path = tmp_path / "s.sqlite"
    readings = full_store(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.warns(StoreWarning, match=r"is broken .* set aside as 's.sqlite.aside-1'"):
        found = is_true_or_missing(path, readings)
    assert found == {}
    (aside,) = aside_from(path)
    assert aside.read_bytes() == content[: int(len(content) * fraction)]


def test_an_empty_file_is_a_new_store(tmp_path):
    path = tmp_path / "s.sqlite"
    path.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        is_true_or_missing(path, some_readings(10))


def foreign(path, statements):
    with closing(sqlite3.connect(path)) as made:
        for statement in statements:
            made.execute(statement)
        made.commit()


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["CREATE TABLE mine (a)", "INSERT INTO mine VALUES (1)"], "of another program"),
        (["CREATE TABLE readings (a)", "PRAGMA application_id = 5"], "of another program"),
        (["PRAGMA application_id = 5"], "of another program"),
        (
            [f"PRAGMA application_id = {database.APPLICATION_ID}", "PRAGMA user_version = 99"],
            "of version 99",
        ),
        ([*database.TABLES, "DROP TABLE readings"], "lacks tables"),
    ],
)
def test_a_foreign_database_is_set_aside_unchanged(tmp_path, statements, reason):
    path = tmp_path / "s.sqlite"
    foreign(path, statements)
    before = path.read_bytes()
    with pytest.warns(StoreWarning, match=reason):
        is_true_or_missing(path, some_readings(10))
    (aside,) = aside_from(path)
    assert aside.read_bytes() == before


@pytest.mark.parametrize("garbage", [b"no database at all", bytes(range(256)) * 500])
def test_a_file_that_is_no_database_is_set_aside(tmp_path, garbage):
    path = tmp_path / "s.sqlite"
    for number in (1, 2):
        path.write_bytes(garbage)
        with pytest.warns(StoreWarning, match=f"not a database.*aside-{number}'"):
            is_true_or_missing(path, some_readings(10))
        assert len(aside_from(path)) == number
        assert aside_from(path)[-1].read_bytes() == garbage


@pytest.mark.parametrize("seed", range(12))
def test_garbage_in_the_file_never_becomes_a_reading(tmp_path, seed):
    draw = random.Random(seed)
    path = tmp_path / "s.sqlite"
    readings = full_store(path)
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 5, 50])):
        start = draw.randrange(len(content))
        length = draw.choice([1, 16, 4096])
        content[start : start + length] = draw.randbytes(len(content[start : start + length]))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # what is not read is not seen to be broken
        is_true_or_missing(path, readings)


def truncated(draw, content):
    del content[draw.randrange(len(content)) :]


def with_bits_flipped(draw, content):
    for _ in range(draw.choice([1, 3, 40])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def with_a_page_smashed(draw, content):
    start = 4096 * draw.randrange(len(content) // 4096)
    content[start : start + 4096] = draw.randbytes(4096)


def with_pages_swapped(draw, content):
    one, two = (4096 * draw.randrange(len(content) // 4096) for _ in range(2))
    first, second = content[one : one + 4096], content[two : two + 4096]
    content[one : one + 4096], content[two : two + 4096] = second, first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hijacklens.store.database.StoreWarning")
@pytest.mark.parametrize(
    "damage", [truncated, with_bits_flipped, with_a_page_smashed, with_pages_swapped]
)
def test_look_ups_in_damaged_files_are_true_or_missing(tmp_path, damage):
    """60 files of each kind, four look-ups in each. What is kept meanwhile may be missing too."""
    draw = random.Random(0)
    readings = full_store(tmp_path / "whole.sqlite")
    whole = (tmp_path / "whole.sqlite").read_bytes()
    for i in range(60):
        path = tmp_path / f"{i}.sqlite"
        content = bytearray(whole)
        damage(draw, content)
        path.write_bytes(content)
        with opened(path) as store:
            for _ in range(4):
                some = dict(draw.sample(sorted(readings.items()), 100))
                assert store.find(wanted(some)).items() <= readings.items()
                store.keep(dict(list(some.items())[:10]))


def test_a_file_that_breaks_while_it_is_open_is_set_aside(tmp_path):
    path = tmp_path / "s.sqlite"
    readings = full_store(path)
    with opened(path) as store:
        assert store.find({(1, 2): {7}}) == {}
        path.write_bytes(b"\xff" * path.stat().st_size)
        with pytest.warns(StoreWarning, match="set aside"):
            assert store.find(wanted(readings)) == {}
        store.keep(readings)
        assert store.find(wanted(readings)) == readings


def test_a_new_file_in_the_place_of_a_broken_one_stays(tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"broken, and noticed by two processes")
    seen_broken = path.stat()
    path.rename(tmp_path / "aside by the other process")
    readings = full_store(path)
    assert database.set_aside(path, seen_broken) is None
    path.rename(tmp_path / "away")
    assert database.set_aside(path, seen_broken) is None
    (tmp_path / "away").rename(path)
    assert is_true_or_missing(path, readings) == readings


def test_a_full_disk_turns_the_store_off_and_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "s.sqlite"
    readings = full_store(path)
    connect = database.connect

    def on_a_small_disk(path):
        connection = connect(path)
        ((pages,),) = connection.execute("PRAGMA page_count")
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(database, "connect", on_a_small_disk)
    more = some_readings(seed=1)
    with opened(path) as store:
        assert store.find(wanted(readings)) == readings
        with pytest.warns(StoreWarning, match=r"disk is full.*continues without it"):
            store.keep(more)
        assert "disk is full" in store.off
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # warned once
            store.keep(more)
            assert store.find(wanted(readings)) == {}
    monkeypatch.undo()
    with opened(path) as store:
        assert store.find(wanted(readings)) == readings
        assert store.find(wanted(more)) == {}  # all of a batch, or nothing


@pytest.mark.parametrize("name", ["file/s.sqlite", "folder"])
def test_a_path_that_cannot_be_used(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with opened(path, must=True) as store, pytest.raises(InputError, match="Name another file"):
        store.find({(1,): ()})
    with opened(path) as store:
        with pytest.warns(StoreWarning, match="continues without it"):
            assert store.find({(1,): ()}) == {}
        store.keep({(1,): ONE})
        assert store.off


def test_a_store_that_stays_locked_is_given_up(tmp_path, monkeypatch):
    path = tmp_path / "s.sqlite"
    readings = full_store(path)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other, opened(path) as store:
        other.execute("BEGIN IMMEDIATE")
        assert store.find(wanted(readings)) == readings  # who writes does not stop who reads
        with pytest.warns(StoreWarning, match="locked"):
            store.keep({(1,): ONE})
        other.execute("ROLLBACK")


def test_a_file_that_another_process_is_creating_is_opened(tmp_path, monkeypatch):
    """Its header and its tables are those of one moment."""
    path, attempts = tmp_path / "s.sqlite", []
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    connect = sqlite3.connect

    class Overtaken(sqlite3.Connection):
        def execute(self, statement, *arguments):
            found = super().execute(statement, *arguments)
            if statement == "PRAGMA application_id" and not attempts:
                found = found.fetchall()  # the statement is over
                attempts.append(statement)
                monkeypatch.setattr(sqlite3, "connect", connect)
                with suppress(sqlite3.OperationalError):  # it may have to wait
                    database.connect(path).close()
            return found

    monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Overtaken))
    with closing(database.connect(path)) as store:
        assert store.execute("SELECT * FROM readings").fetchall() == []
    assert attempts


def test_a_new_file_that_another_process_reads_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    path = tmp_path / "s.sqlite"
    with closing(database.connect(path)) as other:
        other.execute("PRAGMA journal_mode = DELETE")  # the mode of a new file
        other.execute("BEGIN")
        other.execute("SELECT * FROM readings").fetchall()
        database.connect(path).close()
    with closing(database.connect(path)) as now:
        assert now.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "s.sqlite"
    shares = [some_readings(300, seed) for seed in range(4)]
    common = {(1, 2, 3): {i: -float(i) for i in range(4)}}

    def work(i):
        warnings.simplefilter("error")
        with opened(path) as store:
            listed = list(shares[i].items())
            for first in range(0, len(listed), 10):
                store.keep(dict(listed[first : first + 10]))
                store.keep({(1, 2, 3): Reading({i: -float(i)}, 0, 0.0)})
            assert store.find(wanted(shares[i])) == shares[i]

    children = [start(lambda i=i: work(i)) for i in range(4)]
    assert [finish(child) for child in children] == [0] * 4
    with opened(path) as store:
        for share in shares:
            assert store.find(wanted(share)) == share
        assert store.find(common)[1, 2, 3].logprobs == common[1, 2, 3]


def test_clearing_while_a_run_continues(tmp_path):
    path = tmp_path / "s.sqlite"
    with opened(path) as store:
        store.keep({(1,): ONE})
        assert Store(path).clear() == 1
        with opened(path, replace(FINGERPRINT, weights="other")) as other:
            other.keep({(1,): Reading({7: -9.0}, 7, -9.0)})
        assert store.find({(1,): {7}}) == {}
        store.keep({(2,): ONE})
        assert store.find({(1,): {7}, (2,): {7}}) == {(2,): ONE}


def test_contents_and_clear(tmp_path):
    path = tmp_path / "s.sqlite"
    assert Store(path).contents().rows == ()
    assert Store(path).clear() == 0
    assert not path.exists()  # looking makes nothing
    big = replace(FINGERPRINT, model="big", weights="more", probes=("one", "two"))
    for fingerprint, n in ((FINGERPRINT, 3), (big, 2000), (replace(big, probes=()), 5)):
        with opened(path, fingerprint) as store:
            store.keep(some_readings(n))
    contents = Store(path).contents()
    assert [(row.model, row.probes, row.readings) for row in contents.rows] == [
        ("tiny", (), 3),
        ("big", ("one", "two"), 2000),
        ("big", (), 5),
    ]
    assert contents.size >= 2000 * 40
    assert contents.to_dataframe()["readings"].tolist() == [3, 2000, 5]
    assert Store(path).count(model="big") == 2005
    with pytest.raises(InputError, match="unknown model in the store 'bog'; did you mean 'big'"):
        Store(path).clear(model="bog")
    assert Store(path).clear(model="big") == 2005
    assert Store(path).contents().size < contents.size / 4
    with opened(path) as store:
        readings = some_readings(3)
        assert store.find(wanted(readings)) == readings
    assert Store(path).clear() == 3
    assert Store(path).count() == 0


def test_which_store_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("HIJACKLENS_CACHE", str(tmp_path))
    monkeypatch.delenv("HIJACKLENS_STORE")
    usual = Store(tmp_path / "readings-v3.sqlite")
    assert chosen_store(True) == usual
    assert chosen_store(False) is None
    assert chosen_store(usual) is usual
    assert chosen_store("~/s.sqlite") == Store(Path("~/s.sqlite").expanduser())
    monkeypatch.setenv("HIJACKLENS_STORE", str(tmp_path / "other"))
    assert chosen_store(True) == Store(tmp_path / "other")
    monkeypatch.setenv("HIJACKLENS_STORE", "off")
    assert chosen_store(True) is None
    assert chosen_store(tmp_path / "named") == Store(tmp_path / "named")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with opened(tmp_path / "s.sqlite") as store, pytest.warns(StoreWarning, match="unable"):
            store.keep({(1,): ONE})
    finally:
        tmp_path.chmod(0o700)
