"""A page to look at one fact's shift: where its heads look, and which tokens wrote what.

Top: the hijacked prompt, each token coloured by what all heads together took from it. Then the
attention patterns of the heads with the largest parts of the shift, from those that carry it to
those that work against it, and, folded, those of every layer. The page opens in any browser with no
network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from hijacklens import views
from hijacklens.errors import InputError
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.probe import Probe, check_probes
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
        One forward pass, none where the account has its patterns; the file holds 1.3 MB of script
        and a number for every head and pair of tokens.
    """
    if account.patterns is None:
        account = with_patterns(model, account, probes=probes)
    fact = account.settings["fact"]
    views.save_page(
        [*attention_views(account, top=top), *_layers(account)],
        Path(path),
        title=(
            f"{account.settings['model']['name']}: {fact['target_false']!r} against "
            f"{fact['target_true']!r}, {account.settings['scheme']}, dose "
            f"{account.settings['dose']}"
        ),
        note=(
            f"“{account.prompt.text}” moves logit o_ - logit o* from {account.bare:+.2f} to "
            f"{account.hijacked:+.2f}: a shift of {account.shift:+.2f}. Numbers beside heads are "
            "their parts of it, in logits. Rows attend to columns; attention that rests on the "
            "first token is mostly a sink, not a reading of it."
        ),
    )


def with_patterns(
    model: HookedLanguageModel, account: ShiftAccount, *, probes: Sequence[Probe] = ()
) -> ShiftAccount:
    """The account with the attention patterns of its hijacked prompt, which are saved with it.

    Args:
        model: The model that the fact was traced in.
        account: The account, made by `logit_shift.trace`.
        probes: The probes that the account was made with.

    Raises:
        InputError: The probes are not those of the account.

    Note:
        One forward pass.
    """
    pointed = check_probes(probes)
    if [probe.key for probe in pointed] != list(account.settings["probes"]):
        raise InputError(
            f"the account was made with the probes {account.settings['probes']}; give the same."
        )
    run = views.run(model, account.prompt, probes=pointed)
    return replace(account, tokens=run.tokens, patterns=run.patterns)


def attention_views(account: ShiftAccount, *, top: int = 12) -> list[views.View]:
    """The tokens, coloured by what the heads took from them, and the heads with the largest parts.

    Args:
        account: An account that has its patterns.
        top: How many heads.

    Raises:
        InputError: The account has no patterns, or `top` is below 1.
    """
    if top < 1:
        raise InputError(f"top counts heads and cannot be {top}; give 1 or more.")
    if account.patterns is None:
        raise InputError("the account has no attention patterns; see with_patterns(...).")
    patterns, tokens = account.patterns, account.tokens
    table = account.table
    by_head = _by_head(account)
    largest = by_head.abs().sort_values(ascending=False, kind="stable").index[:top]
    # Those that carry the hijack before those that work against it.
    first = sorted(largest, key=lambda head: -by_head[head])
    by_token = table[table["kind"] == "attention"].groupby("position")["shift"].sum()
    fact = account.settings["fact"]
    return [
        views.coloured_tokens(
            f"What the heads took from each token, hijacked minus bare (logits towards "
            f"{fact['target_false']!r}; hover for the number)",
            tokens,
            [float(by_token.get(i, 0.0)) for i in range(len(tokens))],
        ),
        views.attention_heads(
            f"Attention of the heads with the largest parts, from + (towards "
            f"{fact['target_false']!r}) to -",
            tokens,
            patterns[[layer for layer, _ in first], [head for _, head in first]],
            [f"L{layer} H{head}: {by_head[layer, head]:+.2f}" for layer, head in first],
        ),
    ]


def _layers(account: ShiftAccount) -> list[views.View]:
    """The attention of all heads, a folded view for each layer."""
    by_head, found = _by_head(account), []
    for layer, heads in enumerate(() if account.patterns is None else account.patterns):
        names = [f"H{i}: {by_head[layer, i]:+.2f}" for i in range(len(heads))]
        view = views.attention_heads(f"Layer {layer}", account.tokens, heads, names, folded=True)
        found.append(view)
    return found


def _by_head(account: ShiftAccount) -> pd.Series:
    parts: Any = account.table[account.table["kind"].isin(["attention", "value_bias"])]
    return parts.groupby(["layer", "head"])["shift"].sum()
