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
        logprobs = plain(torch.tensor([after])).logits[0].double().log_softmax(-1)
    return [float(logprobs[i - 1, after[i]]) for i in range(n, len(after))]
