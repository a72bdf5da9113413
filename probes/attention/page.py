"""A page to look at one fact's shift: where its heads look, and which tokens wrote what.

Top: the hijacked prompt, each token coloured by what all heads together took from it. Then the
attention patterns of the heads that wrote most of the shift, up or down, with their parts in their
names, and, folded, those of every layer. The page opens in any browser with no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens import views
from hijacklens.errors import InputError
from hijacklens.hooked import HookedLanguageModel, device_of
from hijacklens.layout import Layout, mark
from hijacklens.probe import HookProbe, Probe, check_probes, logits_at, spans_of
from hijacklens.tokens import LocatedPrompt, locate
from probes.logit_shift.result import ShiftAccount


def save_attention_page(
    model: HookedLanguageModel,
    account: ShiftAccount,
    path: str | Path,
    *,
    probes: Sequence[Probe] = (),
    top: int = 12,
) -> None:
    """Write the page of a traced fact.

    Args:
        model: The model that the fact was traced in.
        account: The account, made by `logit_shift.trace`.
        path: The HTML file.
        probes: The probes that the account was made with.
        top: How many heads are shown first.

    Raises:
        InputError: The probes are not those of the account, or `top` is below 1.

    Note:
        One forward pass; the file holds 1.3 MB of script and a number for every head and pair of
        tokens.
    """
    pointed = check_probes(probes)
    if [probe.key for probe in pointed] != list(account.settings["probes"]):
        raise InputError(
            f"the account was made with the probes {account.settings['probes']}; give the same."
        )
    if top < 1:
        raise InputError(f"top counts heads and cannot be {top}; give 1 or more.")
    prompt = account.prompt
    located = locate(model.tokenizer, prompt)
    patterns = _patterns(model, located, pointed).numpy()
    tokens = [
        located.text[start:end].strip() or model.tokenizer.convert_ids_to_tokens(token)
        for token, (start, end) in zip(located.ids, located.offsets, strict=True)
    ]
    table = account.table
    parts = table[table["kind"].isin(["attention", "value_bias"])]
    by_head = parts.groupby(["layer", "head"])["shift"].sum()
    first = by_head.abs().sort_values(ascending=False, kind="stable").index[:top]
    by_token = table[table["kind"] == "attention"].groupby("position")["shift"].sum()
    fact = account.settings["fact"]
    shown = [
        views.coloured_tokens(
            f"What the heads took from each token, hijacked minus bare (logits towards "
            f"{fact['target_false']!r}; hover for the number)",
            tokens,
            [float(by_token.get(i, 0.0)) for i in range(len(tokens))],
        ),
        views.attention_heads(
            "Attention of the heads that wrote most of the shift",
            tokens,
            patterns[[layer for layer, _ in first], [head for _, head in first]],
            [f"L{layer} H{head}: {by_head[layer, head]:+.2f}" for layer, head in first],
        ),
    ]
    for layer, heads in enumerate(patterns):
        names = [f"H{i}: {by_head[layer, i]:+.2f}" for i in range(len(heads))]
        shown.append(views.attention_heads(f"Layer {layer}", tokens, heads, names, folded=True))
    views.save_page(
        shown,
        Path(path),
        title=(
            f"{account.settings['model']['name']}: {fact['target_false']!r} against "
            f"{fact['target_true']!r}, {account.settings['scheme']}, dose "
            f"{account.settings['dose']}"
        ),
        note=(
            f"“{prompt.text}” moves logit o_ - logit o* from {account.bare:+.2f} to "
            f"{account.hijacked:+.2f}: a shift of {account.shift:+.2f}. Numbers beside heads are "
            "their parts of it, in logits. Rows attend to columns."
        ),
    )


def _patterns(
    model: HookedLanguageModel, prompt: LocatedPrompt, probes: Sequence[Probe]
) -> Float[Tensor, "layer head query key"]:
    """The attention of every head in the prompt, in float32."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, pattern: Tensor, hook: Any) -> None:
        found[layer] = pattern[0].float().cpu()

    layers = range(int(model.cfg.n_layers))
    hooks = [(f"blocks.{i}.attn.hook_pattern", partial(keep, i)) for i in layers]
    spans = spans_of(probes)
    symbols = mark(prompt.ids, [prompt.positions(span) for span in spans])
    layout = Layout.of_symbols(torch.tensor([symbols], device=device_of(model)), spans)
    zero = torch.zeros(1, dtype=torch.long, device=layout.tokens.device)
    logits_at(model, layout, zero, zero, probes=[*probes, HookProbe("page", hooks, packs=True)])
    return torch.stack([found[i] for i in layers])
