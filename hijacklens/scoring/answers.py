"""What a model says next: its likeliest tokens and its greedy continuation (paper, Figure 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hijacklens.errors import InputError
from hijacklens.hooked import HookedLanguageModel
from hijacklens.scoring.engine import next_token_logprobs
from hijacklens.tokens import continuation, encode


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
    """What a model says behind one text."""

    text: str
    completion: str
    """Greedy continuation, special tokens left out."""
    top: tuple[Candidate, ...]
    """The likeliest next tokens."""
    targets: tuple[Candidate, ...]
    """The first token of each target that was asked about, in their order."""


def answer(
    model: HookedLanguageModel,
    text: str,
    *,
    targets: Sequence[str] = (),
    top: int = 5,
    tokens: int = 12,
) -> Answer:
    """Ask a model to continue a text.

    Args:
        model: A hooked language model.
        text: The prompt; spaces behind it are dropped, since the next token brings its own.
        targets: Words whose first token is looked up, read in context.
        top: How many of the likeliest next tokens to give.
        tokens: Length of the greedy continuation, in tokens; it ends early at an end token.

    Raises:
        InputError: The text is empty, leaves no room in the context window, or a count is
            negative.

    Note:
        Costs one forward pass per token of the continuation, plus one.
    """
    if top < 0 or tokens < 0:
        raise InputError(f"top and tokens are counts; given {top} and {tokens}.")
    if not text.strip():
        raise InputError("the prompt is empty; give the beginning of a sentence.")
    text = text.rstrip()
    tokenizer = model.tokenizer
    (ids,) = encode(tokenizer, [text])
    if len(ids) + tokens > model.cfg.n_ctx:
        raise InputError(
            f"the prompt has {len(ids)} tokens and {tokens} shall follow, more than the model's "
            f"context window of {model.cfg.n_ctx}. Shorten one of them."
        )
    if any(not target.strip() for target in targets):
        raise InputError("a target is empty; give a word.")
    logprobs = next_token_logprobs(model, ids)

    def candidate(token: int, behind: Tensor) -> Candidate:
        rank = int((behind > behind[token]).sum())
        return Candidate(tokenizer.decode([token]), float(behind[token]), rank)

    whole = encode(tokenizer, [f"{text} {target.strip()}" for target in targets])
    firsts = []
    for both in whole:
        # Rarely the prompt's last token merges with the target, which is then read before it.
        side = continuation(ids, both)
        here = logprobs if side.context == ids else next_token_logprobs(model, side.context)
        firsts.append(candidate(side.target[0], here))
    said, ends = list(ids), {tokenizer.eos_token_id}
    for _ in range(tokens):
        token = int(next_token_logprobs(model, tuple(said)).argmax())
        said.append(token)
        if token in ends:
            break
    return Answer(
        text=text,
        completion=tokenizer.decode(said[len(ids) :], skip_special_tokens=True),
        top=tuple(candidate(int(token), logprobs) for token in logprobs.topk(top).indices),
        targets=tuple(firsts),
    )
