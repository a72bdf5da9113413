"""What our scores are compared with: plain Hugging Face forward passes of single sequences."""

from __future__ import annotations

import torch


def plain_scores(plain, tokenizer, prompt, target):
    """Log-probability of each token of a target: one plain forward pass of one sequence."""
    before = tokenizer(prompt).input_ids
    after = tokenizer(f"{prompt} {target}").input_ids
    n = 0
    while n < len(before) and before[n] == after[n]:
        n += 1
    with torch.no_grad():
        logits = plain(torch.tensor([after[:-1]])).logits[0, n - 1 :]
    logprobs = logits.double().log_softmax(-1)
    return [float(logprobs[i, token]) for i, token in enumerate(after[n:])]
