"""Records of every published layout become the same facts; what cannot be read is listed."""

from __future__ import annotations

import pytest

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact
from hijacklens.facts.records import RECONSTRUCTED, facts_from_records

LYON = Fact(
    case_id=4,
    relation_id="P190",
    subject="Lyon",
    template="What is the twin city of {}? It is",
    target_true="Beirut",
    target_false="Manila",
)
NESTED = {
    "case_id": 4,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "What is the twin city of {}? It is",
        "relation_id": "P190",
        "target_new": {"str": "Manila", "id": "Q1461"},
        "target_true": {"str": "Beirut", "id": "Q3820"},
        "subject": "Lyon",
    },
    "paraphrase_prompts": ["Lyon's twin city is"],
}
TRACING = {
    "case_id": 4,
    "relation": "What is the twin city of {}? It is",
    "relation_prefix": "What is the twin city of",
    "relation_suffix": "? It is",
    "prompt": "What is the twin city of Lyon? It is",
    "relation_id": "P190",
    "target_true": " Beirut",
    "target_false": " Manila",
    "target_true_id": "Q3820",
    "target_false_id": "Q1461",
    "subject": "Lyon",
}
EASYEDIT = {
    "case_id": 4,
    "prompt": "What is the twin city of Lyon? It is",
    "target_new": "Manila",
    "subject": "Lyon",
    "ground_truth": "Beirut",
    "rephrase_prompt": "People in Lyon's twin city speak the language of",
}
FLAT_TABLE = {
    "case_id": 4,
    "prompt": "What is the twin city of {}? It is",
    "relation_id": "P190",
    "target_true": "Beirut",
    "target_new": "Manila",
    "subject": "Lyon",
}
OWN = {
    "case_id": 4,
    "relation_id": "P190",
    "subject": "Lyon",
    "template": "What is the twin city of {}? It is",
    "target_true": "Beirut",
    "target_false": "Manila",
    "near_true": "",
    "near_false": None,
}
WITHOUT_RELATION = {key: value for key, value in TRACING.items() if key != "relation"}


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(NESTED, id="nested"),
        pytest.param(TRACING, id="tracing"),
        pytest.param(WITHOUT_RELATION, id="tracing without a template"),
        pytest.param(FLAT_TABLE, id="target_new for target_false"),
        pytest.param({**EASYEDIT, "relation_id": "P190"}, id="EasyEdit with a relation"),
        pytest.param(OWN, id="own"),
        pytest.param({**OWN, "relation_id": "p190 "}, id="relation id in small letters"),
        pytest.param({**OWN, "relation_id": "", "relation": "twin city"}, id="relation by name"),
        pytest.param({**OWN, "case_id": "4"}, id="case id as text"),
        pytest.param({**OWN, "case_id": " 4 "}, id="case id as text with spaces"),
        pytest.param({**OWN, "subject": " Lyon\n"}, id="spaces around the subject"),
    ],
)
def test_every_layout_gives_the_same_fact(record):
    assert facts_from_records([record], name="toy").facts == (LYON,)


@pytest.mark.parametrize(
    "write",
    [str.upper, str.title, lambda x: x.replace("_", ""), lambda x: f" {x.replace('_', '-')}"],
    ids=["upper", "title", "one word", "hyphens"],
)
@pytest.mark.parametrize("record", [OWN, NESTED, TRACING, FLAT_TABLE], ids=lambda x: f"{len(x)}")
def test_names_of_fields_match_whatever_their_capitals_and_separators(record, write):
    facts = facts_from_records([{write(name): x for name, x in record.items()}], name="toy")
    assert facts.facts == (LYON,)
    assert "not used" not in facts.note


def test_a_name_that_may_be_that_of_two_fields_is_not_read_but_noted():
    row = {name: text for name, text in OWN.items() if name != "relation_id"}
    for given in (("Relation ID", "relation-id"), ("relation_id", "Relation_ID")):
        facts = facts_from_records(
            [row | dict(zip(given, ("P190", "P36"), strict=True))], name="toy"
        )
        exact = "relation_id" in given
        assert facts[0].relation_id == ("P190" if exact else "")
        assert facts.note.startswith("not used: the field") and given[1] in facts.note
        assert ("did you mean 'relation_id'?" in facts.note) == (not exact)


def test_easyedit_names_no_relation():
    (fact,) = facts_from_records([EASYEDIT], name="toy")
    assert fact.relation_id == ""
    assert (fact.template, fact.target_true, fact.target_false) == (
        LYON.template,
        "Beirut",
        "Manila",
    )


def test_without_case_ids_the_place_is_the_case_id():
    records = [{k: v for k, v in OWN.items() if k != "case_id"}, {**OWN, "case_id": None}]
    assert [fact.case_id for fact in facts_from_records(records, name="toy")] == [0, 1]


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ([None, 0, None], [3, 0, 2]),
        ([2, None, None, 1, 4], [2, 5, 6, 1, 4]),
        ([1_000_001, None], [1_000_001, 1]),
        (["x", 1, None, 2], [1, 4, 2]),
    ],
)
def test_a_record_without_a_case_id_gets_a_number_that_no_record_has(given, numbers):
    records = [{**OWN, "subject": f"Lyon {i}", "case_id": case} for i, case in enumerate(given)]
    facts = facts_from_records(records, name="toy")
    assert [fact.case_id for fact in facts] == numbers


def test_all_paraphrases_of_a_record_without_a_case_id_get_new_numbers():
    two = {**OWN, "case_id": None, "template": ["{} has", "{} is in"]}
    taken = {**OWN, "case_id": 1_000_000}
    facts = facts_from_records([two, taken], name="toy", paraphrases=True)
    assert [fact.case_id for fact in facts] == [2, 1_000_002, 1_000_000]


@pytest.mark.parametrize(
    ("relation", "given", "near_true", "near_false"),
    [
        pytest.param("P1412", {}, "France", "Germany", id="filled in"),
        pytest.param("P1412", {"near_true": "Senegal"}, "Senegal", "Germany", id="own word stays"),
        pytest.param("P103", {}, "France", "Germany", id="another language relation"),
        pytest.param("P36", {}, None, None, id="no language relation"),
        pytest.param("", {}, None, None, id="no relation"),
    ],
)
def test_near_words_of_languages(relation, given, near_true, near_false):
    record = {
        **OWN,
        "relation_id": relation,
        "target_true": "French",
        "target_false": "German",
        **given,
    }
    (fact,) = facts_from_records([record], name="toy")
    assert (fact.near_true, fact.near_false) == (near_true, near_false)


@pytest.mark.parametrize(
    ("records", "note"),
    [
        pytest.param([NESTED], "", id="nested with ids"),
        pytest.param([TRACING], "", id="tracing with ids"),
        pytest.param([EASYEDIT], "", id="EasyEdit, which has no relation ids"),
        pytest.param([{**TRACING, "target_true_id": None}], RECONSTRUCTED, id="ids are null"),
        pytest.param([OWN], "", id="own"),
    ],
)
def test_a_reconstructed_counterfact_says_so(records, note):
    assert facts_from_records(records, name="toy").note == note


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        pytest.param({**OWN, "case_id": 7, "target_true": ""}, "target_true is empty", id="empty"),
        pytest.param({**OWN, "case_id": 7, "subject": None}, "subject must be text, not None",
                     id="null subject"),
        pytest.param({**OWN, "case_id": 7, "target_false": 3}, "target_false must be text, not 3",
                     id="number for a text"),
        pytest.param({**OWN, "case_id": 7, "template": "no slot"}, "exactly once", id="template"),
        pytest.param({**OWN, "case_id": 7, "target_false": "Beirut"}, "must differ", id="equal"),
        pytest.param({**OWN, "case_id": 7, "target_false": "beirut"}, "must differ", id="capitals"),
        pytest.param({**OWN, "case_id": 7, "aliases_true": "Berytus|Manila"},
                     "'Manila' is a name of the true target 'Beirut'", id="false target an alias"),
        pytest.param({**OWN, "case_id": 7, "prompt": 3}, "the prompt must be text, not 3",
                     id="number for a prompt"),
        pytest.param({**TRACING, "case_id": 7, "subject": 0}, "subject must be text, not 0",
                     id="number for a subject"),
        pytest.param({**OWN, "case_id": 7, "relation_id": 190},
                     "relation_id must be text or empty, not 190", id="number for a relation"),
        pytest.param({**OWN, "case_id": 7, "near_true": ["a"]}, "near_true must be text",
                     id="list for a near word"),
        pytest.param({**EASYEDIT, "case_id": 7, "subject": "t"}, "must occur once",
                     id="subject occurs many times"),
        pytest.param({**EASYEDIT, "case_id": 7, "subject": "Paris"}, "occurs 0 times",
                     id="subject does not occur"),
        pytest.param({**NESTED, "case_id": 7, "requested_rewrite": "Lyon"},
                     "requested_rewrite must be an object", id="nested without nesting"),
    ],
)  # fmt: skip
def test_an_unusable_record_is_listed_with_its_case_id(record, reason):
    facts = facts_from_records([OWN, record], name="toy")
    assert facts.facts == (LYON,)
    (skipped,) = facts.skipped
    assert reason in skipped.reason
    assert "record 2" in skipped.reason
    assert skipped.case_id == 7


@pytest.mark.parametrize(
    "case_id",
    ["four", "4.5", 4.5, True, [4], "²", "-", ""],
    ids=lambda value: repr(value),
)
def test_a_case_id_that_is_no_whole_number_is_listed(case_id):
    facts = facts_from_records([OWN, {**OWN, "case_id": case_id}], name="toy")
    (skipped,) = facts.skipped
    assert "case_id must be a whole number" in skipped.reason
    assert (skipped.case_id, skipped.relation_id, skipped.subject) == (None, "P190", "Lyon")


@pytest.mark.parametrize(
    "record",
    ["Lyon", None, 3, ["Lyon"], {}, {"question": "?", "answer": "!"}],
    ids=["text", "null", "number", "list", "no fields", "other fields"],
)
def test_a_later_record_of_no_layout_is_listed(record):
    facts = facts_from_records(iter([OWN, record]), name="toy")
    (skipped,) = facts.skipped
    assert skipped.reason.startswith("record 2: ")


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        pytest.param(OWN, "record 2: it repeats case 4 with identical content", id="identical"),
        pytest.param(
            {**OWN, "target_false": "Oslo"},
            "record 2: it repeats case 4 with different content",
            id="different",
        ),
    ],
)
def test_a_repeated_case_id_is_listed_and_the_first_kept(second, reason):
    facts = facts_from_records([OWN, second], name="toy")
    assert facts.facts == (LYON,)
    assert [row.reason for row in facts.skipped] == [reason]
    assert facts.skipped[0].case_id == 4


@pytest.mark.parametrize(
    ("records", "parts"),
    [
        pytest.param([], ["toy holds no record", "Allowed layouts"], id="no record"),
        pytest.param(
            [{"question": "?", "answer": "!"}],
            ["toy", "(question, answer)", "no known layout", "nested", "tracing", "EasyEdit"],
            id="wrong columns",
        ),
        pytest.param([{}], ["no fields at all"], id="no fields"),
        pytest.param(
            [{name: text for name, text in OWN.items() if name not in ("subject", "target_true")}],
            ["toy: required fields are missing: 'subject', 'target_true'.", "Allowed layouts"],
            id="fields of our own layout left out",
        ),
        pytest.param(["Lyon"], ["an object with named fields", "'Lyon'"], id="text"),
        pytest.param([None], ["None"], id="null"),
        pytest.param(
            [{**OWN, "subject": ""}, {**OWN, "target_true": ""}],
            ["none of the 2 records can be used", "record 1", "subject is empty"],
            id="all unusable",
        ),
    ],
)
def test_what_holds_no_fact_is_refused(records, parts):
    with pytest.raises(InputError) as caught:
        facts_from_records(iter(records), name="toy")  # as files give them, unchecked
    for part in parts:
        assert part in str(caught.value)


def test_records_may_come_from_a_generator_and_keep_their_order():
    records = ({**OWN, "case_id": i} for i in (9, 2, 5))
    assert [fact.case_id for fact in facts_from_records(records, name="toy")] == [9, 2, 5]
