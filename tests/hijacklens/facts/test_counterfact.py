"""CounterFact from files of every format and layout, and from damaged input."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.facts.loading import HUB_ID, PATH_VARIABLE, counterfact
from hijacklens.facts.records import ONE_THING, RECONSTRUCTED

# ---------------------------------------------------------------- small files of every layout

FACTS = (
    Fact(
        case_id=0,
        relation_id="P103",
        subject="Danielle Darrieux",
        template="The mother tongue of {} is",
        target_true="French",
        target_false="English",
        near_true="France",
        near_false="England",
    ),
    Fact(
        case_id=4,
        relation_id="P190",
        subject="Lyon",
        template="What is the twin city of {}? It is",
        target_true="Beirut",
        target_false="Manila",
    ),
    Fact(
        case_id=7,
        relation_id="P36",
        subject='Île-de-France "北京", Ü',
        template="{}, 🗼 whose capital is",
        target_true="São Paulo",
        target_false="Kraków",
    ),
)


def nested(fact: Fact) -> dict:
    return {
        "case_id": fact.case_id,
        "requested_rewrite": {
            "prompt": fact.template,
            "relation_id": fact.relation_id,
            "target_new": {"str": fact.target_false, "id": None},
            "target_true": {"str": fact.target_true, "id": None},
            "subject": fact.subject,
        },
        "neighborhood_prompts": ["The twin city of Trieste is"],
    }


def tracing(fact: Fact) -> dict:
    prefix, suffix = fact.template.split("{}")
    return {
        "case_id": fact.case_id,
        "relation": fact.template,
        "relation_prefix": prefix,
        "relation_suffix": suffix,
        "prompt": fact.prompt,
        "relation_id": fact.relation_id,
        "target_true": f" {fact.target_true}",
        "target_false": f" {fact.target_false}",
        "target_true_id": None,
        "target_false_id": None,
        "subject": fact.subject,
    }


def easyedit(fact: Fact) -> dict:
    return {
        "case_id": fact.case_id,
        "prompt": fact.prompt,
        "target_new": fact.target_false,
        "subject": fact.subject,
        "ground_truth": fact.target_true,
        "rephrase_prompt": "a rephrased prompt",
        "locality_prompt": "a locality prompt",
    }


def own(fact: Fact) -> dict:
    return {
        "case_id": fact.case_id,
        "relation_id": fact.relation_id,
        "subject": fact.subject,
        "template": fact.template,
        "target_true": fact.target_true,
        "target_false": fact.target_false,
    }


Records = list[dict]


def array(records: Records) -> bytes:
    return json.dumps(records, indent=1, ensure_ascii=False).encode()


def lines(records: Records) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def table(records: Records) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().encode()


def parquet(records: Records) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, tuple[str, Callable[[Records], bytes]]] = {
    "array": ("facts.json", array),
    "lines in .json": ("facts.json", lines),
    "lines": ("facts.jsonl", lines),
    "array, escaped": ("facts.json", lambda r: json.dumps(r).encode()),
    "array after spaces": ("facts.json", lambda r: b"\n  " + array(r)),
    "blank lines": ("facts.jsonl", lambda r: b"\n" + lines(r).replace(b"\n", b"\n\n")),
    "Windows line ends": ("facts.jsonl", lambda r: lines(r).replace(b"\n", b"\r\n")),
    "byte order mark": ("facts.jsonl", lambda r: b"\xef\xbb\xbf" + lines(r)),
    "array.gz": ("facts.json.gz", lambda r: gzip.compress(array(r))),
    "lines.gz": ("facts.jsonl.gz", lambda r: gzip.compress(lines(r))),
    "parquet": ("facts.parquet", parquet),
}
FLAT_FORMATS = {
    "csv": ("facts.csv", table),
    "csv with a byte order mark": ("facts.csv", lambda r: b"\xef\xbb\xbf" + table(r)),
    "csv.gz": ("facts.csv.gz", lambda r: gzip.compress(table(r))),
}
LAYOUTS = {"nested": nested, "tracing": tracing, "easyedit": easyedit, "own": own}


def published() -> list:
    return [
        pytest.param(record, name, write, id=f"{layout} as {kind}")
        for layout, record in LAYOUTS.items()
        for kind, (name, write) in {
            **FORMATS,
            **({} if layout == "nested" else FLAT_FORMATS),
        }.items()
    ]


def core(fact: Fact) -> tuple:
    """What every layout has."""
    return fact.case_id, fact.subject, fact.template, fact.target_true, fact.target_false


@pytest.mark.parametrize(("record", "name", "write"), published())
def test_every_layout_and_format_gives_the_same_facts(record, name, write, tmp_path):
    path = tmp_path / name
    path.write_bytes(write([record(fact) for fact in FACTS]))
    read = counterfact(path)
    assert read.skipped == ()
    assert read.name == name
    assert [core(fact) for fact in read] == [core(fact) for fact in FACTS]
    if record is not easyedit:  # which names no relations
        assert read.content_hash() == FactSet(FACTS, name="").content_hash()


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"], ids=ascii)
@pytest.mark.parametrize("kind", ["array", "lines", "parquet", "csv"])
def test_a_subject_may_hold_what_unicode_calls_a_line_end(kind, odd, tmp_path):
    fact = Fact(**{**own(FACTS[1]), "subject": f"Ly{odd}on"})
    name, write = {**FORMATS, **FLAT_FORMATS}[kind]
    path = tmp_path / name
    path.write_bytes(write([own(fact)]))
    assert [core(read) for read in counterfact(path)] == [core(fact)]


def test_a_reconstructed_file_says_so(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(lines([tracing(fact) for fact in FACTS]))
    assert counterfact(path).note == RECONSTRUCTED


@pytest.mark.parametrize("ending", ["", "/"], ids=["plain", "with ./"])
def test_a_path_may_be_a_text_relative_or_below_home(ending, tmp_path, monkeypatch):
    (tmp_path / "facts.jsonl").write_bytes(lines([own(FACTS[1])]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = "./facts.jsonl" if ending else "facts.jsonl"
    assert len(counterfact(given)) == len(counterfact("~/facts.jsonl")) == 1


def test_the_variable_names_the_default_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(lines([own(FACTS[1])]))
    monkeypatch.setenv(PATH_VARIABLE, str(path))
    assert counterfact().name == "mine.jsonl"


# ---------------------------------------------------------------- input that cannot be used

LINES = lines([own(fact) for fact in FACTS])
LONG = lines([{**own(FACTS[1]), "case_id": i} for i in range(200)])


def damaged_gzip() -> bytes:
    """Whole in length, wrong in the middle."""
    whole = bytearray(gzip.compress(LONG))
    for i in range(30, 60):
        whole[i] ^= 0xFF
    return bytes(whole)


BAD = {
    "empty .json": ("f.json", b"", ["f.json", "holds no record", "Allowed layouts"]),
    "empty .jsonl": ("f.jsonl", b"\n \n", ["holds no record"]),
    "empty array": ("f.json", b"[]", ["holds no record"]),
    "empty .csv": ("f.csv", b"", ["holds no record"]),
    "csv of a header alone": ("f.csv", b"subject,template\n", ["holds no record"]),
    "empty .parquet": ("f.parquet", b"", ["f.parquet", "not a complete parquet"]),
    "parquet without rows": ("f.parquet", parquet([]), ["holds no record"]),
    "empty .gz": ("f.jsonl.gz", b"", ["f.jsonl.gz"]),
    "wrong columns in json": (
        "f.json",
        b'[{"question": "?", "answer": "!"}]',
        ["f.json", "(question, answer)", "no known layout", "Allowed layouts", "EasyEdit"],
    ),
    "wrong columns in csv": ("f.csv", b"a,b\n1,2\n", ["(a, b)", "no known layout"]),
    "a csv with semicolons": (
        "f.csv",
        b"subject;template;target_true\nx;y;z\n",
        ["no known layout"],
    ),
    "numbers for records": ("f.json", b"[1, 2]", ["an object with named fields", "not 1"]),
    "a lone text": ("f.json", b'"facts"', ["an object with named fields"]),
    "texts missing": (
        "f.csv",
        b"subject,template,target_false\nx,y,z\n",
        ["required fields are missing: 'target_true'"],
    ),
    "wrong types": (
        "f.jsonl",
        lines([{**own(FACTS[0]), "subject": 5}]),
        ["none of the 1 records can be used", "subject must be text, not 5"],
    ),
    "truncated array": ("f.json", array([own(f) for f in FACTS])[:-40], ["not valid JSON"]),
    "truncated lines": ("f.jsonl", LINES[:-30], ["line 3", "not valid JSON", "record per line"]),
    "truncated gzip": ("f.jsonl.gz", gzip.compress(LONG)[:-40], ["not a complete gzip"]),
    "gzip cut in its header": ("f.jsonl.gz", gzip.compress(LONG)[:5], ["not a complete gzip"]),
    "damaged gzip": ("f.jsonl.gz", damaged_gzip(), ["not a complete gzip"]),
    "gzip in name only": ("f.jsonl.gz", LINES, ["not a complete gzip"]),
    "truncated parquet": (
        "f.parquet",
        parquet([own(f) for f in FACTS])[:-40],
        ["f.parquet", "not a complete parquet"],
    ),
    "parquet in name only": ("f.parquet", LINES, ["not a complete parquet"]),
    "UTF-16": ("f.jsonl", LINES.decode().encode("utf-16"), ["not UTF-8", "Save it as UTF-8"]),
    "UTF-16 without a mark": ("f.json", LINES.decode().encode("utf-16-le"), ["f.json"]),
    "Latin-1": ("f.csv", "subject,template\nZürich,{}".encode("latin-1"), ["not UTF-8"]),
    "unknown ending": ("f.xlsx", LINES, ["f.xlsx", "unknown ending", ".parquet", ".jsonl.gz"]),
    "no ending": ("facts", LINES, ["unknown ending"]),
}


@pytest.mark.parametrize(("name", "data", "parts"), BAD.values(), ids=BAD.keys())
def test_a_file_that_cannot_be_used_gets_one_clear_error(name, data, parts, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        counterfact(path)
    assert name in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("nowhere.json", ["'nowhere.json' does not exist", ".parquet", HUB_ID, "atlas"]),
        ("a/b/nowhere.csv.gz", ["does not exist"]),
        ("some/where/else", ["does not exist"]),
        ("./nowhere", ["does not exist"]),
        ("~nosuchuser/facts.json", ["~nosuchuser/facts.json"]),
        ("", ["''"]),
    ],
)
def test_a_missing_file_says_what_to_give(given, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    with pytest.raises(InputError) as caught:
        counterfact(given)
    for part in parts:
        assert part in str(caught.value)


def test_a_folder_is_no_facts_file(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        counterfact(tmp_path)


def test_some_bad_records_leave_the_others(tmp_path):
    records = [own(FACTS[0]), {**own(FACTS[1]), "target_true": ""}, own(FACTS[2]), own(FACTS[0])]
    path = tmp_path / "facts.jsonl"
    path.write_bytes(lines(records))
    read = counterfact(path)
    assert [fact.case_id for fact in read] == [0, 7]
    assert [row.reason for row in read.skipped] == [
        "record 2: case 4: target_true is empty.",
        "record 4: it repeats case 0 with identical content",
    ]


# ---------------------------------------------------------------- the complete CounterFact

FILES = (
    "counterfact_21919_flat.jsonl.gz",
    "counterfact_21919_rome_form.jsonl.gz",
    "counterfact_21919.parquet",
)
COUNTS = {  # counterfact.md, section 5
    "P30": 959, "P27": 958, "P413": 952, "P1412": 924, "P176": 920, "P103": 919, "P495": 904,
    "P37": 891, "P17": 875, "P136": 847, "P937": 846, "P106": 821, "P20": 816, "P449": 794,
    "P19": 779, "P740": 774, "P159": 756, "P364": 751, "P131": 715, "P190": 621, "P276": 612,
    "P178": 570, "P101": 545, "P1303": 513, "P39": 476, "P127": 433, "P140": 430, "P108": 350,
    "P641": 318, "P138": 279, "P407": 216, "P463": 163, "P36": 139, "P264": 53,
}  # fmt: skip


@pytest.fixture(scope="module")
def flat(shared: Path) -> FactSet:
    return counterfact(shared / "counterfact" / FILES[-1])


@pytest.mark.slow
def test_the_three_files_agree_record_by_record(shared):
    whole = {name: counterfact(shared / "counterfact" / name) for name in FILES}
    for name, facts in whole.items():
        assert len(facts) == 21_919, name
        assert facts.skipped == (), name
        names = f"in 6 records {ONE_THING} (the first: case 1118)."  # Christianity, Christian
        assert facts.note == f"{RECONSTRUCTED} {names}", name
    first, *others = whole.values()
    assert all(facts.facts == first.facts for facts in others)
    assert len({facts.content_hash() for facts in whole.values()}) == 1


def test_its_relations_and_their_sizes(flat):
    assert dict(flat.relations()) == COUNTS
    assert len(COUNTS) == 34
    assert [fact.case_id for fact in flat] == list(range(21_919))
    assert len({fact.subject for fact in flat}) == 20_391
    assert len({fact.target_false for fact in flat}) == 749
    assert len({fact.target_true for fact in flat}) == 821
    assert len({fact.prompt for fact in flat}) == 21_595


@pytest.mark.parametrize(
    ("case_id", "relation", "prompt", "true", "false"),
    [
        (0, "P103", "The mother tongue of Danielle Darrieux is", "French", "English"),
        (4, "P190", "What is the twin city of Lyon? It is", "Beirut", "Manila"),
        (40, "P190", "Kharkiv is a twin city of", "Warsaw", "Athens"),
        (262, "P641", "Hank Aaron professionally plays the sport", "baseball", "basketball"),
        (326, "P131", "Kalamazoo County can be found in", "Michigan", "Indiana"),
        (371, "P103", "The native language of Anatole France is", "French", "English"),
        (2592, "P276", "Eiffel Tower can be found in", "Paris", "Guam"),
        (21918, "P106", "Subair works as", "actor", "composer"),
    ],
)
def test_known_cases(flat, case_id, relation, prompt, true, false):
    (fact,) = flat.where(case_ids=[case_id])
    assert (fact.relation_id, fact.prompt) == (relation, prompt)
    assert (fact.target_true, fact.target_false) == (true, false)


def test_a_filter_and_a_seeded_sample(flat):
    twins = flat.where(relation="P190")
    assert len(twins) == 621
    sample = twins.sample(200, seed=0)
    assert len(sample) == 200
    assert sample.content_hash() == twins.sample(200, seed=0).content_hash()
    assert sample.content_hash() != twins.sample(200, seed=1).content_hash()


def test_leaks_and_disputes_are_found(flat):
    names_target = sum(fact.target_true in fact.subject for fact in flat)
    assert names_target == 2_006  # counterfact.md, section 4
    clean = flat.without_leaks()
    assert len(clean) <= 21_919 - 2_006
    assert not any(fact.target_true in fact.subject for fact in clean)
    assert len(flat) - len(flat.without_disputed()) == 110


def test_languages_have_near_words(flat):
    french = next(fact for fact in flat.where(relation="P1412") if fact.target_true == "French")
    assert french.near_true == "France"
    assert all(fact.near_true is None for fact in flat.where(relation="P190"))


@pytest.mark.slow
def test_the_easyedit_form_of_the_whole_agrees(flat, tmp_path):
    path = tmp_path / "counterfact-edit.json"
    path.write_bytes(array([easyedit(fact) for fact in flat]))
    read = counterfact(path)
    assert read.skipped == ()
    assert [core(fact) for fact in read] == [core(fact) for fact in flat]
