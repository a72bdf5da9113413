"""Continue prompts: token by token, all prompts together, until each answer ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hijacklens.engine.growing import Growing, groups
from hijacklens.engine.plan import Sharing
from hijacklens.engine.reading import ReadOptions
from hijacklens.errors import InputError, number, whole_number
from hijacklens.models.exclusive import exclusively
from hijacklens.models.hooked import HookedLanguageModel, end_tokens
from hijacklens.probe import Probe, spans_of
from hijacklens.progress import bar
from hijacklens.prompts.layout import TOKEN_MASK, mark
from hijacklens.prompts.prompt import Prompt
from hijacklens.prompts.tokens import TokenIds, encode, locate
from hijacklens.scoring.items import ANSWER_SPANS

_SENTENCE = re.compile(r"(?<=\w\w\w[.!?])\s|(?<=[!?])\s|(?<=\S)\n")
"""The end of a sentence; "St." and initials do not end one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How answers are generated.

    Raises:
        InputError: A number is out of its range, or several greedy answers are requested.
    """

    tokens: int = 24
    """Maximum length; an answer also stops at the model's end tokens, and where the context window
    is full."""
    samples: int = 1
    """Answers to each prompt."""
    temperature: float = 0.0
    """0: the likeliest token at each step; otherwise tokens are drawn at this temperature."""
    seed: int = 0
    """Seeds the draws."""
    sentence: bool = True
    """Whether an answer stops at the end of its first sentence."""

    def __post_init__(self) -> None:
        whole_number("tokens", self.tokens, least=1)
        whole_number("samples", self.samples, least=1)
        number("temperature", self.temperature, least=0)
        whole_number("seed", self.seed)
        if self.samples > 1 and not self.temperature:
            raise InputError(
                f"{self.samples} samples at temperature 0 are equal; give a temperature, such as 1."
            )


@dataclass(slots=True)
class Draft:
    """An answer, or the beginning of one while it is written."""

    prefix: TokenIds
    """The symbols of the prompt and of the answer so far."""
    start: int
    """The number of symbols of the prompt."""
    text: str = ""
    done: bool = False
    """Whether the answer ended before the maximum length."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token of the answer, in nats, whatever the temperature."""

    @property
    def tokens(self) -> list[int]:
        """The token ids of the answer."""
        return [symbol & TOKEN_MASK for symbol in self.prefix[self.start :]]


def write(
    model: HookedLanguageModel,
    prompts: Sequence[Prompt],
    generation: Generation,
    *,
    probes: Sequence[Probe] = (),
    sharing: Sharing = "auto",
    quiet: bool = True,
) -> list[list[str]]:
    """Return the answers to each prompt, one for each sample.

    Args:
        model: A hooked language model.
        prompts: The prompts, all with a chat template or all without.
        generation: Length, samples, temperature and seed.
        probes: Act on every forward pass. Generated tokens belong to the spans `query`, `last` and
            `target`, like those of a target when it is scored.
        sharing: `plain` computes the complete prefix for every token; the answers are the same.
        quiet: Draw no progress bar.

    Note:
        Costs as for `continued`. A drawn answer depends on the seed and its prompt alone.
    """
    tokenizer, spans = model.tokenizer, spans_of(probes)
    templated = any(prompt.templated for prompt in prompts[:1])
    read = encode(tokenizer, [prompt.text for prompt in prompts], templated=templated)
    if spans:
        located = [locate(tokenizer, prompt) for prompt in prompts]
        read = [
            mark(ids, [prompt.positions(span) for span in spans])
            for ids, prompt in zip(read, located, strict=True)
        ]
    options = ReadOptions(
        probes=probes, spans=spans, temperature=generation.temperature, sharing=sharing
    )
    how = {"samples": generation.samples, "seed": generation.seed, "quiet": quiet}
    cut = first_sentence if generation.sentence else lambda text: None
    return continued(model, read, options, tokens=generation.tokens, cut=cut, **how)


def first_sentence(text: str) -> str | None:
    """Return the first sentence of an answer, or None while it has not ended."""
    end = _SENTENCE.search(text, len(text) - len(text.lstrip()))
    return text[: end.start()] if end else None


def continued(
    model: HookedLanguageModel, prompts: Sequence[TokenIds], options: ReadOptions, **how: Any
) -> list[list[str]]:
    """Return the texts of `drafted`, with its arguments."""
    return [[draft.text for draft in drafts] for drafts in drafted(model, prompts, options, **how)]


@exclusively
def drafted(
    model: HookedLanguageModel,
    prompts: Sequence[TokenIds],
    options: ReadOptions,
    *,
    tokens: int,
    cut: Callable[[str], str | None],
    samples: int = 1,
    seed: int = 0,
    quiet: bool = True,
) -> list[list[Draft]]:
    """Return the texts that continue prompts, with their tokens, one for each sample.

    Args:
        model: A hooked language model.
        prompts: The prompts, in symbols.
        options: The probes, their spans, the temperature and the sharing.
        tokens: Maximum length; a text also stops at the model's end tokens, and where the context
            window is full.
        cut: Returns the text to keep once a text has ended, and None until then.
        samples: Texts for each prompt.
        seed: Seeds the draws.
        quiet: Draw no progress bar.

    Note:
        Costs one pass over the prompts, and a forward pass over one token of each unfinished text
        for every further token. Keys and values of a group of prompts are kept, in the memory that
        `read` allows for a trunk.
    """
    places = [(0,) if span in ANSWER_SPANS else () for span in options.spans]
    (answer_mark,) = mark((0,), places)
    ends, window, more = end_tokens(model), int(model.cfg.n_ctx), tokens * samples
    found: dict[TokenIds, list[Draft]] = {}
    with bar(total=len(set(prompts)), unit="prompts", label="answers", quiet=quiet) as progress:
        for group in groups(model, prompts, more=more):
            growing = Growing(model, group, options, more=more)
            for sample in range(samples):
                drafts = [Draft(prompt, len(prompt)) for prompt in group]
                for _ in range(tokens):
                    live = [draft for draft in drafts if not draft.done]
                    if not live:
                        break
                    readings = growing.read([x.prefix for x in live], draw=(seed, sample))
                    for draft in live:
                        reading = readings[draft.prefix]
                        token = reading.top_token
                        if token in ends:
                            draft.done = True
                            continue
                        draft.prefix = (*draft.prefix, token | answer_mark)
                        draft.logprobs.append(reading.top_logprob)
                        draft.done = len(draft.prefix) > window
                        draft.text = model.tokenizer.decode(draft.tokens, skip_special_tokens=True)
                        if (kept := cut(draft.text)) is not None:
                            draft.text, draft.done = kept, True
                for prompt, draft in zip(group, drafts, strict=True):
                    found.setdefault(prompt, []).append(draft)
            progress.update(len(group))
    return [found[prompt] for prompt in prompts]
