"""Prompts in the chat template of a tokenizer, with their spans.

The text is what `tokenizer.apply_chat_template` writes, character by character, and its token ids
are those of that call. The spans keep their names; what the template adds is the span `template`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateError

from hijacklens.errors import InputError
from hijacklens.facts.chat import Chat
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.facts.joining import Joining
from hijacklens.prompts.prompt import CharacterSpan, Prompt, make_prompt

HEAD, TAIL = "HIJACKLENSHEAD", "HIJACKLENSQUERY"
"""Words that hold the places of the sentences and of the query in a template."""


def prompt_of(fact: Fact, facts: FactSet, tokenizer: Any, **sentences: Any) -> Prompt:
    """Make the prompt of a fact as its set asks it: with its opening, joining and chat.

    `sentences` are those of `make_prompt`; by default the prompt is the bare query.

    Raises:
        InputError: As `in_chat`.
    """
    prompt = make_prompt(fact, joining=facts.joining, opening=facts.opening, **sentences)
    return in_chat(prompt, facts.chat, tokenizer)


def in_chat(prompt: Prompt, chat: Chat | None, tokenizer: Any) -> Prompt:
    """Return the prompt in the chat template of a tokenizer; without a chat, the prompt itself.

    The text before the query (opening and sentences) goes into the turn `chat.hijack`, the query
    into the turn `chat.query`.

    Raises:
        InputError: The tokenizer has no chat template, or the template refuses one of the turns,
            leaves one out, or changes the text, such as white space at the end of a query.
    """
    if chat is None:
        return prompt
    ((start, end),) = prompt.spans["query"]
    head, tail = prompt.text[:start].removesuffix(" "), prompt.text[start:end]
    form = _written(tokenizer, chat.turns(HEAD if head else "", TAIL), chat)
    text = _written(tokenizer, chat.turns(head, tail), chat)
    before, _, rest = form.partition(HEAD) if head else ("", "", form)
    between, _, after = rest.partition(TAIL)
    if text != before + head + between + tail + after:
        raise InputError(
            f"the chat template changes the text of a prompt: {head!r} and {tail!r} became "
            f"{text!r}. Check white space at their ends, and words that the template replaces."
        )
    starts = {True: len(before), False: len(text) - len(tail + after) - start}

    def moved(pieces: Sequence[CharacterSpan]) -> tuple[CharacterSpan, ...]:
        return tuple((a + starts[a < start], b + starts[a < start]) for a, b in pieces)

    template = ((0, len(before)), (len(before + head), starts[False] + start))
    spans = {name: moved(pieces) for name, pieces in prompt.spans.items()}
    spans["template"] = (*template, (len(text) - len(after), len(text)))
    joining = prompt.joining
    if joining == "auto" and chat.query == "user":
        joining = _answer_joins(tokenizer, chat, form)
    return replace(
        prompt, text=text, spans=MappingProxyType(spans), joining=joining, templated=True
    )


def _answer_joins(tokenizer: Any, chat: Chat, form: str) -> Joining:
    """Return how the template itself joins an answer to the header of the assistant's turn."""
    turns = [*chat.turns("", TAIL), {"role": "assistant", "content": HEAD}]
    header = form.partition(TAIL)[2]
    answered = _written(tokenizer, turns, chat, complete=True).partition(TAIL)[2]
    gap = answered.removeprefix(header).partition(HEAD)[0] if answered.startswith(header) else None
    return {"": "none", " ": "space"}.get(gap, "auto")  # type: ignore[arg-type, return-value]


def _written(
    tokenizer: Any, turns: list[dict[str, str]], chat: Chat, *, complete: bool = False
) -> str:
    """Return the text of turns, open at the end unless it is complete."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer of this model has no chat template, as is usual for base models. Ask "
            "without a chat, or set tokenizer.chat_template to the template of its training."
        )
    by_user = chat.query == "user"
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=by_user and not complete,
            continue_final_message=not (by_user or complete),
        )
    except (TemplateError, ValueError, TypeError) as error:
        listed = ", ".join(turn["role"] for turn in turns)
        raise InputError(
            f"the chat template of this model refuses the turns {listed}: {error}. Choose other "
            "turns, such as Chat(hijack='user')."
        ) from None
    missing = [turn["content"] for turn in turns if turn["content"] not in text]
    if missing:
        raise InputError(
            f"the chat template of this model leaves out or changes {missing[0]!r}: some have no "
            "system turn, and some drop white space at the ends of turns. Remove that, or choose "
            "other turns, such as Chat(hijack='user')."
        )
    return text
