"""The main job: score how far a model's recall of facts gives way, by scheme and dose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from hijacklens.engine.engine import read
from hijacklens.engine.plan import WAYS, Way
from hijacklens.engine.reading import Readings, Wanted
from hijacklens.engine.trie import Trie, naive_tokens
from hijacklens.errors import InputError, choice, one_of_type, several, whole_number
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.models.identity import ModelIdentity, identify
from hijacklens.probe import Probe, check_probes, spans_of
from hijacklens.progress import bar
from hijacklens.prompts.prompt import DOSE, MOST_SENTENCES
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.results.provenance import Provenance
from hijacklens.scoring.items import (
    Unscored,
    make_items,
    make_prompts,
    prompt_table,
    require_found,
    score_items,
    skipped_table,
    wanted,
)
from hijacklens.scoring.result import HijackResult
from hijacklens.store.store import OpenStore, Store, open_store
from hijacklens.workers.replica import ModelLoader
from hijacklens.workers.workers import RayEngine, Replicas

DEFAULT_DOSES = tuple(range(6))


def hijack(
    model: HookedLanguageModel | ModelLoader,
    facts: FactSet,
    *,
    schemes: str | Scheme | Sequence[str | Scheme] = ("do-not-think",),
    doses: Iterable[int] = DEFAULT_DOSES,
    probes: Sequence[Probe] = (),
    seed: int = 0,
    batch_tokens: int | None = None,
    way: Way = "auto",
    store: Store | str | Path | bool = True,
    engine: str | RayEngine | Replicas = "local",
    quiet: bool = False,
) -> HijackResult:
    """Score every fact under every scheme at every dose.

    All doses of a scheme score the same facts, and dose 0 (the bare query) is always among them,
    so that shifts are paired.

    Args:
        model: A hooked language model, as `load_model` gives it; or how one is loaded, where
            only the workers of an engine need it.
        facts: The facts, e.g. `atlas()` or `counterfact(...).sample(200)`.
        schemes: One or several names of registered schemes, or schemes.
        doses: How many sentences stand before the query.
        probes: What changes the model while it is scored, such as
            `probes.attention.knock_out(...)`; they act in their order.
        seed: Seeds what a scheme draws (`do-not-think-other`).
        batch_tokens: Size of a batch in tokens; by default what suits the device and its free
            memory.
        way: How prompts share the tokens that they have in common: `plain`, `packed` or `cached`
            (`hijacklens.engine.plan`); by default the cheapest. The numbers are the same.
        store: Where finished readings are kept and looked up, so that a run that was cut short
            goes on and nothing is computed twice: True for the file in the cache folder, False
            for none, a path or a `Store`.
        engine: `"local"`, in this process, or a `RayEngine`, on workers that load the model by
            themselves (`hijacklens.workers.workers`). The numbers are the same.
        quiet: Draw no progress bar.

    Returns:
        The result; `summary()` is its table, `plot()` its curve.

    Raises:
        InputError: No facts, an unknown or repeated scheme, a dose that is not a whole number
            from 0, a probe that does not fit the model, a store at a given path that cannot be
            used, workers that cannot be had, or not one fact that could be scored.

    Warns:
        StoreWarning: The store is broken or cannot be used; the run goes on.

    Note:
        Costs one forward pass over every distinct prompt, a longer one where a target has several
        tokens; equal prompts (dose 0 of several schemes) are run once.
    """
    one = isinstance(schemes, (str, Scheme))
    listed = [schemes] if one else several("schemes", schemes, "['do-not-think', 'relation']")
    chosen = [get_scheme(scheme) for scheme in listed]
    names = [scheme.name for scheme in chosen]
    if not names or len(set(names)) < len(names):
        raise InputError(f"name at least one scheme, and each once; given: {names or 'none'}.")
    counts = _doses(doses)
    seed = whole_number("seed", seed)
    if batch_tokens is not None:
        batch_tokens = whole_number("batch_tokens", batch_tokens, least=1)
    choice("way", way, WAYS)
    one_of_type("facts", facts, FactSet, "hl.atlas() or hl.FactSet(facts, name='mine')")
    if len(facts) == 0:
        raise InputError(f"there are no facts to score in {facts.name}.")
    pointed = check_probes(probes)
    spans = spans_of(pointed)
    with _running(model, engine) as run:
        identity = run.identity
        prompts, unscored = [], []
        for scheme in chosen:
            made, left_out = make_prompts(facts, scheme, counts, seed=seed)
            prompts.extend(made)
            unscored.extend(left_out)
        items, too_long = make_items(
            prompts, run.tokenizer, context_length=identity.context_length, spans=spans
        )
        unscored.extend(too_long)
        require_found(items, spans)
        n_facts = len({item.fact.case_id for item in items})
        asked = wanted(items)
        with (
            run.open_store(store, probes=pointed, spans=spans) as stored,
            bar(total=n_facts, unit="facts", label=identity.name, quiet=quiet) as progress,
        ):
            found = stored.find(asked)
            missing = {prefix: tokens for prefix, tokens in asked.items() if prefix not in found}
            left = len(missing) / max(1, len(asked))
            progress.update((1 - left) * n_facts)
            computed = run.read(
                missing,
                probes=pointed,
                spans=spans,
                batch_tokens=batch_tokens,
                way=way,
                advance=lambda share: progress.update(share * left * n_facts),
                keep=stored.keep,
            )
    readings = {**found, **computed}
    # What was in the store had to be computed once, too.
    accounting = replace(
        computed.accounting,
        naive_tokens=naive_tokens([prefix for prefix, _ in item.reads] for item in items),
        trie_tokens=Trie.of(asked).nodes,
    )
    table, not_finite = score_items(items, readings, model=identity.name, tokenizer=run.tokenizer)
    unscored.extend(not_finite)
    if table.empty:
        raise InputError(
            f"none of the {len(facts)} facts could be scored; the first reason: "
            f"{unscored[0].reason}."
        )
    return HijackResult(
        items=table,
        skipped=_skipped(facts, unscored, identity.name),
        settings={
            "models": [
                {
                    **asdict(identity),
                    "readings": {
                        "computed": len(computed),
                        "from_store": len(found),
                        "store": str(stored.path or ""),
                        "store_off": stored.off,
                    },
                    "engine": accounting.record(),
                }
            ],
            "facts": {
                "name": facts.name,
                "n": len(facts),
                "hash": facts.content_hash(),
                "note": facts.note,
            },
            "schemes": [_record(scheme) for scheme in chosen],
            "doses": list(counts),
            "probes": [probe.key for probe in pointed],
            "seed": seed,
        },
        provenance=Provenance.now(seed=seed),
        prompts=prompt_table(items),
    )


@dataclass(frozen=True, slots=True)
class _Here:
    """A model in this process, with what `Replicas` have."""

    model: HookedLanguageModel
    identity: ModelIdentity

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    def open_store(
        self, store: Store | str | Path | bool, **options: Any
    ) -> AbstractContextManager[OpenStore]:
        return open_store(store, self.model, self.identity, **options)

    def read(self, wanted: Wanted, **options: Any) -> Readings:
        return read(self.model, wanted, **options)


@contextmanager
def _running(
    model: HookedLanguageModel | ModelLoader, engine: str | RayEngine | Replicas
) -> Iterator[_Here | Replicas]:
    """The model where the engine runs it."""
    if isinstance(engine, RayEngine):
        with engine.replicas(model) as replicas:
            yield replicas
    elif isinstance(engine, Replicas):
        engine.check(model)
        yield engine
    else:
        choice("engine", engine, ["local"], "Or pass a RayEngine(...).")
        here = model.load() if isinstance(model, ModelLoader) else model
        yield _Here(here, identify(here))


def _doses(doses: Iterable[int]) -> tuple[int, ...]:
    listed = several("doses", doses, "range(6) or [0, 1, 5]")
    if not listed:
        raise InputError("doses is empty; give some, such as range(6). Dose 0 is always added.")
    counts = {whole_number(DOSE, dose, most=MOST_SENTENCES) for dose in listed}
    return tuple(sorted({0, *counts}))


def _skipped(facts: FactSet, unscored: Sequence[Unscored], model: str) -> pd.DataFrame:
    unread = [
        (model, row.case_id, row.relation_id, row.subject, "all", row.reason)
        for row in facts.skipped
    ]
    left_out = [
        (model, row.fact.case_id, row.fact.relation_id, row.fact.subject, row.scheme, row.reason)
        for row in unscored
    ]
    return skipped_table([*unread, *left_out])


def _record(scheme: Scheme) -> dict[str, Any]:
    return {
        "name": scheme.name,
        "direction": scheme.direction,
        "text": scheme.template if scheme.template is not None else dict(scheme.templates or {}),
    }
