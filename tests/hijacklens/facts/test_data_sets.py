"""Published data sets and pairs of answers: ten rows of each, written by us in its layout."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hijacklens as hl
from hijacklens.errors import InputError
from hijacklens.facts.layouts import LAYOUTS
from hijacklens.facts.records import facts_from_records
from hijacklens.prompts.prompt import make_prompt
from hijacklens.prompts.schemes import Scheme, Unusable, get_scheme

DATA = Path(__file__).parents[2] / "data" / "data_sets"
FILES = {
    "LRE": "lre.json",
    "ParaRel": "pararel/trex_lms_vocab/P36.jsonl",
    "PopQA": "popQA.tsv",
    "known facts": "known_1000.json",
    "MQuAKE": "mquake.json",
    "NQ-Swap": "nq_swap.jsonl",
    "pair": "pairs.csv",
}
FIRST = {
    "LRE": ("P36", "Wales", "The capital of Wales is", "Cardiff"),
    "ParaRel": ("P36", "Wales", "The seat of government of Wales is", "Cardiff"),
    "PopQA": ("P106", "Mae Jemison", "Q: What is Mae Jemison's occupation? A:", "astronaut"),
    "known facts": (
        "P19", "Marie Curie", "Marie Curie was born in the city of", "Warsaw",
    ),
    "MQuAKE": (
        "", "Hamlet", "Q: Of which country was the author of Hamlet a citizen? A:", "England",
    ),
    "NQ-Swap": ("", "", "Q: who painted the mona lisa A:", "Leonardo da Vinci"),
    "pair": ("", "", "Roses are red, violets are", "blue"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_ten_rows_of_each_data_set(name):
    facts = hl.load_facts(DATA / FILES[name])
    origin = next(layout.origin for layout in LAYOUTS if layout.name == name)
    assert facts.origin == facts.record().origin == origin
    assert name == "pair" or "https://" in origin
    found = [(fact.relation_id, fact.subject, fact.prompt, fact.target_true) for fact in facts]
    assert found[0] == FIRST[name]
    assert len(facts) == 10
    drawn = name in ("LRE", "ParaRel", "PopQA", "known facts")
    assert ("in 10 records the false target was drawn" in facts.note) == drawn
    answers = {}
    for fact in facts:
        answers.setdefault(fact.key, set()).update({fact.target_true, *fact.aliases_true})
    for fact in facts:
        assert answers[fact.key].isdisjoint({fact.target_false, *fact.aliases_false})
        assert not drawn or fact.target_false in {
            each.target_true for each in facts if each.relation_id == fact.relation_id
        }


def test_another_seed_draws_other_false_targets_and_the_hash_says_so():
    path = DATA / FILES["LRE"]
    assert hl.load_facts(path, seed=0).facts == hl.load_facts(path).facts
    other = hl.load_facts(path, seed=1)
    assert other.content_hash() != hl.load_facts(path).content_hash()
    assert "with seed 1" in other.note


def test_no_other_answer_to_a_question_is_drawn_whatever_its_name():
    record = {"template": "{} has the twin city", "relation_id": "twin city"}
    rows = [
        {"subject": "Lyon", "target_true": "Milan"},
        {"subject": "Lyon", "target_true": "Cologne"},
        {"subject": "Kyoto", "target_true": "milano"},  # an alias of Milan
        {"subject": "Seoul", "target_true": "Köln"},  # one of Cologne
        {"subject": "Ankara", "target_true": "Sofia"},
    ]
    facts = facts_from_records([record | row for row in rows], name="toy")
    assert {fact.relation_id for fact in facts} == {"P190"}
    assert [facts[0].target_false, facts[1].target_false] == ["Sofia", "Sofia"]


def test_a_relation_without_another_target_is_listed():
    mars = {"subject": "Mars", "relation_id": "P1", "template": "{} is a", "target_true": "planet"}
    wales = {"subject": "Wales", "template": "{} has", "target_true": "coal"}
    texas = {"subject": "Texas", "template": "{} has", "target_true": "oil"}
    facts = facts_from_records([wales, texas, mars], name="toy")
    (skipped,) = facts.skipped
    assert skipped.reason.endswith("the relation has no other true target to draw.")
    assert "in 2 records the false target was drawn" in facts.note


OWN = [
    {"template": "{} has", "subject": subject, "target_true": true, "target_false": false}
    for subject, true, false in (("Wales", "coal", "oil"), ("Texas", "oil", "coal"))
]


@pytest.mark.parametrize("typo", ["target_flase", "target_fals", "Targets_false", None])
def test_no_false_target_is_drawn_if_other_records_have_one(typo):
    """A record that lacks its false target is skipped, and a misspelt field is named."""
    third = {**OWN[0], "subject": "Silesia", "case_id": 7}
    false = third.pop("target_false")
    facts = facts_from_records([*OWN, third | ({typo: false} if typo else {})], name="toy")
    assert len(facts) == 2 and "drawn" not in facts.note
    hint = f" The field {typo!r} may mean 'target_false'." if typo else ""
    assert facts.skipped[0].reason.endswith("other records have one, so none is drawn." + hint)


def test_one_note_names_all_unused_fields_a_misspelt_one_with_the_nearest_name():
    rows = [OWN[0] | {"relatoin_id": "P1", "source": "a book"}, OWN[1] | {"ID": 3}]
    note = "not used: the fields 'relatoin_id' (did you mean 'relation_id'?), 'source', 'ID'."
    assert facts_from_records(rows, name="toy").note == note
    assert facts_from_records(rows[1:], name="toy").note == "not used: the field 'ID'."
    many = facts_from_records([OWN[0] | dict.fromkeys("abcdefghijklmnop")], name="toy").note
    assert many.endswith("'k', 'l' and 4 more.")


@pytest.mark.parametrize("name", FILES)
def test_of_the_other_fields_of_a_data_set_nothing_is_said(name):
    assert "not used" not in hl.load_facts(DATA / FILES[name]).note
    # Nor of a field that CounterFact has next to a known one.
    rows = [row | {"target_false_id": "Q1"} for row in OWN]
    assert facts_from_records(rows, name="toy").note == ""


def test_of_two_fields_for_one_meaning_the_note_names_the_one_that_is_not_read():
    pair = {"prompt": "She", "answer_a": "is", "answer_b": "are"}
    facts = facts_from_records([pair | {"target_true": "was"}], name="toy")
    assert facts[0].target_true == "is"
    assert facts.note == "not used: the field 'target_true'."


def test_relations_that_differ_in_capitals_only_are_noted():
    rows = [row | {"relation_id": each} for row, each in zip(OWN, ("Ore", "ore"), strict=True)]
    note = "the relations 'Ore', 'ore' differ in capitals only and count as 2."
    assert facts_from_records(rows, name="toy").note == note


def test_a_fact_that_occurs_twice_is_noted():
    facts = facts_from_records([*OWN, OWN[0]], name="toy")
    assert len(facts) == 3 and "is scored again (the first: case 2)" in facts.note
    numbered = [row | {"case_id": i} for i, row in enumerate([*OWN, OWN[0]])]
    assert facts_from_records(numbered, name="toy").note == ""


@pytest.mark.parametrize("name", ["prompt", "relation"])
def test_own_data_are_not_said_to_be_a_published_data_set(name):
    row = {name: "{} is in", "subject": "Lyon", "target_true": "France", "target_false": "Peru"}
    assert facts_from_records([row], name="toy").origin == ""
    published = facts_from_records([row | {"target_true_id": "Q142"}], name="toy")
    assert published.origin.startswith("CounterFact (MIT")


def test_paraphrases_are_facts_with_ids_of_their_own():
    for name, count in (("LRE", 20), ("ParaRel", 20), ("MQuAKE", 30)):
        facts = hl.load_facts(DATA / FILES[name], paraphrases=True)
        single = hl.load_facts(DATA / FILES[name])
        assert len(facts) == count
        assert set(single) < set(facts)
        assert {fact.case_id % 1_000_000 for fact in facts} == {fact.case_id for fact in single}


def test_triples_without_their_patterns_say_where_these_belong(tmp_path):
    (tmp_path / "P36.jsonl").write_text((DATA / FILES["ParaRel"]).read_text())
    with pytest.raises(InputError, match=r"data/pattern_data/graphs_json/P36\.jsonl"):
        hl.load_facts(tmp_path / "P36.jsonl")


def test_a_damaged_chain_is_listed_with_the_missing_part(tmp_path):
    chains = json.loads((DATA / FILES["MQuAKE"]).read_text())
    chains[1]["orig"] = {}
    (tmp_path / "chains.json").write_text(json.dumps(chains))
    (skipped,) = hl.load_facts(tmp_path / "chains.json").skipped
    assert "record 2: a chain of MQuAKE lacks a part: KeyError('triples_labeled')" in skipped.reason


NO_TEXT = [None, math.nan, True, 3, "", " ", {"a": 1}, [None], [[]], [{}]]


@pytest.mark.parametrize("value", [*NO_TEXT, []], ids=repr)
def test_a_question_that_is_no_text_is_listed(value):
    rows = {
        "question": json.loads((DATA / FILES["NQ-Swap"]).read_text().splitlines()[0]),
        "questions": json.loads((DATA / FILES["MQuAKE"]).read_text())[0],
    }
    for name, row in rows.items():
        facts = facts_from_records([OWN[0], {**row, name: value, "case_id": 7}], name="toy")
        assert len(facts) == 1
        (skipped,) = facts.skipped
        assert "the question must be text, not" in skipped.reason


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_a_pattern_that_is_no_text_is_listed(value):
    row = {"sub_label": "Wales", "obj_label": "Cardiff", "target_false": "Leeds"}
    good = row | {"patterns": ["[X] is governed from [Y]."]}
    facts = facts_from_records([good, row | {"patterns": value}], name="toy")
    assert len(facts) == 1
    expected = "no pattern that ends in [Y]" if value is None else "a pattern must be text, not"
    assert expected in facts.skipped[0].reason


@pytest.mark.parametrize("value", [None, math.nan, True, 3, "a", {"a": 1}, [None], ["a"], [[]]])
def test_samples_that_are_no_objects_are_listed(value):
    relation = json.loads((DATA / FILES["LRE"]).read_text())
    bad = relation | {"samples": value}
    facts = facts_from_records([relation, bad], name="toy")
    assert len(facts) == 10
    if value != {"a": 1}:  # an object is a sample, of no known layout
        assert "a sample of LRE must be an object, not" in facts.skipped[0].reason
        with pytest.raises(InputError, match="none of the 1 records can be used; record 1: a samp"):
            facts_from_records([bad], name="toy")


def test_an_edit_whose_target_is_no_text_is_listed():
    chain = json.loads((DATA / FILES["MQuAKE"]).read_text())[0]
    chain["requested_rewrite"][0]["target_new"]["str"] = None
    (skipped,) = facts_from_records([OWN[0], chain], name="toy").skipped
    assert "a chain of MQuAKE lacks a part: TypeError" in skipped.reason


def test_a_gzipped_table_of_pairs_equals_the_plain_one(tmp_path):
    text = (DATA / "pairs.csv").read_bytes()
    (tmp_path / "pairs.csv.gz").write_bytes(gzip.compress(text))
    assert hl.load_facts(tmp_path / "pairs.csv.gz").facts == hl.load_facts(DATA / "pairs.csv").facts


def test_a_pair_has_no_subject_and_schemes_that_need_one_say_so():
    pair = hl.load_facts(DATA / "pairs.csv")[0]
    prompt = make_prompt(pair, sentence="Do not think of green.", dose=1)
    assert prompt.spans["subject"] == ()
    assert prompt.text == "Do not think of green. Roses are red, violets are"
    with pytest.raises(Unusable, match="the fact has no subject"):
        Scheme(name="about", template="{subject} is not {target_false}.").sentence(pair)
    with pytest.raises(Unusable, match="no sentence for relation"):
        get_scheme("relation").sentence(pair)


def test_pairs_are_not_disputed_by_one_another():
    pairs = [
        {"prompt": "One plus one is", "answer_a": "two", "answer_b": "ten"},
        {"prompt": "Five plus five is", "answer_a": "ten", "answer_b": "two"},
    ]
    assert len(facts_from_records(pairs, name="toy").without_disputed()) == 2


def test_a_pair_may_name_a_subject_and_braces_without_one_are_refused():
    named = {"prompt": "Wales is in", "answer_a": "Europe", "answer_b": "Asia", "subject": "Wales"}
    braces = {**named, "prompt": "x = {}", "subject": None}
    facts = facts_from_records([named, braces], name="toy")
    assert [(fact.subject, fact.template) for fact in facts] == [("Wales", "{} is in")]
    assert "subject is empty. The template has {}" in facts.skipped[0].reason


def test_the_text_of_a_swapped_context_is_a_sentence():
    scheme = Scheme(name="swapped", template="{distractor}")
    fact = hl.load_facts(DATA / FILES["NQ-Swap"])[0]
    assert (
        scheme.sentence(fact) == "The Mona Lisa is a portrait by Rembrandt. It hangs in the Louvre."
    )
    chain = hl.load_facts(DATA / FILES["MQuAKE"])[0]
    assert scheme.sentence(chain) == "Hamlet was written by Jane Austen."
    with pytest.raises(Unusable, match="the fact has no distractor"):
        scheme.sentence(hl.atlas()[0])


@given(aliases=st.lists(st.text(min_size=1).filter(str.strip), max_size=3, unique=True))
def test_aliases_in_any_form_are_the_same_texts(aliases):
    record = {"subject": "Wales", "template": "{} is in", "target_true": "Europe"}
    record |= {"target_false": "Asia"}
    forms = [aliases, tuple(aliases), json.dumps(aliases)]
    found = {
        facts_from_records([{**record, "aliases_true": form}], name="toy")[0].aliases_true
        for form in forms
    }
    stripped = dict.fromkeys(alias.strip() for alias in aliases)
    assert found == {tuple(alias for alias in stripped if alias != "Europe")}


def test_a_false_target_that_the_package_knows_as_a_name_of_the_true_one_is_noted():
    """Not refused: CounterFact has such facts (Islam and Muslim)."""
    record = {"subject": "Bob", "template": "{} is from", "target_true": "United States"}
    rows = [record | {"target_false": each} for each in ("Peru", "usa", "America")]
    facts = facts_from_records(rows, name="toy")
    assert facts.note == (
        "in 2 records the false target is another common name of the true one (the first: case 1)."
    )
    row = record | {"target_true": "United States of America", "target_false": "United States"}
    assert "in 1 records" in facts_from_records([row], name="toy").note


def test_aliases_of_the_package_leave_the_hash_and_others_change_it():
    record = {"subject": "Dalí", "template": "{} was born in", "target_true": "Spain"}
    record |= {"target_false": "Russia"}
    plain = hl.Fact(case_id=0, relation_id="", **record)
    (filled,) = facts_from_records([record], name="toy")
    assert (filled.aliases_true, filled.aliases_false) == (("España",), ("Russian Federation",))
    changed = hl.Fact(case_id=0, relation_id="", **record, aliases_true=("Hispania",))
    hashes = [hl.FactSet((fact,), name="toy").content_hash() for fact in (plain, filled, changed)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hash_of_the_atlas_is_that_of_earlier_versions():
    assert hl.atlas().content_hash().startswith("98d2c1b0894b50c3")
    assert any(fact.aliases_true for fact in hl.atlas())


def test_relations_have_names_wherever_they_have_ids():
    facts = hl.atlas()
    assert facts.where(relation="capital") == facts.where(relation="P36")
    assert facts.where(relation=["Capital", "P17"]) == facts.where(relation=["P36", "P17"])
    scheme = Scheme(name="city", templates={"capital": "{target_false} is a city."})
    assert scheme.sentence(facts.where(relation="P36")[0]).endswith("is a city.")
    with pytest.raises(
        InputError, match=r"unknown relation in atlas 'capitol'; did you mean 'capital'"
    ):
        facts.where(relation="capitol")


def test_a_table_of_facts_keeps_aliases(tmp_path):
    facts = hl.load_facts(DATA / FILES["PopQA"])
    facts.to_dataframe().drop(columns="prompt").to_parquet(tmp_path / "facts.parquet")
    assert hl.load_facts(tmp_path / "facts.parquet").facts == facts.facts
