"""Heads that carry the hijack: found on some facts, tested on others.

    search_on, test_on = heads.halves(facts, by="relation", seed=0)
    found = heads.search(model, search_on, scheme="do-not-think", size=5)
    found.plot()                                        # attribution of all, exact effects
    test = found.test(test_on, schemes=["do-not-think", "relation"], random_sets=50)
    test.summary()                                      # efficacy, retention, shift; controls
    test.side_effects()                                 # what it costs on bare recall

A head *carries* as much of the logit shift as goes away when its output z is ablated at every
token, in logits. Attribution guesses that for all heads at once, in a pass or two; the best are
then ablated one by one, which is exact, and a set is chosen from these. Query heads are counted,
also where several share a key/value head. The chosen set is only a guess until `test`: with
hundreds of heads some look good by chance, and ablating any heads at all costs recall.

No head search is in the paper; attribution as in `probes.heads.gradients` and
`probes.logit_shift`, ablation as in `probes.ablation`, scores as in `hijacklens.hijack`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from hijacklens.errors import InputError, choice, one_of_type, whole_number
from hijacklens.facts.fact import FactSet
from hijacklens.facts.halves import halves as halves
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.probe import Probe
from hijacklens.progress import bar
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.renamed import renamed
from hijacklens.results.provenance import Provenance
from hijacklens.scoring import efficacy
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.items import SKIPPED_COLUMNS, make_items, make_prompts
from hijacklens.scoring.result import HijackResult
from hijacklens.sites import Layers, choose
from probes import logit_shift
from probes.ablation import Kind, MeanOutputs, ablate, mean_outputs
from probes.heads.gradients import gradient_attribution
from probes.heads.ranking import HeadSearch
from probes.heads.sets import Head

Attribution: TypeAlias = Literal["gradient", "direct"]
Strategy: TypeAlias = Literal["top", "greedy"]
FEWEST = 3
"""Facts to search on: the intervals of one or two have no ends."""
GRADIENT_RUNS = 3
"""What attribution counts for on the progress bar, in runs over the facts."""


@renamed(store="execution.store", batch_tokens="execution.batch_tokens")
def search(
    model: HookedLanguageModel,
    facts: FactSet,
    *,
    scheme: str | Scheme = "do-not-think",
    dose: int = 1,
    size: int = 5,
    candidates: int = 20,
    attribution: Attribution = "gradient",
    kind: Kind = "mean",
    strategy: Strategy = "top",
    layers: Layers = None,
    seed: int = 0,
    execution: Execution = Execution(),
    quiet: bool = False,
) -> HeadSearch:
    """Find the heads that carry the logit shift of a hijack.

    Args:
        model: A hooked language model.
        facts: The facts to search on; keep others back for `HeadSearch.test` (`halves`).
        scheme: The scheme, or its name.
        dose: How many sentences stand before the query, from 1 on.
        size: How many heads to choose.
        candidates: How many heads, the best by attribution, are ablated one by one.
        attribution: `gradient` is attribution patching of the ablation, which also sees what a
            head does through later layers; `direct` what the head itself writes to the logits
            (`probes.logit_shift.head_attribution`).
        kind: What replaces the output of an ablated head: its `mean` over all tokens of the bare
            queries, or `zero`.
        strategy: `top` takes the candidates with the largest exact effects; `greedy` adds, one
            after another, the candidate that brings the set furthest, which sees heads that stand
            in for each other, at `size` times the cost.
        layers: The layers to look in; all by default.
        seed: Seeds what a scheme draws, and the bootstrap.
        execution: The engine, store, sharing and batch size of the scoring runs, as for
            `hijacklens.hijack`; the batch size also applies to the gradients.
        quiet: Draw no progress bar.

    Returns:
        The search; `to_dataframe()`, `growth`, `agreement`, `plot()`, and `test(...)`.

    Raises:
        InputError: An unknown choice, a dose below 1, a size above the number of candidates, a
            layer that the model has not, or no fact whose shift can be measured.

    Note:
        Costs an attribution (about three runs over the facts) and one run of
        `hijacklens.hijack` for every candidate and every head of the set; with `greedy` about
        `size * candidates` more.
    """
    for what, given, allowed in (
        ("attribution", attribution, get_args(Attribution)),
        ("kind of ablation", kind, get_args(Kind)),
        ("strategy", strategy, get_args(Strategy)),
    ):
        choice(what, given, allowed)
    one_of_type("facts", facts, FactSet, "hl.atlas()")
    dose = whole_number("a shift is between dose 0 and a dose from 1 on; the dose", dose, least=1)
    size, candidates = whole_number("size", size), whole_number("candidates", candidates)
    if not 1 <= size <= candidates:
        raise InputError(
            f"cannot choose {size} heads from {candidates} candidates; give a size from 1 to the "
            "number of candidates."
        )
    places = choose(model, layers=layers).pairs
    if size > len(places):
        raise InputError(f"cannot choose {size} heads: these layers have {len(places)}.")
    count = min(candidates, len(places))
    run = _Run(model, get_scheme(scheme), dose, seed, execution)
    steps = count + (size if strategy == "top" else sum(count - i for i in range(size)))
    label = str(model.cfg.model_name)
    with bar(total=GRADIENT_RUNS + steps, unit="runs", label=label, quiet=quiet) as progress:
        base = _usable(run, facts)
        shift = base.shift()
        means = (
            mean_outputs(model, base.facts, batch_tokens=execution.batch_tokens, quiet=True)
            if kind == "mean"
            else None
        )
        if attribution == "direct":
            attributed = _direct(run, base.facts)
            progress.update(GRADIENT_RUNS)
        else:
            attributed = _gradient(run, base.facts, means, progress.update)

        def carried(heads: Sequence[Head]) -> Float[np.ndarray, " fact"]:
            probe = ablate(heads=heads, kind=kind, means=means)
            left = _Base(base.facts, run.score(base.facts, [probe]), base.skipped).shift()
            progress.update(1)
            return shift - left

        # A reverse scheme shifts towards the true target, and so do the heads that carry it.
        towards = -1 if run.scheme.direction == "reverse" else 1
        mean = towards * attributed.mean(0)
        best = sorted(places, key=lambda place: -mean[place])[:count]
        single = {head: carried([head]) for head in best}
        if strategy == "top":
            ranked = sorted(best, key=lambda head: -towards * single[head].mean())
            growth = {head: carried(ranked[: i + 1]) for i, head in enumerate(ranked[:size])}
        else:
            growth = _greedy(best, size, carried, towards)
    settings = {key: value for key, value in base.result.settings.items() if key != "probes"}
    return HeadSearch(
        facts=base.facts,
        shift=shift,
        attribution=attributed,
        candidates=tuple(best),
        carried=np.stack(list(single.values()), axis=1),
        heads=tuple(growth),
        carried_by_set=np.stack(list(growth.values()), axis=1),
        means=means,
        scheme=run.scheme,
        skipped=base.skipped,
        settings={
            **settings,
            "dose": dose,
            "size": size,
            "attribution": attribution,
            "kind": kind,
            "strategy": strategy,
            "layers": sorted({layer for layer, _ in places}),
        },
        provenance=Provenance.now(seed=seed),
        model=model,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """How facts are scored throughout a search."""

    model: HookedLanguageModel
    scheme: Scheme
    dose: int
    seed: int
    execution: Execution

    def score(self, facts: FactSet, probes: Sequence[Probe] = ()) -> HijackResult:
        return hijack(
            self.model,
            facts,
            schemes=[self.scheme],
            doses=[self.dose],
            probes=probes,
            seed=self.seed,
            execution=self.execution,
            quiet=True,
        )


@dataclass(frozen=True, slots=True)
class _Base:
    """Facts with their scores, and those that were left out."""

    facts: FactSet
    result: HijackResult
    skipped: pd.DataFrame

    def shift(self) -> Float[np.ndarray, " fact"]:
        """The logit shift of each fact, in logits: log-probabilities share their normaliser."""
        items = self.result.items
        margins = items.assign(margin=efficacy.margin(items, "first")).pivot(
            index="case_id", columns="dose", values="margin"
        )
        shifts = margins[margins.columns.max()] - margins[0]
        lost = [fact.case_id for fact in self.facts if fact.case_id not in shifts.index]
        if lost:
            raise InputError(
                f"without a head, the model gives no finite score for case {lost[0]}; load it in "
                "float32, or leave the case out."
            )
        return shifts.loc[[fact.case_id for fact in self.facts]].to_numpy(dtype=float)


def _usable(run: _Run, facts: FactSet) -> _Base:
    """The facts whose shift can be measured; leaving some out may change what others draw."""
    left_out: list[pd.DataFrame] = []
    while True:
        result = run.score(facts)
        items = result.items
        same = items.loc[items["same_first_token"]].drop_duplicates(subset="case_id")
        reason = "both targets share their first token, so that there is no shift"
        left_out += [result.skipped, same.assign(reason=reason)[list(SKIPPED_COLUMNS)]]
        usable = set(items["case_id"]) - set(same["case_id"])
        if not usable:
            raise InputError(f"no fact of {facts.name} has a shift: {reason}.")
        if len(usable) < FEWEST:
            raise InputError(
                f"{len(usable)} of the facts of {facts.name} have a shift that can be measured; "
                f"intervals over facts need at least {FEWEST} (50 say something). Give more facts."
            )
        if len(usable) == len(facts):
            skipped = pd.concat(left_out).drop_duplicates().reset_index(drop=True)
            return _Base(facts, result, skipped)
        facts = facts.where(case_ids=usable)


def _direct(run: _Run, facts: FactSet) -> Float[np.ndarray, "fact layer head"]:
    found = logit_shift.head_attribution(
        run.model, facts, scheme=run.scheme, dose=run.dose, seed=run.seed
    )
    return found.double().cpu().numpy()


def _gradient(
    run: _Run, facts: FactSet, means: MeanOutputs | None, update: Callable[[float], object]
) -> Float[np.ndarray, "fact layer head"]:
    prompts, _ = make_prompts(facts, run.scheme, [0, run.dose], seed=run.seed)
    items, _ = make_items(prompts, run.model.tokenizer, context_length=int(run.model.cfg.n_ctx))
    return gradient_attribution(
        run.model,
        items,
        [fact.case_id for fact in facts],
        means=means,
        batch_tokens=run.execution.batch_tokens,
        advance=lambda share: update(share * GRADIENT_RUNS),
    )


def _greedy(
    candidates: Sequence[Head],
    size: int,
    carried: Callable[[Sequence[Head]], Float[np.ndarray, " fact"]],
    towards: int,
) -> dict[Head, np.ndarray]:
    """Head added -> what the set carries with it, one after another."""
    growth: dict[Head, np.ndarray] = {}
    while len(growth) < size:
        tried = {head: carried([*growth, head]) for head in candidates if head not in growth}
        best = max(tried, key=lambda head: towards * tried[head].mean())
        growth[best] = tried[best]
    return growth
