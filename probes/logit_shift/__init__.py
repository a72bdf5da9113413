"""The logit shift, taken apart: which tokens, layers, heads and MLPs wrote it.

    shift = (logit o_ - logit o*) hijacked  -  (logit o_ - logit o*) on the bare query

Both differences are accounted for part by part (`probes.account`), and the parts of the two are
subtracted where they correspond (`probes.inputs.alignment`): source token by source token, by layer
and query head; MLPs and biases by layer. The parts sum to the shift, and `residual` is what they
miss (contract 4: at most 1e-4 of it in float32). The paper reads tokens of the context as cues that
attention adds up and value matrices look up (section 1); the account says in which heads, and how
much of the shift does not come straight from attention at all.

    account = logit_shift.trace(model, facts[0], scheme="do-not-think", dose=1)
    account.shift, account.residual                # in logits
    account.plot(by=("token", "layer"))
    mean = logit_shift.average(model, facts, scheme="do-not-think", dose=1)
    mean.by_head                                   # [fact, layer, head]

Cost: one forward pass over the bare and the hijacked prompts, about 1.5 times that of scoring
them. It is an account of direct writing: a head that acts through later layers shows there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hijacklens.errors import InputError, one_of_type, whole_number
from hijacklens.facts.fact import Fact, FactSet
from hijacklens.models.hooked import HookedLanguageModel, require_text
from hijacklens.models.identity import identify
from hijacklens.probe import Probe, check_probes, spans_of
from hijacklens.progress import bar
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.prompts.tokens import locate
from hijacklens.results.provenance import Provenance
from hijacklens.scoring.items import Item, Unscored, make_items, make_prompts, skipped_table
from probes.account import Account, Question, accounts
from probes.inputs.alignment import SPANS, Unit, align
from probes.logit_shift.average import AverageShift
from probes.logit_shift.result import ShiftAccount, parts_table

UNBALANCED = 1e-2
"""A residual of this share of the difference is no rounding, in half precision either."""
BLOCK = 64
"""Facts accounted for at a time by `average`, which bounds the memory."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A fact's bare and hijacked prompt, with the tokens that correspond."""

    fact: Fact
    bare: Item
    hijacked: Item
    units: tuple[Unit, ...]


def trace(
    model: HookedLanguageModel,
    fact: Fact,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    probes: Sequence[Probe] = (),
    seed: int = 0,
) -> ShiftAccount:
    """The account of the shift of one fact.

    Args:
        model: A hooked language model.
        fact: The fact.
        scheme: The scheme that makes the hijacking sentence, or its name.
        dose: How many sentences stand before the query; at least 1.
        probes: Act on both runs, in their order; those that change values or patterns balance.
        seed: Seeds what a scheme draws.

    Returns:
        The account; `shift` and `residual` in logits, `to_dataframe()` a row per part.

    Raises:
        InputError: An unknown scheme, a dose below 1, a fact that the scheme, the tokenizer or
            the model's context window cannot serve, or a probe that acts after the parts are
            counted (on head outputs or later), under which they would not sum.
    """
    if not isinstance(fact, Fact):
        raise InputError(f"trace takes one fact, not a {type(fact).__name__}; see average(...).")
    rule = get_scheme(scheme)
    facts = FactSet((fact,), name=f"case {fact.case_id}")
    pairs, unscored = _pairs(model, facts, rule, dose, check_probes(probes), seed)
    if unscored:
        raise InputError(f"case {fact.case_id} cannot be traced: {unscored[0].reason}.")
    (pair,) = pairs
    bare, hijacked = _both(model, pairs, probes)[0]
    prompt = pair.hijacked.prompt
    return ShiftAccount(
        table=parts_table(pair.units, bare, hijacked),
        bare=bare.whole,
        hijacked=hijacked.whole,
        settings={
            "model": asdict(identify(model)),
            "fact": asdict(fact),
            "scheme": rule.name,
            "dose": dose,
            "prompt": {
                "text": prompt.text,
                "scheme": prompt.scheme,
                "dose": prompt.dose,
                "spans": {
                    name: [list(ends) for ends in held] for name, held in prompt.spans.items()
                },
            },
            "probes": [probe.key for probe in probes],
            "seed": seed,
        },
        provenance=Provenance.now(seed=seed),
    )


def average(
    model: HookedLanguageModel,
    facts: FactSet,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    probes: Sequence[Probe] = (),
    seed: int = 0,
    batch_tokens: int | None = None,
    quiet: bool = False,
) -> AverageShift:
    """The accounts of many facts, aligned by span, and their averages.

    Args:
        model: A hooked language model.
        facts: The facts.
        scheme: The scheme that makes the hijacking sentences, or its name.
        dose: How many sentences stand before the query; at least 1.
        probes: Act on all runs, in their order; those that change values or patterns balance.
        seed: Seeds what a scheme draws, and the resamples of the intervals.
        batch_tokens: Size of a batch in tokens; by default what suits the device.
        quiet: Draw no progress bar.

    Returns:
        Averages with intervals over facts, the parts of every fact by span, layer and head, and
        the facts that could not be used with the reason.

    Raises:
        InputError: An unknown scheme, a dose below 1, no facts, none that could be used, or a
            probe under which the parts do not sum.
    """
    if not isinstance(facts, FactSet):
        raise InputError(f"average takes a FactSet, not a {type(facts).__name__}; see trace(...).")
    rule, pointed = get_scheme(scheme), check_probes(probes)
    if len(facts) == 0:
        raise InputError(f"there are no facts to account for in {facts.name}.")
    pairs, unscored = _pairs(model, facts, rule, dose, pointed, seed)
    if not pairs:
        raise InputError(
            f"none of the {len(facts)} facts could be accounted for; the first reason: "
            f"{unscored[0].reason}."
        )
    identity = identify(model)
    # Prompts of like length run together, with little padding.
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].hijacked.ids))
    rows: dict[int, dict[str, Any]] = {}
    with bar(total=len(pairs), unit="facts", label=identity.name, quiet=quiet) as progress:
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            chosen = [pairs[i] for i in block]
            found = _both(model, chosen, pointed, batch_tokens)
            rows |= {i: _by_span(pairs[i], *both) for i, both in zip(block, found, strict=True)}
            progress.update(len(block))
    kept = [rows[i] for i in range(len(pairs))]
    totals = [
        {name: row[name] for name in ("bare", "hijacked", "shift", "residual")} for row in kept
    ]
    keys = [
        {"case_id": p.fact.case_id, "relation_id": p.fact.relation_id, "subject": p.fact.subject}
        for p in pairs
    ]
    return AverageShift(
        attention=np.stack([row["attention"] for row in kept]),
        value_bias=np.stack([row["value_bias"] for row in kept]),
        output_bias=np.stack([row["output_bias"] for row in kept]),
        mlp=np.stack([row["mlp"] for row in kept]),
        single=np.stack([row["single"] for row in kept]),
        facts=pd.DataFrame([key | total for key, total in zip(keys, totals, strict=True)]),
        skipped=_skipped(facts, unscored),
        settings={
            "model": asdict(identity),
            "facts": {"name": facts.name, "n": len(facts), "hash": facts.content_hash()},
            "scheme": rule.name,
            "dose": dose,
            "probes": [probe.key for probe in pointed],
            "seed": seed,
        },
        provenance=Provenance.now(seed=seed),
    )


def head_attribution(
    model: HookedLanguageModel,
    facts: FactSet,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    seed: int = 0,
    quiet: bool = False,
) -> Float[Tensor, "fact layer head"]:
    """What each head wrote directly to the shift of each fact, in logits.

    The fast first pass of a search for heads: `average(...).by_head` as a tensor, with a row for
    every fact in order.

    Raises:
        InputError: As `average`, or a fact could not be used; leave such facts out first.
    """
    found = average(model, facts, scheme=scheme, dose=dose, seed=seed, quiet=quiet)
    used = set(found.facts["case_id"])
    for fact in facts:
        if fact.case_id not in used:
            reasons = found.skipped.set_index("case_id")["reason"]
            raise InputError(
                f"case {fact.case_id} cannot be attributed: {reasons[fact.case_id]}. Leave it out "
                "(facts.where(case_ids=...)); average(...).skipped lists all such facts."
            )
    return torch.from_numpy(found.by_head)


def _pairs(
    model: HookedLanguageModel,
    facts: FactSet,
    scheme: Scheme,
    dose: int,
    probes: Sequence[Probe],
    seed: int,
) -> tuple[list[Pair], list[Unscored]]:
    """Both prompts of every fact that has them, and the facts that have not."""
    require_text(model, operation="the account of a logit shift")
    one_of_type("facts", facts, FactSet, "hl.atlas()")
    dose = whole_number("a shift is between dose 0 and a dose from 1 on; the dose", dose, least=1)
    prompts, unscored = make_prompts(facts, scheme, [0, dose], seed=seed)
    items, too_long = make_items(
        prompts,
        model.tokenizer,
        context_length=int(model.cfg.n_ctx),
        spans=spans_of(probes),
    )
    sides: dict[int, dict[bool, Item]] = {}
    for item in items:
        sides.setdefault(item.fact.case_id, {})[item.prompt.dose > 0] = item
    pairs = []
    for both in sides.values():
        bare, hijacked = both[False], both[True]
        first, second = (locate(model.tokenizer, item.prompt) for item in (bare, hijacked))
        units = align(first, second, model.tokenizer)
        pairs.append(Pair(bare.fact, bare, hijacked, units))
    return pairs, [*unscored, *too_long]


def _both(
    model: HookedLanguageModel,
    pairs: Sequence[Pair],
    probes: Sequence[Probe],
    batch_tokens: int | None = None,
) -> list[tuple[Account, Account]]:
    """The accounts of the bare and of the hijacked prompt of each pair."""
    asked = [_questions(item) for pair in pairs for item in (pair.bare, pair.hijacked)]
    flat = [question for questions in asked for question in questions]
    run = iter(
        accounts(model, flat, probes=probes, spans=spans_of(probes), batch_tokens=batch_tokens)
    )
    found = []
    for questions in asked:
        first, *other = [next(run) for _ in questions]
        found.append(first - other[0] if other else first)
        _require_balance(found[-1], probes)
    return list(zip(found[::2], found[1::2], strict=True))


def _require_balance(account: Account, probes: Sequence[Probe]) -> None:
    """Refuse an account that a probe has put out of balance: its parts would mislead."""
    if probes and abs(account.residual) > UNBALANCED * max(1.0, abs(account.whole)):
        raise InputError(
            f"under {', '.join(probe.key for probe in probes)} the parts of the account miss "
            f"{account.residual:+.3g} of {account.whole:+.3g} logits: the probe changes what heads "
            "or layers write after it was counted. Account for probes of values or attention "
            "patterns, and use hijacklens.hijack(..., probes=[...]) for the others."
        )


def _questions(item: Item) -> list[Question]:
    """One question where both targets are read at one place, else one for each.

    Rarely the last token of the prompt merges with the start of a target, which is then read
    before it. Logits of two places do not compare, so these two are log-probabilities.
    """
    (before_true, true), (before_false, false) = item.true[0], item.false[0]
    places = len(before_false) - 1, len(before_true) - 1
    if places[0] == places[1]:
        return [Question(item.ids, places[0], plus=false, minus=true)]
    return [
        Question(item.ids, places[0], plus=false, minus=None),
        Question(item.ids, places[1], plus=true, minus=None),
    ]


def _by_span(pair: Pair, bare: Account, hijacked: Account) -> dict[str, Any]:
    """The parts of the shift of one fact, source tokens summed by span."""
    sums = []
    for account, side in ((bare, "bare"), (hijacked, "hijacked")):
        place = np.zeros((account.attention.shape[-1], len(SPANS)))
        for unit in pair.units:
            place[list(getattr(unit, side)), SPANS.index(unit.span)] = 1
        sums.append(np.einsum("lhp,ps->slh", account.attention, place))
    return {
        "attention": sums[1] - sums[0],
        "value_bias": hijacked.value_bias - bare.value_bias,
        "output_bias": hijacked.output_bias - bare.output_bias,
        "mlp": hijacked.mlp - bare.mlp,
        "single": hijacked.single - bare.single,
        "bare": bare.whole,
        "hijacked": hijacked.whole,
        "shift": hijacked.whole - bare.whole,
        "residual": hijacked.residual - bare.residual,
    }


def _skipped(facts: FactSet, unscored: Sequence[Unscored]) -> pd.DataFrame:
    columns = ["case_id", "relation_id", "subject", "reason"]
    rows = [(row.case_id, row.relation_id, row.subject, row.reason) for row in facts.skipped]
    for row in unscored:
        fact = row.fact
        rows.append((fact.case_id, fact.relation_id, fact.subject, row.reason))
    return skipped_table(rows, columns)
