"""Prompts and targets in tokens: the tokenizer's own default, targets in context, spans."""

from __future__ import annotations

import copy
from functools import cache
from itertools import accumulate, product
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hijacklens.errors import InputError
from hijacklens.facts.atlas import atlas
from hijacklens.facts.fact import Fact
from hijacklens.prompts.prefixes import symbols_of
from hijacklens.prompts.prompt import Prompt, compose, make_prompt
from hijacklens.prompts.tokens import (
    WITHIN,
    Continuation,
    WordByWord,
    continuation,
    encode,
    locate,
)

DISJOINT = ("bos", "opening", "hijack", "query")
PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokenizer(family):
    return tiny_tokenizer(family)


@pytest.fixture(scope="session")
def gpt2(shared):
    """The real GPT-2 tokenizer."""
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")


def closing(family: str, end: str | None = None):
    """A tokenizer that closes every text with an end-of-sequence token."""
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    bos, end = tokenizer.bos_token, end or tokenizer.eos_token
    before = "" if family == "gpt2" else f"{bos} "
    end_id = tokenizer.convert_tokens_to_ids(end)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A {end}",
        special_tokens=[(bos, tokenizer.bos_token_id), (end, end_id)],
    )
    assert tokenizer("a").input_ids[-1] == end_id
    return tokenizer


def read(tokenizer, prompt: str, target: str) -> Continuation:
    return continuation(*encode(tokenizer, [prompt, f"{prompt} {target}"]))


def squeeze(text: str) -> str:
    return "".join(text.split())


# ---------------------------------------------------------------- encode


def test_ids_are_those_of_the_tokenizers_default_call(family, tokenizer):
    texts = [PROMPT, "Rome", "Zürich 北京 🗼", "Do not think of Guam. " + PROMPT]
    assert encode(tokenizer, texts) == [tuple(tokenizer(text).input_ids) for text in texts]
    first = {ids[0] for ids in encode(tokenizer, texts)}
    assert (first == {tokenizer.bos_token_id}) == (family != "gpt2")


def test_no_texts_give_no_ids(tokenizer):
    assert encode(tokenizer, []) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_appended_token_is_taken_off(family):
    """The end of sequence, or a separator that is not one."""
    texts = [PROMPT, "Rome"]
    expected = encode(tiny_tokenizer(family), texts)
    for end in (None, tiny_tokenizer(family).convert_ids_to_tokens(7)):
        assert encode(closing(family, end), texts) == expected


def test_an_end_token_that_the_text_spells_out_stays(family, tokenizer):
    text = f"Rome{tokenizer.eos_token}"
    (ids,) = encode(tokenizer, [text])
    assert ids[-1] == tokenizer.eos_token_id
    assert encode(closing(family), [text]) == [ids]


def test_ids_do_not_depend_on_the_other_texts(tokenizer):
    texts = ["Rome", PROMPT, "Do not think of Guam. " + PROMPT]
    assert encode(tokenizer, texts) == [encode(tokenizer, [text])[0] for text in texts]


AWKWARD = st.text(
    st.sampled_from("abGu 19.,'\"-éü北京。🗼\u0301\u3000\u200b\u2581\u0120\n\t\u00a0"), max_size=8
)
AWKWARD |= st.text(max_size=5) | st.sampled_from(
    ["<s>", "</s>", "<|endoftext|>", "it's", "x>", "</b"]
)


PIECES = st.lists(AWKWARD, max_size=3).map(" ".join)
ENDING = st.lists(PIECES, min_size=1, max_size=2)
TEXTS = st.tuples(
    st.lists(st.lists(PIECES, max_size=2), max_size=2),
    st.lists(ENDING, max_size=2),
)


@cache
def word_by_word(tokenizer):
    return WordByWord(tokenizer, fewest=0)


@cache
def across_spaces():
    """A tokenizer whose pieces may hold a space, as those of SentencePiece without splitting do."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    texts = [f"{fact.prompt} {fact.target_true}. Do not think of Guam." for fact in atlas()]
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def test_no_word_is_encoded_alone_whose_end_a_token_joins_with_the_next():
    tokenizer = across_spaces()
    facts = [f"{fact.prompt} {fact.target_true}" for fact in atlas().sample(60, seed=0)]
    assert any(" " in piece.replace("\u2581", " ").strip() for piece in tokenizer.get_vocab())
    texts = [([[]], [fact.split(" ")]) for fact in facts]
    found = WordByWord(tokenizer, fewest=0).encode(texts)
    assert list(map(symbols_of, found)) == encode(tokenizer, facts)


@settings(max_examples=100)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_ids_word_by_word_are_those_of_the_whole_text(texts, gpt2):
    """Accents, CJK, emoji, digits, quotes, runs of spaces, space markers and special tokens."""
    whole = [
        " ".join(beginning + ending)
        for beginnings, endings in texts
        for beginning, ending in product(beginnings, endings)
    ]
    for tokenizer in (gpt2, *map(tiny_tokenizer, FAMILIES)):
        expected = encode(tokenizer, whole)
        assert list(map(symbols_of, word_by_word(tokenizer).encode(texts))) == expected


@pytest.mark.parametrize(
    ("across", "whole"),
    [("x\u0120y", True), ("\u010a\u0120y", False), ("\u0120\u0120x", False)],
)
def test_words_are_encoded_alone_unless_a_token_reaches_across_a_space(across, whole):
    """The tokenizer has one token more, which joins "x y"; the others cannot lie between words."""
    tokenizer = tiny_tokenizer("gpt2")
    calls = []

    class Wider:
        is_fast, eos_token_id = True, None

        def __call__(self, texts, **options):
            calls.extend(texts if isinstance(texts, list) else ())
            return tokenizer(texts, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def get_vocab(self):
            return {**tokenizer.get_vocab(), across: 999}

    words = WordByWord(Wider(), fewest=0)
    found = words.encode([([["in x"]], [["y"]])])
    assert list(map(symbols_of, found)) == encode(tokenizer, ["in x y"])
    assert calls.count("in x y") == whole


# ---------------------------------------------------------------- targets in context


@pytest.mark.parametrize(
    ("before", "after", "context", "target"),
    [
        pytest.param((5, 6), (5, 6, 9), (5, 6), (9,), id="one token"),
        pytest.param((5, 6), (5, 6, 9, 8), (5, 6), (9, 8), id="two tokens"),
        pytest.param((1, 5), (1, 5, 1), (1, 5), (1,), id="target equals the BOS"),
        pytest.param((5, 6), (5, 7, 8), (5,), (7, 8), id="the last token of the prompt changes"),
        pytest.param((5, 6, 7), (5, 9), (5,), (9,), id="target and prompt merge into fewer"),
        pytest.param((5, 6), (5, 6, 6), (5, 6), (6,), id="target repeats the prompt's end"),
    ],
)
def test_a_target_starts_where_the_two_part(before, after, context, target):
    assert continuation(before, after) == Continuation(context, target)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        pytest.param((5, 6), (5, 6), "adds no token", id="nothing is added"),
        pytest.param((5, 6), (5,), "adds no token", id="it swallows the prompt's end"),
        pytest.param((5,), (6,), "no token precedes the target", id="all changes"),
        pytest.param((), (6,), "no token precedes the target", id="empty prompt"),
    ],
)
def test_a_target_without_tokens_or_context_is_refused(before, after, message):
    with pytest.raises(ValueError, match=message):
        continuation(before, after)


def test_the_steps_of_a_target():
    assert Continuation((5, 6), (9, 8, 7)).steps == [
        ((5, 6), 9),
        ((5, 6, 9), 8),
        ((5, 6, 9, 8), 7),
    ]


@pytest.mark.parametrize("target", ["Paris", "Rome", "Tokyo", "Zürich", "北京", "New Guam", "a"])
def test_a_target_reads_as_its_text(target, family, tokenizer):
    found = read(tokenizer, PROMPT, target)
    assert found.context == encode(tokenizer, [PROMPT])[0]
    assert found.context + found.target == encode(tokenizer, [f"{PROMPT} {target}"])[0]
    assert tokenizer.decode(found.target) == f" {target}"
    assert tokenizer.bos_token_id not in found.target
    assert tokenizer.eos_token_id not in found.target


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_holds_neither_bos_nor_an_appended_eos(family):
    tokenizer = closing(family)
    found = read(tokenizer, PROMPT, "Guam Paris")
    assert found == read(tiny_tokenizer(family), PROMPT, "Guam Paris")
    assert tokenizer.eos_token_id not in found.target
    assert tokenizer.bos_token_id not in found.target


def test_the_space_belongs_to_the_target_as_in_sentencepiece():
    # Alone, "Paris" and " Paris" differ by a marker of their own; in context it is one token.
    llama = tiny_tokenizer("llama")
    assert llama.convert_ids_to_tokens(read(llama, PROMPT, "Paris").target) == ["▁Paris"]
    alone = llama.convert_ids_to_tokens(llama(" Paris", add_special_tokens=False).input_ids)
    assert alone[0] == "▁"
    gpt2 = tiny_tokenizer("gpt2")
    assert gpt2.convert_ids_to_tokens(read(gpt2, PROMPT, "Paris").target) == ["ĠParis"]


def test_targets_of_several_tokens_may_share_their_first(tokenizer):
    one, two = read(tokenizer, PROMPT, "Guam Paris"), read(tokenizer, PROMPT, "Guam Rome")
    assert len(one.target) > 1
    assert one.target[0] == two.target[0]
    assert one.target != two.target
    assert one.steps[0] == two.steps[0]
    assert one.steps[1] != two.steps[1]


@pytest.mark.parametrize(
    ("target", "tokens"),
    [
        ("Paris", ["ĠParis"]),
        ("New York", ["ĠNew", "ĠYork"]),
        ("New Delhi", ["ĠNew", "ĠDelhi"]),
        ("Zürich", ["ĠZ", "Ã¼", "rich"]),
    ],
)
def test_targets_with_the_real_gpt2_tokenizer(target, tokens, gpt2):
    assert gpt2.convert_ids_to_tokens(read(gpt2, PROMPT, target).target) == tokens


def test_a_prompt_that_ends_in_the_middle_of_a_token(gpt2):
    # "Hello" + "," + " I": the tokens before the target are the prompt's, up to where they part.
    found = read(gpt2, 'He said "', "Paris")
    assert gpt2.decode(found.context + found.target) == 'He said " Paris'
    assert found.context == encode(gpt2, ['He said "'])[0]


# ---------------------------------------------------------------- spans in tokens


def make(template: str = "The {} is in the city of", subject: str = "Eiffel Tower") -> Fact:
    return Fact(
        case_id=0,
        relation_id="P131",
        subject=subject,
        template=template,
        target_true="Paris",
        target_false="Guam",
    )


def words(tokenizer, ids, positions) -> str:
    return squeeze(tokenizer.decode([ids[i] for i in positions]))


@pytest.mark.parametrize("dose", [0, 1, 3])
@pytest.mark.parametrize(
    ("template", "subject", "sentence"),
    [
        pytest.param("The {} is in the city of", "Eiffel Tower", "Do not think of Guam.", id="in"),
        pytest.param("{} is in", "Paris", "Do not think of Guam.", id="first"),
        pytest.param("The capital of {}", "Italy", "Think of London.", id="last"),
        pytest.param("{} is in", "Xqz", "Qqq xx!", id="pieces"),
        pytest.param("Wo {} liegt, ist", "Zürich", "Nicht Île.", id="accents"),
        pytest.param("{} is in", "北京 🗼", "不要想 Guam。", id="many bytes a letter"),
        pytest.param("{} is in", "Guam", "Guam is not in Guam.", id="subject in the sentence"),
    ],
)
def test_spans_hold_exactly_their_words(template, subject, sentence, dose, family, tokenizer):
    fact = make(template, subject)
    prompt = make_prompt(fact, sentence=sentence, dose=dose, scheme="x")
    located = locate(tokenizer, prompt)
    assert (located.ids,) == tuple(encode(tokenizer, [prompt.text]))
    spans, ids = located.spans, located.ids
    assert words(tokenizer, ids, spans["hijack"]) == squeeze(sentence) * dose
    assert words(tokenizer, ids, spans["query"]) == squeeze(fact.prompt)
    assert words(tokenizer, ids, spans["subject"]) == squeeze(subject)
    assert set(spans["subject"]) <= set(spans["query"])
    assert not set(spans["hijack"]) & set(spans["query"])
    assert spans["last"] == (len(ids) - 1,)
    assert spans["last"][0] in spans["query"]
    assert spans["bos"] == (() if family == "gpt2" else (0,))
    assert spans["opening"] == ()
    # A token may include the full stop after the word.
    named = words(tokenizer, ids, spans["mention"]).replace(".", "").replace("。", "")
    assert named == "Guam" * sentence.count("Guam") * dose
    assert set(spans["mention"]) <= set(spans["hijack"])
    assert spans["target"] == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_a_tokenizer_that_closes_its_texts(family):
    prompt = make_prompt(make(), sentence="Do not think of Guam.", dose=2, scheme="x")
    assert locate(closing(family), prompt) == locate(tiny_tokenizer(family), prompt)


def test_spans_with_the_real_gpt2_tokenizer(gpt2):
    prompt = make_prompt(make(), sentence="Do not think of Guam.", dose=1, scheme="x")
    located = locate(gpt2, prompt)
    assert gpt2.convert_ids_to_tokens(located.ids) == [
        "Do", "Ġnot", "Ġthink", "Ġof", "ĠGuam", ".",
        "ĠThe", "ĠE", "iff", "el", "ĠTower", "Ġis", "Ġin", "Ġthe", "Ġcity", "Ġof",
    ]  # fmt: skip
    assert dict(located.spans) == {
        "opening": (),
        "hijack": (0, 1, 2, 3, 4, 5),
        "mention": (4,),
        "query": tuple(range(6, 16)),
        "subject": (7, 8, 9, 10),
        "bos": (),
        "last": (15,),
        "target": (),
    }


@pytest.mark.parametrize(
    ("query", "subject", "tokens", "spans"),
    [
        # A space before a digit is a separate token in both packaged tokenizers.
        ("2005 Games", "2005", ["So", ".", " ", "2005", " Games"], {"query": 2, "subject": 2}),
        ("Rome is ", "Rome", ["So", ".", " Rome", " is", " "], {"query": 2, "subject": 2}),
        ("Rome is", "Rome", ["So", ". Ro", "me is"], {"query": 1, "subject": 1}),
        ("é is", "é", ["So.", " \u00e9", "", " is"], {"query": 1, "subject": 1}),
    ],
)
def test_tokens_without_letters_belong_to_what_follows(query, subject, tokens, spans):
    prompt = compose(query, sentence="So.", dose=1, subject=(0, len(subject)))
    ends = list(accumulate(map(len, tokens)))
    found = locate(hand_made([*zip([0, *ends], ends, strict=False)]), prompt)
    assert found.spans["query"] == tuple(range(spans["query"], len(tokens)))
    assert found.spans["hijack"] == tuple(range(spans["query"]))
    assert found.spans["subject"][0] == spans["subject"]


def hand_made(offsets):
    """A tokenizer that cuts every text at given characters."""

    class HandMade:
        is_fast, eos_token_id = True, None

        def __call__(self, text, **options):
            rows = [list(range(len(offsets)))] * (len(text) if isinstance(text, list) else 1)
            ids = rows if isinstance(text, list) else rows[0]
            added = [0] * len(offsets)
            return {"input_ids": ids, "offset_mapping": offsets, "special_tokens_mask": added}

    return HandMade()


WORD = st.text(
    st.sampled_from("abGuam 19 .,{}'\"-éü北京。🗼\u0627\u0301\u3000\u200b"), min_size=1, max_size=8
).filter(str.strip)
PIECE = WORD | st.sampled_from(["<s>", "<bos>", "<|endoftext|>", "2005 Games", "New  York"])
LINE = st.lists(PIECE, min_size=1, max_size=3).map(" ".join)
"""Accents, CJK, emoji, digits, quotes, runs of spaces, characters of no width, special tokens."""


@settings(max_examples=150)
@given(
    name=st.sampled_from([*FAMILIES, "real gpt2"]),
    subject=LINE,
    sentence=LINE,
    dose=st.integers(0, 2),
    opening=st.just("") | LINE.map(str.lstrip),
)
def test_the_disjoint_spans_partition_every_prompt(name, subject, sentence, dose, opening, gpt2):
    tokenizer = gpt2 if name == "real gpt2" else tiny_tokenizer(name)
    prompt = make_prompt(
        make(subject=subject), sentence=sentence, dose=dose, scheme="x", opening=opening
    )
    located = locate(tokenizer, prompt)
    assert located.ids == encode(tokenizer, [prompt.text])[0]
    spans = located.spans
    parts = [position for span in DISJOINT for position in spans[span]]
    assert sorted(parts) == list(range(len(located.ids)))
    assert spans["bos"] == (() if "gpt2" in name else (0,))
    assert located.positions("all") == tuple(sorted(parts))
    text, offsets = prompt.text, located.offsets
    for span, outer in (*zip(DISJOINT[1:], DISJOINT[1:], strict=True), *WITHIN.items()):
        inside = {c for a, b in prompt.spans[span] for c in range(a, b) if text[c].strip()}
        tokens = {i: {c for c in range(*offsets[i]) if text[c].strip()} for i in spans[span]}
        assert set(spans[span]) <= set(spans[outer])
        assert all(letters & inside for letters in tokens.values() if letters)
        for letters in tokens.values() if span == outer else ():
            assert not letters or max(letters) in inside


def test_a_slow_tokenizer_is_refused():
    prompt = Prompt(text="a", scheme="x", dose=0, spans={})
    with pytest.raises(InputError) as caught:
        locate(SimpleNamespace(is_fast=False), prompt)
    for part in ("SimpleNamespace", "no character offsets", "use_fast=True"):
        assert part in str(caught.value)
