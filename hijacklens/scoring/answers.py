"""A model's answer to a text: likeliest next tokens and greedy continuation (paper, Figure 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hijacklens.engine.forward import Pass
from hijacklens.errors import InputError, choice, several, strict, utf8, whole_number
from hijacklens.facts.chat import Chat
from hijacklens.facts.joining import JOININGS, Joining
from hijacklens.models.hooked import HookedLanguageModel, require_text, vocabulary_of
from hijacklens.probe import Probe, check_probes, spans_of
from hijacklens.prompts.chat import in_chat
from hijacklens.prompts.prompt import Prompt, compose
from hijacklens.prompts.tokens import (
    Continuation,
    TokenIds,
    continuation,
    encode,
    locate,
    require_known,
)
from hijacklens.scoring.continuing import Generation, write
from hijacklens.scoring.items import steps_in_context


@dataclass(frozen=True, slots=True)
class Candidate:
    """A next token, its log-probability in nats, and its rank (0 is the likeliest)."""

    token: str
    logprob: float
    rank: int

    @property
    def probability(self) -> float:
        """Between 0 and 1."""
        return math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says after one text."""

    text: str
    completion: str
    """Greedy continuation, without special tokens."""
    top: tuple[Candidate, ...]
    """The likeliest next tokens."""
    targets: tuple[Candidate, ...]
    """The first token of each target, in the order of the targets."""


@strict
def answer(
    model: HookedLanguageModel,
    text: str | Prompt,
    *,
    targets: Sequence[str] = (),
    top: int = 5,
    tokens: int = 12,
    probes: Sequence[Probe] = (),
    joining: Joining = "auto",
    chat: Chat | None = None,
) -> Answer:
    """Ask a model to continue a text.

    Args:
        model: A hooked language model.
        text: The prompt as the model reads it; a space at its end counts. For probes, a text is one
            `query`; a `Prompt` (`hijacklens.prompts.prompt.compose`) has spans.
        targets: Words whose first token is looked up, read in context.
        top: How many of the likeliest next tokens to return.
        tokens: Length of the greedy continuation, in tokens; it stops early at an end token.
        probes: Act on every forward pass, in their order. Tokens of the continuation belong to
            the spans `query`, `last` and `target`, like those of a target when it is scored.
        joining: How targets join a text (`hijacklens.facts.joining`); a `Prompt` says so itself.
        chat: Ask in the chat template of the model's tokenizer; the text is the query.

    Raises:
        InputError: The text is empty, leaves no room in the context window, two targets are equal,
            or a count is negative.

    Note:
        Costs a forward pass over the prompt, twice, and one over each token of the continuation.
    """
    top, tokens = whole_number("top", top), whole_number("tokens", tokens)
    written = text.text if isinstance(text, Prompt) else text
    utf8("the prompt", written, "'The capital of France is'")
    targets = several("targets", targets, "['Paris', 'Guam']")
    for target in targets:
        if not utf8("a target", target, "'Paris'").strip():
            raise InputError("a target is empty; give a word.")
    if len({target.strip() for target in targets}) < len(targets):
        raise InputError(f"the targets {', '.join(map(repr, targets))} are not all different.")
    require_text(model, operation="asking")
    choice("joining", joining, JOININGS)
    prompt = compose(text, joining=joining) if isinstance(text, str) else text
    tokenizer = model.tokenizer
    prompt = in_chat(prompt, chat, tokenizer)
    text = prompt.text
    ids, *followed = encode(
        tokenizer, [text, *map(prompt.followed_by, targets)], templated=prompt.templated
    )
    for ids_of_text in (ids, *followed):
        require_known(ids_of_text, vocabulary_of(model))
    if len(ids) + tokens > model.cfg.n_ctx:
        raise InputError(
            f"the prompt has {len(ids)} tokens and the continuation {tokens}, together more than "
            f"the model's context window of {model.cfg.n_ctx}. Shorten one of them."
        )
    probes = check_probes(probes)
    spans = spans_of(probes)
    run = Pass.of(model, probes, spans, operation="asking")
    located = locate(tokenizer, prompt) if spans else None

    def logprobs_after(context: TokenIds) -> Tensor:
        # The last step of a target that is a placeholder is read after the context.
        *_, (prefix, _) = steps_in_context(Continuation(context, (0,)), located, spans)
        return run.after(prefix)

    def candidate(token: int, logprobs: Tensor) -> Candidate:
        rank = int((logprobs > logprobs[token]).sum())
        return Candidate(tokenizer.decode([token]), float(logprobs[token]), rank)

    next_logprobs = logprobs_after(ids)
    candidates = []
    for prompt_and_target in followed:
        # Rarely the prompt's last token merges with the target, which is then read before it.
        side = continuation(ids, prompt_and_target)
        logprobs = next_logprobs if side.context == ids else logprobs_after(side.context)
        candidates.append(candidate(side.target[0], logprobs))
    completion = ""
    if tokens:
        how = Generation(tokens=tokens, sentence=False)
        ((completion,),) = write(model, [prompt], how, probes=probes)
    return Answer(
        text=text,
        completion=completion,
        top=tuple(
            candidate(int(token), next_logprobs) for token in next_logprobs.topk(top).indices
        ),
        targets=tuple(candidates),
    )
