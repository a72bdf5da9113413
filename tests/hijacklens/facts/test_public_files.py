"""Rows as public data sets and spreadsheets have them: read as they are meant, or listed."""

from __future__ import annotations

import json

import pytest

from hijacklens.errors import InputError
from hijacklens.facts.loading import counterfact

HEADER = "case_id,relation_id,subject,template,target_true,target_false"
WALES = "1,P36,Wales,The capital of {} is,Cardiff,Leeds"
USA = "2,P36,the United States,The capital of {} is,Washington, D.C.,Philadelphia"
QUOTED = USA.replace("Washington, D.C.", '"Washington, D.C."')


def read(tmp_path, text, name="facts.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return counterfact(path)


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        pytest.param(USA, 7, id="a comma without quotes"),
        pytest.param("2,P36,Wales,The capital of {} is,Cardiff", 5, id="a missing cell"),
        pytest.param(WALES + ",", 7, id="a comma at the end"),
    ],
)
def test_a_row_with_other_cells_than_the_header_is_listed(row, cells, tmp_path):
    facts = read(tmp_path, f"{HEADER}\n\n{QUOTED}\n{row}\n")
    assert [fact.target_true for fact in facts] == ["Washington, D.C."]
    (skipped,) = facts.skipped
    assert skipped.reason.startswith(f"record 2: line 4 has {cells} cells for the 6 named columns")


def test_columns_without_a_name_hold_nothing(tmp_path):
    """Spreadsheets write empty columns; a split cell may fill one."""
    moved = USA + ","
    facts = read(tmp_path, f"{HEADER},,\n{WALES},,\n{moved}\n")
    assert [fact.case_id for fact in facts] == [1]
    assert "8 cells" in facts.skipped[0].reason


@pytest.mark.parametrize("index", ["0,", "0,x,"])
def test_first_columns_without_a_name_are_an_index(index, tmp_path):
    """As `to_csv` of pandas and `write.csv` of R write it."""
    commas = "," * index.count(",")
    facts = read(tmp_path, f"{commas}{HEADER}\n{index}{WALES}\n{index}{USA}\n")
    assert facts == read(tmp_path, f"{HEADER}\n{WALES}\n{USA}\n")
    assert [fact.case_id for fact in facts] == [1]
    assert "7 cells for the 6 named columns" in facts.skipped[0].reason


def test_two_columns_or_fields_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="several columns called 'subject'"):
        read(tmp_path, f"{HEADER},subject\n{WALES},Scotland\n")
    twice = '{"subject": "Wales", "subject": "Scotland"}'
    with pytest.raises(InputError, match="several fields called 'subject'"):
        read(tmp_path, twice, "facts.jsonl")


@pytest.mark.parametrize("separator", ["\t", ";"])
def test_other_separators_are_refused(separator, tmp_path):
    with pytest.raises(InputError, match="Separate the columns by commas"):
        read(tmp_path, f"{HEADER}\n{WALES}\n".replace(",", separator))


MASSIF = {
    "subject": "Vinson Massif",
    "template": "{} is located in the continent",
    "prompt": "Vinson Massif is located in the continent of",
    "relation_id": "P30",
    "target_true": "Antarctica",
    "target_false": "Asia",
}


def test_a_prompt_that_says_more_than_its_template_is_scored_with_a_note(tmp_path):
    agreeing = {**MASSIF, "prompt": "Vinson Massif is located in the continent"}
    tracing = {**MASSIF, "relation": MASSIF["template"]}
    del tracing["template"]
    facts = read(tmp_path, json.dumps([agreeing, MASSIF, tracing]), "facts.json")
    assert [fact.prompt for fact in facts] == [agreeing["prompt"], *[MASSIF["prompt"]] * 2]
    assert facts[1].template == "{} is located in the continent of"
    assert "in 2 records the template filled in is not the prompt" in facts.note
    other = {**MASSIF, "prompt": "It is located in the continent of"}
    assert (
        "occurs 0 times"
        in read(tmp_path, json.dumps([agreeing, other]), "f.json").skipped[0].reason
    )


def test_a_relation_may_be_a_name(tmp_path):
    record = {
        "subject": "Wales",
        "relation": "capital",
        "prompt": "The capital of Wales is",
        "target_true": "Cardiff",
        "target_false": "Leeds",
    }
    (fact,) = read(tmp_path, json.dumps(record), "facts.jsonl")
    assert fact.template == "The capital of {} is"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            {"name": "company CEO", "samples": [{"subject": "Apple", "object": "Tim Cook"}]},
            r"the fields \(name, samples\) match no known layout. The list 'samples' may hold",
            id="an object with the records inside",
        ),
        pytest.param(
            {"question": "Who wrote it?", "ground_truth": ["Ann"], "prompt": "It was written by"},
            r"the fields \(question, ground_truth, prompt\) match no known layout",
            id="questions without a subject",
        ),
        pytest.param(
            {"requested_rewrite": [{"prompt": "{} is", "subject": "Wales"}]},
            "not \\[.*Write a record for each of its entries",
            id="several rewrites in one record",
        ),
    ],
)
def test_other_data_sets_are_refused_with_a_cure(content, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(tmp_path, json.dumps(content, indent=4), "facts.json")


def test_one_record_over_several_lines_is_read(tmp_path):
    (fact,) = read(tmp_path, json.dumps(MASSIF, indent=2), "facts.json")
    assert fact.prompt == MASSIF["prompt"]
