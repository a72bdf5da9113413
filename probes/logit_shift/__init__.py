"""The logit shift as a sum of parts: which tokens, layers, heads and MLPs wrote it.

    shift = (logit o_ - logit o*) hijacked  -  (logit o_ - logit o*) on the bare query

`probes.account` writes both differences as sums of parts, and parts that correspond are subtracted:
attended token by attended token, layer and query head; MLPs and biases by layer. The parts sum to
the shift up to `residual` (contract 4: at most 1e-4 of the shift in float32). The paper reads
tokens of the context as cues that attention adds up and value matrices look up (section 1). The
account shows in which heads this happens, and how much of the shift attention does not write.

    pairs = hl.pairs(model, facts, scheme="do-not-think", dose=1)
    account = logit_shift.trace(model, pairs[0])
    account.shift, account.residual                # in logits
    account.plot(by=("token", "layer"))
    mean = logit_shift.average(model, pairs)
    mean.by_head                                   # [fact, layer, head]

Cost: one forward pass over the bare and the hijacked prompts, about 1.5 times the cost of scoring.
Only direct writing is counted: the effect of a head through later layers appears in those layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError, one_of_type
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.models.identity import identify
from hijacklens.probe import Probe, check_probes, spans_of
from hijacklens.progress import bar
from hijacklens.prompts.correspondence import SPANS
from hijacklens.results.result import Provenance
from hijacklens.scoring.items import Item
from hijacklens.scoring.pairs import Pair, Pairs, only, takes_facts
from hijacklens.scoring.result import PairSettings
from probes.account import PARTS, Account, Question, accounts
from probes.logit_shift.average import AverageShift
from probes.logit_shift.result import ShiftAccount, TraceSettings, parts_table

UNBALANCED = 1e-2
"""A residual above this fraction of the difference is not rounding, not even in half precision."""
BLOCK = 64
"""How many pairs `average` accounts for at a time, which bounds the memory."""


@takes_facts
def trace(
    model: HookedLanguageModel, pairs: Pair | Pairs, *, probes: Sequence[Probe] = ()
) -> ShiftAccount:
    """Account for the shift of one fact, given one pair of `pairs = hl.pairs(model, facts)`.

    Probes act on both runs, in their order; those of values or attention patterns keep the account
    balanced. `shift` and `residual` are in logits, `to_dataframe()` has a row per part.

    Raises:
        InputError: Several pairs, a fact without a pair, two targets that start with the same
            token, or a probe that acts after the parts are counted (on head outputs or later), so
            that they would not sum to the shift.
    """
    pair, active = only(pairs, operation="trace"), check_probes(probes)
    ((bare, hijacked),) = _both(model, [pair], active)
    return ShiftAccount(
        table=parts_table(pair.units, bare, hijacked),
        bare=bare.whole,
        hijacked=hijacked.whole,
        settings=TraceSettings(
            model=identify(model),
            fact=pair.fact,
            scheme=pair.scheme.record(),
            dose=pair.dose,
            prompt=pair.items[1].prompt,
            probes=tuple(probe.key for probe in active),
            seed=pair.seed,
        ),
        provenance=Provenance.now(seed=pair.seed),
    )


@takes_facts
def average(
    model: HookedLanguageModel,
    pairs: Pairs,
    *,
    probes: Sequence[Probe] = (),
    batch_tokens: int | None = None,
    quiet: bool = False,
) -> AverageShift:
    """Account for the shifts of many facts, aligned by span, and average them.

    Args:
        model: A hooked language model.
        pairs: The pairs of `hl.pairs(model, facts)`.
        probes: As for `trace`.
        batch_tokens: Size of a batch in tokens; by default what suits the device.
        quiet: Draw no progress bar.

    Returns:
        Averages with intervals, the parts of every fact by span, layer and head, and
        the facts without a pair with the reason.

    Raises:
        InputError: There is no pair, or a probe under which the parts do not sum to the shift.
    """
    one_of_type("pairs", pairs, Pairs, "hl.pairs(model, facts); trace(...) takes one pair")
    pairs.require("accounted for")
    active = check_probes(probes)
    # Prompts of similar length run together, with little padding.
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].hijacked.ids))
    rows: dict[int, dict[str, Any]] = {}
    with bar(total=len(pairs), unit="facts", label=pairs.model, quiet=quiet) as progress:
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            both = _both(model, [pairs[i] for i in block], active, batch_tokens)
            rows |= {i: _by_span(pairs[i], *sides) for i, sides in zip(block, both, strict=True)}
            progress.update(len(block))
    in_order = [rows[i] for i in range(len(pairs))]
    return AverageShift(
        **{name: np.stack([row.pop(name) for row in in_order]) for name in PARTS},
        facts=pd.DataFrame(in_order),
        skipped=pairs.skipped.drop(columns=["model", "scheme"]),
        settings=PairSettings(
            model=identify(model),
            facts=pairs.facts.record(),
            scheme=pairs.scheme.record(),
            dose=pairs.dose,
            probes=tuple(probe.key for probe in active),
            seed=pairs.seed,
        ),
        provenance=Provenance.now(seed=pairs.seed),
    )


@takes_facts
def head_attribution(
    model: HookedLanguageModel, pairs: Pairs, *, quiet: bool = False
) -> Float[Tensor, "fact layer head"]:
    """Return `average(...).by_head` as a tensor: a fast first pass of a search for heads.

    Raises:
        InputError: As `average`, or a fact has no pair; leave such facts out first.
    """
    one_of_type("pairs", pairs, Pairs, "hl.pairs(model, facts)")
    reasons = dict(zip(pairs.skipped["case_id"], pairs.skipped["reason"], strict=True))
    for case in {fact.case_id for fact in pairs.facts} & reasons.keys():
        raise InputError(
            f"case {case} cannot be attributed: {reasons[case]}. Leave it out "
            "(facts.where(case_ids=...)); `skipped` of the pairs lists all such facts."
        )
    return torch.from_numpy(average(model, pairs, quiet=quiet).by_head)


def _both(
    model: HookedLanguageModel,
    pairs: Sequence[Pair],
    probes: Sequence[Probe],
    batch_tokens: int | None = None,
) -> list[tuple[Account, Account]]:
    """Account for the bare and the hijacked prompt of each pair."""
    spans = spans_of(probes)
    questions = [_question(item) for pair in pairs for item in pair.marked(spans)]
    differences = accounts(model, questions, probes=probes, spans=spans, batch_tokens=batch_tokens)
    for account in differences:
        if abs(account.residual) > UNBALANCED * max(1.0, abs(account.whole)):
            missed = f"miss {account.residual:+.3g} of {account.whole:+.3g} logits"
            if not probes:
                raise InputError(
                    f"the parts of the account of {model.cfg.model_name!r} {missed}: it computes "
                    "something between its layers and its logits that no hook shows. Ablate heads "
                    "(probes.ablation) or patch activations (probes.patching) instead."
                )
            raise InputError(
                f"under {', '.join(probe.key for probe in probes)} the parts of the account "
                f"{missed}: the probe changes the output of heads or layers after the account has "
                "read it. Account for probes of values or attention patterns, and use "
                "hijacklens.hijack(..., probes=[...]) for the others."
            )
    return list(zip(differences[::2], differences[1::2], strict=True))


def _question(item: Item) -> Question:
    """Return the question at the position where both targets start."""
    (before, true), (_, false) = item.true[0], item.false[0]
    return Question(item.ids, len(before) - 1, plus=false, minus=true)


def _by_span(pair: Pair, bare: Account, hijacked: Account) -> dict[str, Any]:
    """Return a fact's row of `AverageShift`: its totals, and its parts summed by span."""
    by_span = []
    for account, side in ((bare, "bare"), (hijacked, "hijacked")):
        member = np.zeros((account.attention.shape[-1], len(SPANS)))
        for unit in pair.units:
            member[list(getattr(unit, side)), SPANS.index(unit.span)] = 1
        by_span.append(np.einsum("lhp,ps->slh", account.attention, member))
    fact = pair.fact
    return {
        "case_id": fact.case_id,
        "relation_id": fact.relation_id,
        "subject": fact.subject,
        "bare": bare.whole,
        "hijacked": hijacked.whole,
        "shift": hijacked.whole - bare.whole,
        "residual": hijacked.residual - bare.residual,
        "attention": by_span[1] - by_span[0],
        **{name: getattr(hijacked, name) - getattr(bare, name) for name in PARTS[1:]},
    }
