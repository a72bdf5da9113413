"""The text of a prompt and its spans."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hijacklens.errors import InputError
from hijacklens.facts.fact import Fact
from hijacklens.prompts.prompt import Prompt, make_prompt


def make(template: str = "The {} is in", subject: str = "Eiffel Tower") -> Fact:
    return Fact(
        case_id=0,
        relation_id="P131",
        subject=subject,
        template=template,
        target_true="Paris",
        target_false="Guam",
    )


@pytest.mark.parametrize(
    ("opening", "before"),
    [("Well.", "Well. "), ("Okay, ", "Okay, "), ("<|endoftext|>", "<|endoftext|>"), ("", "")],
)
@pytest.mark.parametrize("dose", [0, 2])
def test_an_opening_precedes_bare_and_hijacked_prompts(opening, before, dose):
    fact = make()
    options = {"sentence": "Not Guam.", "dose": dose}
    plain, opened = (make_prompt(fact, opening=x, **options) for x in ("", opening))
    assert opened.text == before + plain.text
    assert cut(opened, "opening") == ([opening] if opening else [])
    for span in ("hijack", "mention", "query", "subject"):
        assert cut(opened, span) == cut(plain, span)


def cut(prompt: Prompt, name: str) -> list[str]:
    return [prompt.text[start:end] for start, end in prompt.spans[name]]


@pytest.mark.parametrize(
    ("dose", "text"),
    [
        (0, "The Eiffel Tower is in"),
        (1, "Not Guam. The Eiffel Tower is in"),
        (3, "Not Guam. Not Guam. Not Guam. The Eiffel Tower is in"),
    ],
)
def test_the_text_at_each_dose(dose, text):
    prompt = make_prompt(make(), sentence="Not Guam.", dose=dose, scheme="not")
    assert prompt.text == text
    assert (prompt.scheme, prompt.dose) == ("not", dose)
    assert cut(prompt, "hijack") == ["Not Guam."] * dose
    assert cut(prompt, "query") == ["The Eiffel Tower is in"]
    assert cut(prompt, "subject") == ["Eiffel Tower"]


@pytest.mark.parametrize(
    ("template", "subject", "sentence"),
    [
        pytest.param("{} is in", "Lyon", "Not Guam.", id="subject first"),
        pytest.param("The twin city of {}", "Lyon", "Not Guam.", id="subject last"),
        pytest.param("The twin city of {} ", "Lyon", "Not Guam.", id="space behind the subject"),
        pytest.param("is {} is", "is", "is is", id="subject occurs elsewhere"),
        pytest.param("{} is in", "{}", "{} {subject}", id="braces"),
        pytest.param("{} liegt in", "Zürich 北京", "Ja 🗼.", id="not ASCII"),
        pytest.param("e\u0301 {} is", "e\u0301", "e\u0301.", id="combining marks"),
        pytest.param("{} is", "Lyon", "Lyon is not Guam.", id="subject in the sentence"),
    ],
)
@pytest.mark.parametrize("dose", [0, 1, 2])
def test_spans_cover_exactly_their_words(template, subject, sentence, dose):
    fact = make(template, subject)
    prompt = make_prompt(fact, sentence=sentence, dose=dose, scheme="x")
    assert prompt.text == " ".join([sentence] * dose + [fact.prompt])
    assert cut(prompt, "hijack") == [sentence] * dose
    assert cut(prompt, "query") == [fact.prompt]
    assert cut(prompt, "subject") == [subject]
    (start, _), *_ = prompt.spans["subject"]
    assert prompt.text[:start].endswith(template.split("{}")[0])


PART = st.text(max_size=15).filter(lambda text: "{}" not in text)
WORD = st.text(max_size=15).map(str.strip).filter(bool)


@given(before=PART, after=PART, subject=WORD, sentence=WORD, dose=st.integers(0, 5))
def test_spans_of_anything(before, after, subject, sentence, dose):
    template = before + "{}" + after
    if template.count("{}") != 1:  # "{" + "{}" + "}" is fine, "{" + "}" across a seam is not
        return
    fact = make(template, subject)
    prompt = make_prompt(fact, sentence=sentence, dose=dose, scheme="x")
    assert prompt.text == " ".join([sentence] * dose + [fact.prompt])
    assert cut(prompt, "hijack") == [sentence] * dose
    assert cut(prompt, "query") == [fact.prompt]
    (found,) = cut(prompt, "subject")
    assert found == subject
    ends = [end for _, end in prompt.spans["hijack"]]
    starts = [start for start, _ in (*prompt.spans["hijack"], *prompt.spans["query"])]
    assert all(prompt.text[end] == " " for end in ends)
    assert starts == [0, *(end + 1 for end in ends)]


@pytest.mark.parametrize("dose", [-1, -5])
def test_a_negative_dose_is_refused(dose):
    with pytest.raises(InputError) as caught:
        make_prompt(make(), sentence="x", dose=dose, scheme="x")
    said = f"a dose, which counts sentences, is {dose}; give a whole number of at least 0."
    assert str(caught.value) == said


def test_a_prompt_cannot_be_changed():
    prompt = make_prompt(make(), sentence="x", dose=1, scheme="x")
    with pytest.raises(AttributeError):
        prompt.text = "other"
    with pytest.raises(TypeError):
        prompt.spans["query"] = ()
