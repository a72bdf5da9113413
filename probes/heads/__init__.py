"""Heads that carry the hijack: found on some facts, tested on others.

    search_on, test_on = heads.halves(facts, by="relation", seed=0)
    search = heads.search(model, hl.pairs(model, search_on, scheme="do-not-think"), size=5)
    search.plot()                                       # attribution of all, exact effects
    test = search.test(test_on, schemes=["do-not-think", "relation"], random_sets=50)
    test.summary()                                      # efficacy, retention, shift; controls
    test.side_effects()                                 # the cost in bare recall

A head *carries* the part of the logit shift that vanishes when its output z is ablated at every
token, in logits. Attribution estimates this for all heads at once. The heads with the highest
attribution are then ablated one by one, which is exact, and a set is chosen among them. Query heads
are counted, even if several share a key/value head. The set is a hypothesis until `test`: among
hundreds of heads some look good by chance, and ablating any heads costs recall.

The paper has no head search. Attribution is computed by `probes.heads.gradients` or
`probes.logit_shift`, ablation by `probes.ablation`, and scores by `hijacklens.hijack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float

from hijacklens.errors import InputError, choice, one_of_type
from hijacklens.facts.fact import FactSet
from hijacklens.facts.halves import halves as halves
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.probe import Probe
from hijacklens.progress import bar
from hijacklens.renamed import renamed
from hijacklens.results.result import Provenance
from hijacklens.scoring import efficacy
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.pairs import SAME_FIRST_TOKEN, Pairs, takes_facts
from hijacklens.scoring.result import HijackResult
from hijacklens.sites import Layers, choose
from probes import logit_shift
from probes.ablation import Kind, ablate, mean_outputs
from probes.checks import check_searched, check_size
from probes.heads.gradients import gradient_attribution
from probes.heads.held_out import Head
from probes.heads.ranking import HeadSearch, SearchSettings

Attribution: TypeAlias = Literal["gradient", "direct"]
Strategy: TypeAlias = Literal["top", "greedy"]
GRADIENT_RUNS = 3
"""The cost of attribution on the progress bar, in runs over the facts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How heads are ranked, ablated and chosen.

    Raises:
        InputError: An unknown choice.
    """

    attribution: Attribution = "gradient"
    """`gradient` is attribution patching of the ablation, which includes the effect of a head
    through later layers; `direct` is what the head itself writes to the logits
    (`probes.logit_shift.average`)."""
    kind: Kind = "mean"
    """The replacement of an ablated head's output: its `mean` over all tokens of the bare queries,
    or `zero`."""
    strategy: Strategy = "top"
    """`top` takes the candidates with the largest exact effects. `greedy` adds one candidate after
    another, each time the one that increases the effect of the set most; this finds heads that
    substitute for each other, at `size` times the cost."""

    def __post_init__(self) -> None:
        choice("attribution", self.attribution, get_args(Attribution))
        choice("kind of ablation", self.kind, get_args(Kind))
        choice("strategy", self.strategy, get_args(Strategy))


@renamed(
    attribution="method.attribution",
    kind="method.kind",
    strategy="method.strategy",
    store="execution.store",
    batch_tokens="execution.batch_tokens",
)
@takes_facts
def search(
    model: HookedLanguageModel,
    pairs: Pairs,
    *,
    size: int = 5,
    candidates: int = 20,
    layers: Layers = None,
    method: Method = Method(),
    execution: Execution = Execution(),
    quiet: bool = False,
) -> HeadSearch:
    """Find the heads that carry the logit shift of a hijack.

    Args:
        model: A hooked language model.
        pairs: The prompt pairs to search on, as `hl.pairs(model, facts)` makes them; keep other
            facts for `HeadSearch.test` (`halves`).
        size: How many heads to choose.
        candidates: How many heads, those with the highest attribution, are ablated one by one.
        layers: The layers to search; all by default.
        method: How heads are ranked, ablated and chosen.
        execution: The engine, store, sharing and batch size of the scoring runs, as for
            `hijacklens.hijack`; the batch size also applies to the gradients.
        quiet: Draw no progress bar.

    Returns:
        The search; `to_dataframe()`, `growth`, `agreement`, `plot()`, and `test(...)`.

    Raises:
        InputError: A size above the number of candidates, a layer that the model does not have,
            or too few facts whose shift can be measured.

    Note:
        Costs an attribution (about three runs over the facts) and one run of
        `hijacklens.hijack` for every candidate and every head of the set; with `greedy` about
        `size * candidates` more.
    """
    one_of_type("pairs", pairs, Pairs, "hl.pairs(model, facts)")
    size, candidates = check_size(size, candidates)
    sites = choose(model, layers=layers).pairs
    if size > len(sites):
        raise InputError(f"cannot choose {size} heads: these layers have {len(sites)}.")
    count = min(candidates, len(sites))
    steps = count + (size if method.strategy == "top" else sum(count - i for i in range(size)))

    def score(*probes: Probe) -> HijackResult:
        return hijack(
            model,
            pairs.facts,
            schemes=[pairs.scheme],
            doses=[pairs.dose],
            probes=probes,
            seed=pairs.seed,
            execution=held,
            quiet=True,
        )

    with (
        execution.held(model) as held,
        bar(total=GRADIENT_RUNS + steps, unit="runs", label=pairs.model, quiet=quiet) as progress,
    ):
        base = score()
        usable = _usable(pairs, base)
        facts = pairs.facts.where(case_ids=[pair.fact.case_id for pair in usable])
        shift = _shift(base, facts)
        means = None
        if method.kind == "mean":
            means = mean_outputs(model, facts, batch_tokens=execution.batch_tokens, quiet=True)
        if method.attribution == "direct":
            by_head = logit_shift.average(model, usable, quiet=True).by_head
            progress.update(GRADIENT_RUNS)
        else:
            by_head = gradient_attribution(
                model,
                usable,
                means=means,
                batch_tokens=execution.batch_tokens,
                advance=lambda fraction: progress.update(fraction * GRADIENT_RUNS),
            )

        missing = np.full(by_head.shape[1:], np.nan)  # layers of hybrids that have no heads
        missing[tuple(np.transpose(choose(model).pairs))] = 0
        by_head = by_head + missing

        def carried(heads: Sequence[Head]) -> Float[np.ndarray, " fact"]:
            ablated = score(ablate(heads=heads, kind=method.kind, means=means))
            progress.update(1)
            return shift - _shift(ablated, facts)

        # A reverse scheme shifts towards the true target, and so do the heads that carry it.
        sign = -1 if pairs.scheme.direction == "reverse" else 1
        mean = sign * by_head.mean(0)
        best = sorted(sites, key=lambda site: -mean[site])[:count]
        single = {head: carried([head]) for head in best}
        ranked = sorted(best, key=lambda head: -sign * single[head].mean())
        growth: dict[Head, np.ndarray] = {}
        for i in range(size):
            added = (
                [ranked[i]] if method.strategy == "top" else [x for x in best if x not in growth]
            )
            larger = {head: carried([*growth, head]) for head in added}
            head = max(added, key=lambda each, sets=larger: sign * sets[each].mean())
            growth[head] = larger[head]
    return HeadSearch(
        facts=facts,
        shift=shift,
        attribution=by_head,
        candidates=tuple(best),
        carried=np.stack(list(single.values()), axis=1),
        heads=tuple(growth),
        carried_by_set=np.stack(list(growth.values()), axis=1),
        means=means,
        skipped=usable.skipped,
        settings=SearchSettings(
            model=base.settings.models[0],
            facts=base.settings.facts,
            scheme=pairs.scheme.record(),
            dose=pairs.dose,
            size=size,
            attribution=method.attribution,
            kind=method.kind,
            strategy=method.strategy,
            layers=tuple(sorted({layer for layer, _ in sites})),
            seed=pairs.seed,
        ),
        provenance=Provenance.now(seed=pairs.seed),
        model=model,
    )


def _usable(pairs: Pairs, base: HijackResult) -> Pairs:
    """Return the pairs whose shift can be measured."""
    pairs = pairs.without(SAME_FIRST_TOKEN if pair.same_first_token else None for pair in pairs)
    scored, reasons = set(base.items["case_id"]), base.skipped.set_index("case_id")["reason"]
    cases = [pair.fact.case_id for pair in pairs]
    pairs = pairs.without(None if case in scored else str(reasons[case]) for case in cases)
    name = pairs.facts.name
    if not len(pairs):
        raise InputError(f"no fact of {name} has a shift: {pairs.skipped['reason'].iloc[-1]}.")
    check_searched(len(pairs), name)
    return pairs


def _shift(result: HijackResult, facts: FactSet) -> Float[np.ndarray, " fact"]:
    """Return the logit shift of each fact; log-probabilities have the same normaliser."""
    items = result.items.assign(margin=efficacy.margin(result.items, "first"))
    margins = items.pivot(index="case_id", columns="dose", values="margin")
    shifts = (margins[margins.columns.max()] - margins[0]).reindex([x.case_id for x in facts])
    if shifts.isna().any():
        raise InputError(
            f"without a head, the model gives no finite score for case {shifts.isna().idxmax()}; "
            "load it in float32, or leave the case out."
        )
    return shifts.to_numpy(dtype=float)
