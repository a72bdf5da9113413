"""An HTML page of one fact's shift: where heads attend, and which tokens wrote what.

The page starts with the hijacked prompt. The colour of a token is the sum of what all heads took
from it. Below are the attention patterns of the heads with the largest parts, and last, folded,
the patterns of every layer. The page opens in any browser without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

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
    """Write the HTML page of an account by `logit_shift.trace`, with the `top` heads first.

    The model and the probes are those that the account was made with. Costs one forward pass, or
    none if the account has its patterns. The file holds 1.3 MB of script and a number for every
    head and pair of tokens.

    Raises:
        InputError: The probes are not those of the account, or `top` is below 1.
    """
    if account.patterns is None:
        account = with_patterns(model, account, probes=probes)
    fact, settings, by_head = account.settings.fact, account.settings, account.by_head
    layers = [
        views.attention_heads(
            f"Layer {layer}",
            account.tokens,
            heads,
            [f"H{i}: {by_head[layer, i]:+.2f}" for i in range(len(heads))],
            folded=True,
        )
        for layer, heads in enumerate(() if account.patterns is None else account.patterns)
        if not np.isnan(heads).all()  # hybrids have layers without attention
    ]
    views.save_page(
        [*account.attention_views(top=top), *layers],
        Path(path),
        title=(
            f"{settings.title}: {fact.target_false!r} against "
            f"{fact.target_true!r}, {settings.scheme.name}, dose {settings.dose}"
        ),
        note=(
            f"“{settings.prompt.text}” moves logit o_ - logit o* from {account.bare:+.2f} to "
            f"{account.hijacked:+.2f}: a shift of {account.shift:+.2f}. Numbers next to heads are "
            "their parts of it, in logits. Rows attend to columns; attention to the first token is "
            "mostly a sink and does not read it."
        ),
    )


def with_patterns(
    model: HookedLanguageModel, account: ShiftAccount, *, probes: Sequence[Probe] = ()
) -> ShiftAccount:
    """Return the account with the attention patterns of its hijacked prompt, to be saved with it.

    The arguments are those of `save_attention_page`. Costs one forward pass.

    Raises:
        InputError: The probes are not those of the account.
    """
    active = check_probes(probes)
    if [probe.key for probe in active] != list(account.settings.probes):
        raise InputError(
            f"the account was made with the probes {list(account.settings.probes)}; give the same."
        )
    run = views.run(model, account.settings.prompt, probes=active)
    return replace(account, tokens=run.tokens, patterns=run.patterns)
