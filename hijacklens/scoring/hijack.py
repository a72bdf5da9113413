"""The main job: score how far a model's recall of facts gives way, by scheme and dose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hijacklens.engine.reading import Readings, ReadOptions
from hijacklens.errors import InputError, is_whole, one_of_type, several, whole_number
from hijacklens.facts.chat import takes_chat
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.probe import Probe, check_probes, spans_of
from hijacklens.progress import bar
from hijacklens.prompts.prompt import DOSE, MOST_SENTENCES
from hijacklens.prompts.schemes import Scheme, get_schemes
from hijacklens.prompts.wordings import make_prompts, prompt_table
from hijacklens.renamed import renamed
from hijacklens.results.result import Provenance
from hijacklens.scoring.execution import Execution, LocalModel, read_stored
from hijacklens.scoring.items import (
    Items,
    make_items,
    require_found,
    skipped_table,
)
from hijacklens.scoring.result import HijackResult, HijackSettings, ReadingCounts, ScoredModel
from hijacklens.store.contents import Store
from hijacklens.workers.replica import ModelLoader
from hijacklens.workers.workers import Replicas

DEFAULT_DOSES = tuple(range(6))


@renamed(
    way="execution.sharing",
    engine="execution.engine",
    store="execution.store",
    batch_tokens="execution.batch_tokens",
)
@takes_chat
def hijack(
    model: HookedLanguageModel | ModelLoader,
    facts: FactSet,
    *,
    schemes: str | Scheme | Sequence[str | Scheme] = ("do-not-think",),
    doses: int | Iterable[int] = DEFAULT_DOSES,
    probes: Sequence[Probe] = (),
    seed: int = 0,
    execution: Execution = Execution(),
    quiet: bool = False,
) -> HijackResult:
    """Score every fact under every scheme at every dose.

    All doses of a scheme score the same facts, and dose 0 (the bare query) is always included, so
    that shifts are paired.

    Args:
        model: A hooked language model, as `load_model` returns it, or a `ModelLoader`, which the
            workers of an engine use to load the model themselves.
        facts: The facts, e.g. `atlas()` or `counterfact(...).sample(200)`.
        schemes: One or several schemes, or their names.
        doses: One or several numbers of hijacking sentences before the query.
        probes: Probes that change the model while it is scored, such as
            `probes.attention.knock_out(...)`. They act in the order of the list.
        seed: Seeds the random choices of a scheme (`do-not-think-other`).
        execution: The engine, the store, the sharing of prefixes and the batch size. None of them
            changes the numbers.
        quiet: Draw no progress bar.
        chat: Ask the facts in this chat, as `facts.in_chat(chat)` does.

    Returns:
        The result; `summary()` is its table, `plot()` its curve.

    Raises:
        InputError: No facts, an unknown or repeated scheme, a dose that is not a whole number of
            at least 0, a probe that does not fit the model, a named store that cannot be used,
            workers that cannot be started, or no fact that could be scored.

    Warns:
        StoreWarning: The store is damaged or cannot be used; the run continues.

    Note:
        Costs one forward pass over every distinct prompt, and over the prompt with its target if
        the target has several tokens. Equal prompts (dose 0 of several schemes) run once.
    """
    schemes = get_schemes(schemes)
    doses = _doses(doses)
    seed = whole_number("seed", seed)
    one_of_type("execution", execution, Execution, "hl.Execution(store=False)")
    one_of_type("facts", facts, FactSet, "hl.atlas() or hl.FactSet(facts, name='mine')")
    if len(facts) == 0:
        raise InputError(f"there are no facts to score in {facts.name}.")
    probes = check_probes(probes)
    spans = spans_of(probes)
    with execution.running(model) as run:
        identity = run.identity
        prompts, unscored = make_prompts(facts, schemes, doses, run.tokenizer, seed=seed)
        items, too_long = make_items(
            prompts,
            run.tokenizer,
            context_length=identity.context_length,
            vocabulary=identity.vocabulary,
            spans=spans,
        )
        require_found(items, spans)
        options = ReadOptions(
            probes=probes,
            spans=spans,
            sharing=execution.sharing,
            batch_tokens=execution.batch_tokens,
        )
        readings, costs = _read(run, items, options, execution.store, quiet=quiet)
    table, not_finite = items.score(readings, model=identity.name, tokenizer=run.tokenizer)
    unscored = [*unscored, *too_long, *not_finite]
    if table.empty:
        raise InputError(
            f"none of the {len(facts)} facts could be scored; the first reason: "
            f"{unscored[0].reason}."
        )
    return HijackResult(
        items=table,
        skipped=skipped_table(unscored, identity.name, facts.skipped),
        settings=HijackSettings(
            models=(ScoredModel(**asdict(identity), **costs),),
            facts=facts.record(),
            schemes=tuple(scheme.record() for scheme in schemes),
            doses=tuple(doses),
            probes=tuple(probe.key for probe in probes),
            seed=seed,
        ),
        provenance=Provenance.now(seed=seed),
        prompts=prompt_table(items.prompts),
    )


def _read(
    run: LocalModel | Replicas,
    items: Items,
    options: ReadOptions,
    store: Store | str | Path | bool,
    *,
    quiet: bool,
) -> tuple[Readings, dict[str, Any]]:
    """Return the readings of all items, and the record of what was computed for them."""
    requests = items.requests
    n_facts = len({wording.fact.case_id for wording in items.prompts.wordings})
    with bar(total=n_facts, unit="facts", label=run.identity.name, quiet=quiet) as progress:
        readings, computed, kept = read_stored(
            run, requests, options, store, lambda fraction: progress.update(n_facts * fraction)
        )
    # Stored readings had to be computed once, too.
    accounting = replace(
        computed.accounting,
        naive_tokens=items.naive_tokens,
        trie_tokens=requests.trie.nodes,
    )
    counts = ReadingCounts(
        computed=len(computed),
        from_store=len(requests) - len(computed),
        store=str(kept.path or ""),
        store_off=kept.off,
    )
    return readings, {"readings": counts, "engine": accounting}


def _doses(doses: int | Iterable[int]) -> tuple[int, ...]:
    listed = (doses,) if is_whole(doses) else several("doses", doses, "range(6) or [0, 1, 5]")
    if not listed:
        raise InputError("doses is empty; give some, such as range(6). Dose 0 is always added.")
    counts = {whole_number(DOSE, dose, most=MOST_SENTENCES) for dose in listed}
    return tuple(sorted({0, *counts}))
