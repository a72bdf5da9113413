"""The text of every scheme on a hand-made fact, skipped facts with reasons, and refusals."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact
from hijacklens.facts.relations import relations
from hijacklens.prompts.schemes import (
    PLACEHOLDERS,
    Scheme,
    Unusable,
    add_scheme,
    get_scheme,
    schemes,
)


def make(**changes) -> Fact:
    fields = {
        "case_id": 8,
        "relation_id": "P103",
        "subject": "Danielle Darrieux",
        "template": "The mother tongue of {} is",
        "target_true": "French",
        "target_false": "English",
        "near_true": "France",
        "near_false": "England",
    }
    return Fact(**{**fields, **changes})


POOL = ["English", "Russian", "Greek", "French", "Greek"]


@pytest.fixture
def registry(monkeypatch):
    """A registry that forgets what a test adds."""
    module = sys.modules[Scheme.__module__]
    monkeypatch.setattr(module, "REGISTRY", schemes())


# ---------------------------------------------------------------- the built-in schemes

BUILT_IN = {
    "do-not-think": ("hijack", "Do not think of English.", ("target_false",)),
    "do-not-think-true": ("reverse", "Do not think of French.", ("target_true",)),
    "relation": (
        "hijack",
        "Danielle Darrieux cannot speak English.",
        ("subject", "target_false"),
    ),
    "relation-true": (
        "reverse",
        "Danielle Darrieux can speak French.",
        ("subject", "target_true"),
    ),
    "near-word": ("hijack", "Do not think of England.", ("near_false",)),
    "near-word-true": ("reverse", "Do not think of France.", ("near_true",)),
    "think": ("control", "Think of English.", ("target_false",)),
    "mention": ("control", "English.", ("target_false",)),
    "unrelated": ("control", "The weather was mild today.", ()),
}


@pytest.mark.parametrize(
    ("name", "direction", "text", "needs"),
    [(name, *values) for name, values in BUILT_IN.items()],
    ids=BUILT_IN,
)
def test_the_text_of_each_scheme(name, direction, text, needs):
    scheme = get_scheme(name)
    assert scheme.sentence(make()) == text
    assert (scheme.name, scheme.direction, scheme.needs) == (name, direction, needs)
    assert scheme.summary


def test_there_are_ten_built_in_schemes():
    assert set(schemes()) >= {*BUILT_IN, "do-not-think-other"}
    assert get_scheme("do-not-think-other").direction == "control"
    assert get_scheme("do-not-think-other").needs == ("other_false",)


def test_the_registry_cannot_be_changed_through_its_copy():
    schemes().clear()
    assert "do-not-think" in schemes()


@pytest.mark.parametrize("relation", relations().values(), ids=lambda r: r.relation_id)
def test_every_relation_has_its_sentences(relation):
    fact = make(
        relation_id=relation.relation_id, subject="SUB", target_true="YES", target_false="NO"
    )
    hijack = get_scheme("relation").sentence(fact)
    reverse = get_scheme("relation-true").sentence(fact)
    assert hijack == relation.hijack.replace("{subject}", "SUB").replace("{target_false}", "NO")
    assert reverse == relation.reverse.replace("{subject}", "SUB").replace("{target_true}", "YES")
    assert "YES" not in hijack
    assert " NO" not in reverse


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "near-word",
            {"near_false": None},
            "no near word is known for the false target 'English'",
        ),
        (
            "near-word-true",
            {"near_true": None},
            "no near word is known for the true target 'French'",
        ),
        ("near-word", {"near_false": ""}, "no near word is known for the false target 'English'"),
        ("relation", {"relation_id": "P5"}, "relation has no sentence for relation 'P5'"),
        ("relation-true", {"relation_id": ""}, "relation-true has no sentence for relation (none)"),
    ],
)
def test_an_unusable_scheme_says_why(name, changes, reason):
    with pytest.raises(Unusable) as caught:
        get_scheme(name).sentence(make(**changes))
    assert str(caught.value) == reason


def test_one_near_word_is_enough_for_the_scheme_that_needs_it():
    fact = make(near_true=None)
    assert get_scheme("near-word").sentence(fact) == "Do not think of England."


# ---------------------------------------------------------------- the target of another fact


def other(fact: Fact, pool, seed: int = 0) -> str:
    text = get_scheme("do-not-think-other").sentence(fact, pool=pool, seed=seed)
    return text.removeprefix("Do not think of ").removesuffix(".")


@pytest.mark.parametrize("pool", [[], ["English"], ["English", "French", "English"]])
def test_a_pool_without_another_target_is_unusable(pool):
    with pytest.raises(Unusable, match="no other false target of relation 'P103' to draw"):
        other(make(), pool)


WORDS = st.lists(st.sampled_from(["English", "French", *"ABCDEFGH"]), min_size=1).filter(
    lambda pool: set(pool) - {"English", "French"}
)


@given(pool=WORDS, seed=st.integers(0, 10**6), case_id=st.integers(0, 30_000))
def test_the_draw_is_fixed_by_seed_fact_and_pool_alone(pool, seed, case_id):
    fact = make(case_id=case_id)
    drawn = other(fact, pool, seed)
    assert drawn in pool
    assert drawn not in ("English", "French")
    assert other(fact, pool[::-1] + pool, seed) == drawn  # neither order nor repeats matter
    assert other(fact, sorted(set(pool) - {"English", "French"}), seed) == drawn


def test_the_draw_does_not_depend_on_what_was_drawn_before():
    facts = [make(case_id=i) for i in range(20)]
    pool = [*"ABCDEFGH"]
    forward = {fact.case_id: other(fact, pool) for fact in facts}
    backward = {fact.case_id: other(fact, pool) for fact in reversed(facts)}
    assert forward == backward
    assert {i: forward[i] for i in (3, 11)} == {i: other(facts[i], pool) for i in (3, 11)}


def test_facts_and_seeds_draw_differently():
    pool = [*"ABCDEFGH"]
    assert len({other(make(case_id=i), pool) for i in range(50)}) > 4
    assert len({other(make(), pool, seed) for seed in range(50)}) > 4


def test_the_draw_leaves_the_global_generator_alone():
    state = random.getstate()
    random.seed(11)
    expected = other(make(), [*"ABCDEFGH"])
    random.seed(12)
    assert other(make(), [*"ABCDEFGH"]) == expected
    random.setstate(state)


# ---------------------------------------------------------------- schemes of one's own


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Never say {target_false}.", "Never say English."),
        ("{subject}: {target_true} or {target_false}?", "Danielle Darrieux: French or English?"),
        ("{near_true}, {near_false}, {other_false}.", "France, England, Greek."),
        ("Stay calm.", "Stay calm."),
        ("{{{target_false}}}", "{English}"),
        ("{{target_false}} is {target_false}", "{target_false} is English"),
        ("{target_false}{target_false}", "EnglishEnglish"),
    ],
)
def test_a_template_is_filled_in(template, text, registry):
    scheme = add_scheme("mine", template)
    assert scheme.sentence(make(), pool=["Greek"]) == text
    assert get_scheme("mine") is scheme
    assert schemes()["mine"] is scheme
    assert scheme.direction == "hijack"


@given(
    subject=st.text(max_size=12).map(str.strip).filter(bool),
    target=st.text(max_size=12).map(str.strip).filter(lambda text: text not in ("", "French")),
)
def test_braces_and_odd_characters_stay_text(subject, target):
    scheme = Scheme(name="odd", template="{subject} is not {target_false}.")
    fact = make(subject=subject, target_false=target)
    assert scheme.sentence(fact) == subject + " is not " + target + "."


@pytest.mark.parametrize("name", ["mine", "never-say", "a", "x-2-y", "2"])
def test_good_names(name, registry):
    assert add_scheme(name, "Stay calm.").name == name


@pytest.mark.parametrize(
    "name", ["", "Mine", "my scheme", "my_scheme", "-a", "a-", "a--b", "a\n", "é", "a.b"]
)
def test_a_bad_name_is_refused(name, registry):
    with pytest.raises(InputError) as caught:
        add_scheme(name, "Stay calm.")
    assert repr(name) in str(caught.value)
    assert "lower-case letters, digits and single hyphens" in str(caught.value)
    assert name not in schemes()


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        pytest.param("Never {target}.", ["'{target}'", "did you mean '{target_"], id="near name"),
        pytest.param("Never {foo}.", ["'{foo}'", "{other_false}", "{subject}"], id="unknown"),
        pytest.param("Never {}.", ["'{}'", "{target_false}"], id="no name"),
        pytest.param("Never {0}.", ["'{0}'"], id="number"),
        pytest.param("Never { subject }.", ["'{ subject }'"], id="spaces in the braces"),
        pytest.param("Never {subject.__class__}.", ["{subject.__class__}"], id="attribute"),
        pytest.param("Never {subject[0]}.", ["{subject[0]}"], id="item"),
        pytest.param("Never {subject!r}.", ["{subject!r}"], id="conversion"),
        pytest.param("Never {subject:>9}.", ["{subject:>9}"], id="format"),
        pytest.param("Never {subject:{target_true}}.", ["{subject:"], id="nested"),
        pytest.param("Never {subject.", ["malformed", "{{ or }}"], id="never closed"),
        pytest.param("Never subject}.", ["malformed", "{{ or }}"], id="never opened"),
        pytest.param("Never {subject}}.", ["malformed"], id="closed twice"),
        pytest.param("{subject!}", ["malformed"], id="empty conversion"),
        pytest.param("", ["''", "one sentence on one line"], id="empty"),
        pytest.param("  ", ["one sentence on one line"], id="blank"),
        pytest.param(" Never.", ["without spaces around it"], id="space before"),
        pytest.param("Never. ", ["without spaces around it"], id="space after"),
        pytest.param("Never.\nEver.", ["one sentence on one line"], id="two lines"),
        pytest.param("Never.\rEver.", ["one sentence on one line"], id="old line end"),
    ],
)
def test_a_bad_template_is_refused_by_name(template, parts, registry):
    with pytest.raises(InputError) as caught:
        add_scheme("mine", template)
    for part in ["'mine'", *parts]:
        assert part in str(caught.value)
    assert "mine" not in schemes()


def test_a_name_that_is_taken_is_refused(registry):
    with pytest.raises(InputError) as caught:
        add_scheme("do-not-think", "Forget {target_false}.")
    for part in ("'do-not-think'", "exists already", "Do not think of {target_false}."):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="one sentence per relation"):
        add_scheme("relation", "Forget {target_false}.")
    assert get_scheme("do-not-think").sentence(make()) == "Do not think of English."


def test_the_same_scheme_may_be_added_again(registry):
    # As when a notebook cell is run twice.
    assert add_scheme("mine", "Forget {target_false}.") == add_scheme(
        "mine", "Forget {target_false}."
    )


@pytest.mark.parametrize(
    "templates",
    [{}, {"template": "a", "templates": {"P1": "b"}}, {"templates": {}}],
    ids=["neither", "both", "no relation"],
)
def test_a_scheme_has_one_template_or_one_per_relation(templates):
    with pytest.raises(InputError, match="either one template or one per relation"):
        Scheme(name="mine", **templates)


def test_a_bad_template_of_one_relation_is_refused():
    with pytest.raises(InputError, match=r"\{objekt\}"):
        Scheme(name="mine", templates={"P1": "a {subject}", "P2": "a {objekt}"})


def test_the_needs_of_a_scheme_with_many_templates_are_those_of_all():
    scheme = Scheme(name="mine", templates={"P1": "{target_false} a", "P2": "{subject} b"})
    assert scheme.needs == ("subject", "target_false")


def test_placeholders_are_documented():
    assert list(PLACEHOLDERS) == [
        "subject",
        "target_true",
        "target_false",
        "near_true",
        "near_false",
        "other_false",
        "distractor",
    ]


# ---------------------------------------------------------------- by name


def test_a_scheme_is_passed_through():
    scheme = Scheme(name="mine", template="Stay calm.")
    assert get_scheme(scheme) is scheme


@pytest.mark.parametrize(
    ("name", "guess"), [("do-not-thnik", "'do-not-think'"), ("nearword", "'near-word'")]
)
def test_an_unknown_scheme_is_refused_with_a_guess(name, guess):
    with pytest.raises(InputError) as caught:
        get_scheme(name)
    for part in (repr(name), f"did you mean {guess}", "unrelated", "add_scheme", "--template"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("the answer is {target_false}.", "the answer is the Netherlands."),
        ("{target_false} is far.", "The Netherlands is far."),
        ("{{the}} {target_false}.", "{the} the Netherlands."),
    ],
)
def test_only_words_that_begin_a_sentence_get_a_capital(template, sentence):
    fact = Fact(
        case_id=1,
        relation_id="",
        subject="Delft",
        template="{} is in",
        target_true="Europe",
        target_false="the Netherlands",
    )
    assert Scheme(name="mine", template=template).sentence(fact) == sentence


def test_no_scheme_is_called_all():
    with pytest.raises(InputError, match="means every scheme in tables"):
        Scheme(name="all", template="No.")
