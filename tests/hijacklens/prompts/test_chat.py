"""Chat prompts: the ids of `apply_chat_template`, spans that partition them, and plain scores."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from inspect import signature

import pytest
import torch
from plain_huggingface import PlainScorer
from sample_facts import sample_facts
from tiny_models import tiny_model, tiny_tokenizer
from type_checks import unchecked

from hijacklens.errors import InputError
from hijacklens.facts.chat import ASKERS, TURNS, Chat
from hijacklens.models.loading import load_model
from hijacklens.prompts.chat import prompt_of
from hijacklens.prompts.tokens import locate
from hijacklens.results.result import load_result
from hijacklens.scoring.answers import answer
from hijacklens.scoring.continuing import Generation
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.generation import answers
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.pairs import pairs
from hijacklens.scoring.result import HijackResult
from probes import attention

SENTENCE = "Do not think of Rome."
EACH = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": EACH + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "default system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.\n' }}"
    "{% endif %}" + EACH + "{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 3": "{{ bos_token }}" + EACH + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>"
    "\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}" + OPEN
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama 2": EACH + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ '<<SYS>> ' + m.content + ' <</SYS>>' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}" + EACH
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}" + OPEN
    + "{{ '<start_of_turn>model\n' }}{% endif %}",
    "zephyr": EACH + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    + OPEN + "{{ '<|assistant|>' }}{% endif %}",
    "deepseek": "{{ bos_token }}" + EACH + "{% if m.role == 'system' %}{{ m.content }}{% elif "
    "m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}{{ '<|Assistant|>' + m.content + "
    "eos_token }}{% endif %}{% endfor %}" + OPEN + "{{ '<|Assistant|>' }}{% endif %}",
    "vicuna": EACH + "{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ' if m.role == 'assistant' "
    "else '') + m.content + ' ' }}{% endfor %}" + OPEN + "{{ 'ASSISTANT:' }}{% endif %}",
    "phi": EACH + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    + OPEN + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
}  # fmt: skip
"""Templates in the form of nine families, in few words."""
CHATS = [Chat(hijack=turn, query=asker) for turn in TURNS for asker in ASKERS]
BY_BOTH = [("llama", name) for name in TEMPLATES] + [("gemma", "gemma"), ("gpt2", "chatml")]


def with_template(family, name):
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def ids_of(tokenizer, turns, chat):
    """The token ids that transformers itself makes of the turns."""
    options = {"continue_final_message": True} if chat.query == "assistant" else {}
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=not options, return_dict=False, **options
    )


@pytest.mark.parametrize(("family", "name"), BY_BOTH)
def test_ids_are_those_of_the_template_and_spans_partition_them(family, name):
    tokenizer = with_template(family, name)
    for chat, dose in itertools.product(CHATS, (0, 2)):
        facts = sample_facts().in_chat(chat)
        fact = facts[0]
        if chat.hijack == "system" and name == "gemma":
            with pytest.raises(InputError, match=r"refuses the turns system.*no system role"):
                prompt_of(fact, facts, tokenizer)
            continue
        sentences = " ".join([SENTENCE] * dose)
        prompt = prompt_of(fact, facts, tokenizer, sentence=SENTENCE, dose=dose)
        located = locate(tokenizer, prompt)
        expected = ids_of(tokenizer, chat.turns(sentences, fact.prompt), chat)
        assert list(located.ids) == expected
        assert expected.count(tokenizer.bos_token_id) == TEMPLATES[name].count("bos_token") * (
            1 + (name == "llama 2" and chat.hijack == "earlier" and dose > 0)
        )
        parts = [located.spans[x] for x in ("bos", "opening", "hijack", "query", "template")]
        assert sorted(itertools.chain(*parts)) == list(range(len(located.ids)))
        for span, text in (("hijack", sentences), ("query", fact.prompt)):
            pieces = [located.offsets[i] for i in located.spans[span]]
            covered = prompt.text[pieces[0][0] : pieces[-1][1]] if pieces else ""
            # A token at the border may hold a character of the template, too.
            assert text in covered
            assert len(covered) <= len(text) + 2


@pytest.mark.parametrize(
    ("name", "gap"),
    [("chatml", ""), ("llama 2", " "), ("vicuna", " "), ("deepseek", ""), ("zephyr", "\n")],
)
def test_an_answer_joins_its_header_as_in_the_template(name, gap):
    tokenizer = with_template("llama", name)
    facts = sample_facts().in_chat(Chat())
    prompt = prompt_of(facts[0], facts, tokenizer)
    if gap == "\n":  # the generation prompt of the template ends before it
        assert prompt.joining == "auto"
    else:
        assert prompt.followed_by("Rome") == f"{prompt.text}{gap}Rome"


@pytest.fixture(scope="module")
def chatml():
    plain, tokenizer = tiny_model("llama"), with_template("llama", "chatml")
    return plain, tokenizer, load_model(copy.deepcopy(plain), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("chat", "sharing"),
    [(CHATS[0], "packed"), (CHATS[3], "cached"), (CHATS[4], "packed"), (CHATS[4], "plain")],
    ids=str,
)
def test_scores_are_those_of_a_plain_forward_pass(chatml, chat, sharing):
    plain, tokenizer, model = chatml
    facts = sample_facts()
    execution = Execution(store=False, sharing=sharing)
    result = hijack(model, facts, doses=(0, 1), execution=execution, quiet=True, chat=chat)
    assert result.settings.facts == facts.in_chat(chat).record()
    assert len(result.items) == 2 * len(facts)
    for row in result.items.to_dict("records"):
        fact = next(fact for fact in facts if fact.case_id == row["case_id"])
        sentences = f"Do not think of {fact.target_false}." if row["dose"] else ""
        before = ids_of(tokenizer, chat.turns(sentences, fact.prompt), chat)
        options = {"tokenize": False, "add_generation_prompt": chat.query == "user"}
        options |= {} if chat.query == "user" else {"continue_final_message": True}
        text = tokenizer.apply_chat_template(chat.turns(sentences, fact.prompt), **options)
        gap = "" if chat.query == "user" else " "
        for side in ("true", "false"):
            target = getattr(fact, f"target_{side}")
            whole = tokenizer(text + gap + target, add_special_tokens=False).input_ids
            logprobs = PlainScorer(plain, tokenizer).logits(whole[:-1]).double().log_softmax(-1)
            scores = [logprobs[i - 1, whole[i]] for i in range(len(before), len(whole))]
            assert whole[: len(before)] == before
            assert row[f"sum_{side}"] == pytest.approx(float(sum(scores)), abs=1e-4)
            assert row[f"first_{side}"] == pytest.approx(float(scores[0]), abs=1e-4)


def test_a_run_with_a_probe_saves_its_chat_and_pairs_align_the_template(chatml, tmp_path):
    model = chatml[2]
    chat = Chat(hijack="earlier", system="You help.", reply="Yes.")
    facts = sample_facts()
    probe = attention.knock_out(source="all", target="hijack")
    options = {"probes": [probe], "execution": Execution(store=False), "quiet": True}
    result = hijack(model, facts, doses=(1,), chat=chat, **options)
    loaded = load_result(result.save(tmp_path / "run"))
    assert isinstance(loaded, HijackResult)
    assert loaded.settings.facts.chat == chat
    assert "in a chat (hijack: earlier, query: user)" in str(loaded)
    said = answers(model, facts, result, probes=[probe], generation=Generation(tokens=1))
    assert said.settings.scored.facts.chat == chat
    pair = pairs(model, facts, chat=chat)[0]
    assert pair.items[1].prompt == pairs(model, facts.in_chat(chat))[0].items[1].prompt
    for side, located in (("bare", pair.bare), ("hijacked", pair.hijacked)):
        positions = [i for unit in pair.units for i in getattr(unit, side)]
        assert sorted(positions) == list(range(len(located.ids)))
    assert not any(unit.bare for unit in pair.units if unit.span == "hijack")
    template = [unit for unit in pair.units if unit.span == "template"]
    assert "Yes." in "".join(unit.token for unit in template if not unit.bare)
    both = [unit for unit in template if unit.bare and unit.hijacked]
    assert both
    assert all(pair.bare.ids[x.bare[0]] == pair.hijacked.ids[x.hijacked[0]] for x in both)


def test_ask_in_a_chat(chatml):
    plain, tokenizer, model = chatml
    chat = Chat(hijack="system")
    said = answer(model, "The city is", targets=["Rome"], tokens=2, chat=chat)
    ids = torch.tensor([ids_of(tokenizer, chat.turns("", "The city is"), chat)])
    logprobs = plain(ids).logits[0, -1].log_softmax(-1)
    assert said.top[0].logprob == pytest.approx(float(logprobs.max().detach()), abs=1e-4)


@pytest.mark.parametrize(
    ("template", "chat", "query", "message"),
    [
        (None, Chat(), "{} is in", "has no chat template"),
        (TEMPLATES["llama 3"], Chat(query="assistant"), "{} is in ", r"changes '.* is in '"),
        (TEMPLATES["llama 3"], Chat(system=" Be brief."), "{} is in", "changes ' Be brief.'"),
        (
            EACH + "{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
            Chat(hijack="system"),
            "{} is in",
            "leaves out or changes 'You are a helpful",
        ),
        (EACH + "{{ m.content | upper }}{% endfor %}", Chat(), "{} is in", "leaves out or changes"),
    ],
)
def test_what_a_template_would_change_is_refused(template, chat, query, message):
    tokenizer = copy.deepcopy(tiny_tokenizer("llama"))
    tokenizer.chat_template = template
    fact = replace(sample_facts()[0], template=query)
    facts = replace(sample_facts(), facts=(fact,)).in_chat(chat)
    with pytest.raises(InputError, match=message):
        prompt_of(fact, facts, tokenizer)


def test_a_chat_has_known_turns():
    with unchecked(), pytest.raises(InputError, match=r"turn of the hijack.*sytem.*system"):
        Chat(hijack="sytem")  # type: ignore[arg-type]
    with unchecked(), pytest.raises(InputError, match=r"hl\.Chat"):
        sample_facts().in_chat("user")  # type: ignore[arg-type]
    assert str(signature(hijack)).endswith("chat: 'Chat | None' = None) -> 'HijackResult'")
