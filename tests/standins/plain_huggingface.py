"""What our scores are compared with: plain Hugging Face forward passes of single sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PlainScorer:
    """Scores targets with a plain model, one sequence in one forward pass, nothing batched."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.last: tuple[list[int], Tensor] | None = None

    def logits(self, ids: list[int]) -> Tensor:
        """Logits of all positions; targets of one token are asked behind the same sequence."""
        if self.last is None or self.last[0] != ids:
            with torch.no_grad():
                self.last = (ids, self.model(torch.tensor([ids])).logits[0])
        return self.last[1]

    def scores(self, prompt: str, target: str) -> list[float]:
        """Log-probability of each token of a target, in nats, from a float64 softmax."""
        before = self.tokenizer(prompt).input_ids
        after = self.tokenizer(f"{prompt} {target}").input_ids
        n = 0
        while n < len(before) and before[n] == after[n]:
            n += 1
        logprobs = self.logits(after[:-1])[n - 1 :].double().log_softmax(-1)
        return [float(logprobs[i, token]) for i, token in enumerate(after[n:])]

    def top(self, prompt: str) -> tuple[str, float]:
        """The likeliest next token behind a prompt, and its log-probability."""
        last = self.logits(self.tokenizer(prompt).input_ids)[-1].double().log_softmax(-1)
        return self.tokenizer.decode([int(last.argmax())]), float(last.max())
