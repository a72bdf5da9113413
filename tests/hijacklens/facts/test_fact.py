"""Facts and fact sets: refusals, prompts, selection, sampling and the hash."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.chat import Chat
from hijacklens.facts.fact import Fact, FactSet, Skipped
from hijacklens.facts.loading import load_facts
from hijacklens.prompts.schemes import get_scheme

TEXT = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() == text and text)


def make(case_id: int = 1, **changes) -> Fact:
    fields = {
        "case_id": case_id,
        "relation_id": "P131",
        "subject": "Eiffel Tower",
        "template": "{} is in the city of",
        "target_true": "Paris",
        "target_false": "Guam",
    }
    return Fact(**{**fields, **changes})


def make_set(n: int = 6) -> FactSet:
    """Cases 0 to n-1; even ones are P190, odd ones P36."""
    facts = (
        make(i, relation_id="P36" if i % 2 else "P190", subject=f"Subject {i}") for i in range(n)
    )
    return FactSet(tuple(facts), name="toy", note="a note", skipped=(Skipped(9, "", "", "why"),))


@pytest.mark.parametrize(
    ("template", "subject", "prompt"),
    [
        ("{} is in the city of", "Eiffel Tower", "Eiffel Tower is in the city of"),
        ("Where is {}? It is in", "Lyon", "Where is Lyon? It is in"),
        ("The twin city of {}", "Lyon", "The twin city of Lyon"),
        ("The twin city of {} ", "Lyon", "The twin city of Lyon "),
        ("{} is in", "{}", "{} is in"),
        ("{} is in", "{0} {name}", "{0} {name} is in"),
        ("{} is in {city}", "Lyon", "Lyon is in {city}"),
        ("{} is in", "100% {", "100% { is in"),
        ("{} liegt in", "Zürich 北京 🗼", "Zürich 北京 🗼 liegt in"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_prompt_fills_the_subject_in_as_plain_text(template, subject, prompt):
    assert make(template=template, subject=subject).prompt == prompt


@given(subject=TEXT, before=TEXT, after=TEXT)
def test_prompt_is_its_parts_whatever_the_subject_holds(subject, before, after):
    template = f"{before.replace('{}', '')} {{}} {after.replace('{}', '')}"
    expected = f"{before.replace('{}', '')} {subject} {after.replace('{}', '')}"
    assert make(template=template, subject=subject).prompt == expected.rstrip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"subject": ""}, "case 1: subject is empty.", id="no subject"),
        pytest.param({"subject": " \t"}, "case 1: subject is empty.", id="blank subject"),
        pytest.param({"target_true": ""}, "case 1: target_true is empty.", id="no true target"),
        pytest.param({"target_false": "\n"}, "case 1: target_false is empty.", id="blank false"),
        pytest.param({"template": ""}, "case 1: template is empty.", id="no template"),
        pytest.param({"template": "It is in"}, "exactly once", id="template without {}"),
        pytest.param({"template": "{} and {}"}, "'{} and {}'", id="template with two {}"),
        pytest.param({"template": "{ } is"}, "exactly once", id="a space in the braces"),
        pytest.param({"target_false": "Paris"}, "are both 'Paris'", id="equal targets"),
        pytest.param({"target_false": "PARIS"}, "'PARIS' is a name of", id="capitals"),
        pytest.param(
            {"target_true": "Zürich", "target_false": "Zu\u0308rich"}, "is a name", id="composed"
        ),
        pytest.param({"aliases_true": ("guam",)}, "'Guam' is a name of the", id="alias of true"),
        pytest.param({"aliases_false": ("Paris",)}, "is a name of the true", id="alias of false"),
        pytest.param({"target_false": " Paris "}, "leave out the white", id="spaces"),
    ],
)
def test_an_unusable_fact_is_refused_by_name(changes, message):
    with pytest.raises(InputError) as caught:
        make(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("case 1: ")


def test_texts_are_stripped_and_relations_named_as_load_facts_does(tmp_path):
    given = {
        "case_id": 1,
        "relation_id": " capital ",
        "subject": " Portugal",
        "template": "The capital of {} is ",
        "target_true": "Lisbon",
        "target_false": "Madrid",
        "aliases_true": (" Lisboa",),
        "near_true": " Porto ",
    }
    (tmp_path / "mine.json").write_text(json.dumps([given]))
    (fact,) = load_facts(tmp_path / "mine.json")
    assert Fact(**given) == fact
    with pytest.raises(InputError, match="target_true is ' Lisbon'; leave out the white space"):
        Fact(**given | {"target_true": " Lisbon"})
    assert (fact.relation_id, fact.prompt) == ("P36", "The capital of Portugal is ")
    assert get_scheme("relation").sentence(fact) == "Portugal does not have its capital in Madrid."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "It is in"}, "unknown argument of Fact 'prompt'. Allowed: aliases_false,"),
        ({"target_treu": "Lyon"}, "'target_treu'; did you mean 'target_true'? Allowed"),
        ({"relation": "P1"}, "It needs case_id, relation_id, subject, template, target_true, t"),
    ],
)
def test_a_wrong_argument_is_one_line(changes, message):
    with unchecked(), pytest.raises(InputError, match=re.escape(message)):
        make(**changes)
    with (
        unchecked(),
        pytest.raises(InputError, match=r"Fact: missing a required .*'target_false'. It needs"),
    ):
        Fact(case_id=1, relation_id="", subject="", template="x", target_true="y")


def test_facts_and_sets_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().subject = "Louvre"
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_set().facts = ()


def test_a_set_is_a_sequence():
    facts = make_set()
    assert len(facts) == 6
    assert facts[3].case_id == 3
    assert facts[-1].case_id == 5
    assert [fact.case_id for fact in facts] == list(range(6))
    assert facts[2] in facts
    with pytest.raises(IndexError):
        facts[6]


def test_a_slice_is_a_set_that_keeps_its_source():
    part = make_set()[1:4:2]
    assert [fact.case_id for fact in part] == [1, 3]
    assert (part.name, part.note, part.skipped) == ("toy", "a note", make_set().skipped)


def test_repr_says_name_and_size():
    assert repr(make_set()) == "FactSet('toy', 6 facts, 2 relations)"


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        pytest.param({"relation": "P190"}, [0, 2, 4], id="one relation"),
        pytest.param({"relation": ["P36", "P190"]}, [0, 1, 2, 3, 4, 5], id="two relations"),
        pytest.param({"relation": []}, [], id="no relation"),
        pytest.param({"case_ids": [4, 1, 4]}, [1, 4], id="ids, repeated, in the set's order"),
        pytest.param({"case_ids": []}, [], id="no ids"),
        pytest.param({"relation": "P36", "case_ids": [5]}, [5], id="both"),
        pytest.param({}, [0, 1, 2, 3, 4, 5], id="neither"),
    ],
)
def test_where(selection, expected):
    assert [fact.case_id for fact in make_set().where(**selection)] == expected


def test_where_takes_a_generator_of_case_ids():
    assert len(make_set().where(case_ids=(i for i in (0, 5)))) == 2


@pytest.mark.parametrize(
    ("selection", "parts"),
    [
        pytest.param(
            {"relation": "P19"},
            ["relation in toy", "'P19'", "did you mean 'P190'", "Allowed: P190, P36."],
            id="unknown relation",
        ),
        pytest.param(
            {"relation": "capitol"},
            ["'capitol'; did you mean 'capital'? Allowed: capital, twin city. Ids work too."],
            id="a name is answered with names",
        ),
        pytest.param({"relation": ["P36", "P5"]}, ["'P5'"], id="one of two unknown"),
        pytest.param({"case_ids": [77]}, ["toy has no case 77", "6 facts"], id="unknown id"),
        pytest.param(
            {"case_ids": range(10, 20)},
            ["no case 10, 11, 12, 13, 14 and others"],
            id="many unknown ids",
        ),
        pytest.param(
            {"relation": "P36", "case_ids": [0]}, ["no case 0", "3 facts"], id="id of another"
        ),
    ],
)
def test_where_refuses_what_the_set_does_not_have(selection, parts):
    with pytest.raises(InputError) as caught:
        make_set().where(**selection)
    for part in parts:
        assert part in str(caught.value)


@given(n=st.integers(1, 30), size=st.integers(1, 30), seed=st.integers(0, 10**9))
def test_a_sample_is_an_ordered_subset_fixed_by_its_seed(n, size, seed):
    facts = make_set(size)
    if n > size:
        with pytest.raises(InputError, match=f"cannot sample {n} of the {size} facts of toy"):
            facts.sample(n, seed=seed)
        return
    ids = [fact.case_id for fact in facts.sample(n, seed=seed)]
    assert len(set(ids)) == n
    assert ids == sorted(ids)
    assert set(ids) <= set(range(size))
    assert ids == [fact.case_id for fact in facts.sample(n, seed=seed)]


def test_different_seeds_draw_different_samples():
    drawn = {make_set(100).sample(10, seed=seed).content_hash() for seed in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize("n", [0, -1])
def test_a_sample_needs_at_least_one(n):
    with pytest.raises(InputError, match=rf"is {n}; give a whole number of at least 1"):
        make_set().sample(n)


@pytest.mark.parametrize(
    ("n", "size"), [(None, 6), (6, 6), (7, 6), (2, 2)], ids=["none", "all", "more", "fewer"]
)
def test_limit(n, size):
    facts = make_set()
    assert len(facts.limit(n, seed=4)) == size
    if n == 2:
        assert facts.limit(2, seed=4) == facts.sample(2, seed=4)


def test_relations_are_counted_in_the_order_of_their_numbers():
    names = ["P1412", "P36", "", "P190", "P36"]
    facts = FactSet(tuple(make(i, relation_id=n) for i, n in enumerate(names)), name="toy")
    assert list(facts.relations().items()) == [("P36", 2), ("P190", 1), ("P1412", 1), ("", 1)]


@pytest.mark.parametrize("name", ["P²", "P", "twin towns", "P१२"])
def test_relations_may_have_any_name(name):
    facts = FactSet((make(0, relation_id=name), make(1)), name="toy")
    assert facts.relations() == {"P131": 1, name: 1}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        pytest.param({}, True, id="clean"),
        pytest.param({"subject": "Paris Hotel"}, False, id="true target in the subject"),
        pytest.param({"template": "{}, like Guam, is in"}, False, id="false target in template"),
    ],
)
def test_without_leaks(changes, kept):
    assert len(FactSet((make(**changes),), name="toy").without_leaks()) == kept


def test_without_disputed_drops_what_a_sibling_says_is_true():
    facts = FactSet(
        (
            make(0, target_true="Lima", target_false="Oslo"),
            make(1, target_true="Oslo", target_false="Rome"),  # so case 0's false target is true
            make(2, target_true="Rome", target_false="Oslo", subject="Other"),
            make(3, target_true="Bonn", target_false="Oslo", relation_id="P36"),
        ),
        name="toy",
    )
    # Case 1's false target, Rome, is true only of another subject.
    assert [fact.case_id for fact in facts.without_disputed()] == [1, 2, 3]


def test_the_hash_is_of_the_facts_alone():
    facts = make_set()
    assert facts.content_hash() == FactSet(facts.facts, name="other").content_hash()
    assert len(facts.content_hash()) == 64


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(make_set().facts[:-1], id="one fewer"),
        pytest.param(make_set().facts[::-1], id="other order"),
        *(
            pytest.param((make(**change), *make_set().facts[1:]), id=name)
            for name, change in {
                "subject": {"case_id": 0, "relation_id": "P190", "subject": "Subject 00"},
                "near word": {
                    "case_id": 0,
                    "relation_id": "P190",
                    "subject": "Subject 0",
                    "near_true": "France",
                },
            }.items()
        ),
    ],
)
def test_the_hash_changes_with_the_content(changed):
    assert FactSet(tuple(changed), name="toy").content_hash() != make_set().content_hash()


def test_the_hash_cannot_be_fooled_by_moving_text_between_fields():
    one = FactSet((make(subject="a b", target_true="c"),), name="")
    two = FactSet((make(subject="a", target_true="b c"),), name="")
    assert one.content_hash() != two.content_hash()


def test_the_table_has_a_row_per_fact_and_the_prompt():
    table = make_set().to_dataframe()
    assert len(table) == 6
    assert table.columns.tolist() == [
        "case_id",
        "relation_id",
        "subject",
        "template",
        "target_true",
        "target_false",
        "near_true",
        "near_false",
        "aliases_true",
        "aliases_false",
        "distractor",
        "prompt",
    ]
    assert table.prompt[2] == "Subject 2 is in the city of"


def test_the_table_of_no_facts_still_has_its_columns():
    table = make_set()[:0].to_dataframe()
    assert table.empty
    assert "prompt" in table.columns


def test_records_that_cannot_be_read_follow_the_selection():
    skipped = tuple(
        Skipped(case, relation, "Peru", "empty")
        for case, relation in ((100, "P36"), (101, "P19"), (None, "P36"), (102, ""))
    )
    facts = dataclasses.replace(make_set(), skipped=skipped)
    relation = next(iter(facts.relations()))
    kept = facts.where(relation=relation).skipped
    assert {row.relation_id for row in kept} <= {relation, ""}
    assert skipped[3] in kept  # it may belong to any
    assert facts.where(case_ids=[facts[0].case_id]).skipped == ()


def test_a_record_and_a_table_give_the_facts_back():
    odd = make(3, aliases_true=("City of Light", "Paname"), near_true="France", distractor="Guam!")
    facts = FactSet((make(2**62 + 1), odd), name="toy", note="a", joining="none", origin="a paper")
    facts = facts.with_opening("Well.").in_chat(Chat(hijack="system", system="Be brief."))
    assert facts.record().fact_set(facts.to_dataframe()) == facts
