"""How methods are tuned and measured: splits, runs, and the scores of every prompt.

Facts are split by relation: heads and directions are found on `tuning` facts, settings chosen on
`validation` facts, and everything that is reported is measured on `held-out` ones, under schemes
that tuning did not see. A scored target is its first token (rule `first`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from typing import Any

import numpy as np
import pandas as pd

from analyses.defence.decoding import read_pairs
from analyses.defence.interventions import Learned
from analyses.defence.measures import HELPFUL, LOSSES, accepted, measures
from analyses.defence.methods import METHODS, Method, PromptChange
from hijacklens.engine.reading import ReadOptions, Requests
from hijacklens.errors import InputError
from hijacklens.facts.fact import FactSet
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.probe import Probe, check_probes, spans_of
from hijacklens.prompts.layout import mark
from hijacklens.prompts.prompt import Prompt, compose
from hijacklens.prompts.schemes import Scheme, get_scheme
from hijacklens.prompts.tokens import Texts, locate
from hijacklens.prompts.wordings import Prompts, Unscored, Wording, make_prompts
from hijacklens.scoring.execution import Execution, LocalModel, read_stored
from hijacklens.scoring.items import (
    Item,
    make_items,
    require_found,
)
from hijacklens.scoring.pairs import SAME_FIRST_TOKEN, pairs

PARTS = 5
"""Parts of the facts by relation: one tunes, one validates."""
ITEM = ("scheme", "dose", "case_id", "relation_id", "subject")
SCORES = (*ITEM, "first_true", "first_false", "tokens")
TUNED = ("undone", *LOSSES, "answers_n")
"""The measures that settings are chosen by, and how many facts show a loss of `answers`."""
NOTHING = METHODS["nothing"]
Made = tuple[Method, Any]
"""A method, and what it changes under a setting."""


def split(facts: FactSet, *, most: int, seed: int) -> dict[str, FactSet]:
    """Split facts by relation: a fifth for `tuning`, a fifth for `validation`, the rest `held_out`.

    At most `most` facts tune, and as many validate.

    Raises:
        InputError: There are fewer than three relations.
    """
    sizes = facts.relations()
    if len(sizes) < 3:
        raise InputError(
            f"{facts.name} has {len(sizes)} relations; a defence is tuned, validated and tested "
            "on different ones, so give facts of at least three."
        )
    # The largest relations first, each into the smallest part, so that parts have similar sizes.
    filled, part, names = np.zeros(min(PARTS, len(sizes))), {}, sorted(sizes)
    order = np.random.default_rng(seed).permutation(len(names))
    for name in sorted((names[i] for i in order), key=lambda name: -sizes[name]):
        part[name] = int(filled.argmin())
        filled[part[name]] += sizes[name]
    of = [[x for x in facts if min(part[x.relation_id], 2) == i] for i in range(3)]
    tuning, validation, held_out = (replace(facts, facts=tuple(listed)) for listed in of)
    few = [each.limit(most, seed=seed) for each in (tuning, validation)]
    return {"tuning": few[0], "validation": few[1], "held_out": held_out}


@dataclass(frozen=True, slots=True)
class Changed(Wording):
    """A wording whose prompts a method has changed."""

    change: PromptChange = lambda prompt, alone: prompt

    def prompt(self, dose: int) -> Prompt:
        """Return the changed prompt at a dose."""
        return self.change(Wording.prompt(self, dose), Wording.prompt(self, 0))

    def texts(self, doses: Iterable[int]) -> Iterator[Texts]:
        """Yield the texts of the changed prompts: alone, and with each target."""
        return self.whole_texts(doses)


@dataclass
class Bench:
    """One model with everything that a method is measured by."""

    model: HookedLanguageModel
    run: LocalModel
    facts: Mapping[str, FactSet]
    """As `split` returns them."""
    dose: int
    seed: int
    tune_scheme: Scheme
    execution: Execution
    skipped: list[Unscored] = field(default_factory=list)

    @cached_property
    def learned(self) -> Learned:
        """What methods learn from the tuning facts."""
        of = {"scheme": self.tune_scheme, "dose": self.dose, "seed": self.seed}
        made = pairs(self.model, self.facts["tuning"], **of)
        made.require("tuned on")
        return Learned(self.model, made, self.execution)

    def make(self, method: Method, setting: Mapping[str, Any], *, placebo: bool = False) -> Any:
        """Return what a method, or its placebo, changes under a setting."""
        if placebo:
            return method.placebo_of(self.learned, setting, self.seed)
        return method.make(self.learned, **setting)

    def scores(
        self,
        facts: FactSet,
        schemes: Iterable[str | Scheme],
        made: Mapping[str, Made],
        advance: Any,
    ) -> pd.DataFrame:
        """Return a row per method, scheme, dose and fact; `made` begins with `nothing`.

        Decoding methods have the bare query of `nothing`, as there is no context to contrast.
        """
        tables: dict[str, pd.DataFrame] = {}
        schemes = [get_scheme(scheme) for scheme in schemes]
        for name, (method, what) in made.items():
            if method.changes != "decoding":
                tables[name] = self._scored(facts, schemes, method, what)
                advance(1)
        rules = {name: what for name, (x, what) in made.items() if x.changes == "decoding"}
        items = [item for _, item in self._items(facts, schemes, None, ())] if rules else []
        prompts = [
            (bare.ids, context.ids, context.first_tokens)
            for bare, context in zip(items[::2], items[1::2], strict=True)
        ]
        for name, found in read_pairs(self.model, prompts, rules).items() if rules else ():
            table = tables["nothing"].copy()
            table.loc[table.index[1::2], ["first_true", "first_false"]] = found
            sizes = [len(bare) + len(context) for bare, context, _ in prompts]
            table.loc[table.index[1::2], "tokens"] = sizes
            tables[name] = table
            advance(1)
        return pd.concat([tables[name].assign(method=name) for name in made], ignore_index=True)

    def _scored(
        self, facts: FactSet, schemes: Sequence[Scheme], method: Method, what: Any
    ) -> pd.DataFrame:
        change, probes = _parts(method, what)
        items = self._items(facts, schemes, change, probes)
        wanted: dict[Any, set[int]] = {}
        for _, item in items:
            wanted.setdefault(item.ids, set()).update(item.first_tokens)
        readings, rows = self._read(wanted, probes), []
        for names, item in items:
            found = readings[item.ids].logprobs
            scored = (found[token] for token in item.first_tokens)
            rows.append((*names, *scored, method.passes * len(item.ids)))
        return pd.DataFrame(rows, columns=[*SCORES])

    def neutral(self, made: Mapping[str, Made]) -> pd.DataFrame:
        """Return a row per method and neutral passage: its log-likelihood in nats.

        It is that from the second token on. Without a context, decoding methods change nothing.
        """
        tables: dict[str, pd.DataFrame] = {}
        for name, (method, what) in made.items():
            same = method.changes == "decoding"
            tables[name] = tables["nothing"] if same else self._neutral(method, what)
        named = [table.assign(method=name) for name, table in tables.items()]
        return pd.concat(named, ignore_index=True)

    def _neutral(self, method: Method, what: Any) -> pd.DataFrame:
        change, probes = _parts(method, what)
        spans, tokenizer = spans_of(probes), self.run.tokenizer
        wanted: dict[Any, set[int]] = {}
        passages = []
        for text in texts():
            prompt = compose(text, joining="space")
            located = locate(tokenizer, change(prompt, prompt) if change else prompt)
            symbols = mark(located.ids, [located.positions(span) for span in spans])
            steps = [(symbols[:n], located.ids[n]) for n in located.positions("query")[1:] if n]
            for prefix, token in steps:
                wanted.setdefault(prefix, set()).add(token)
            passages.append(steps)
        readings = self._read(wanted, probes)
        nats = [sum(readings[prefix].logprobs[token] for prefix, token in x) for x in passages]
        return pd.DataFrame(
            {"passage": range(len(nats)), "tokens": [len(x) for x in passages], "nats": nats}
        )

    def _items(
        self,
        facts: FactSet,
        schemes: Sequence[Scheme],
        change: PromptChange | None,
        probes: Sequence[Probe],
    ) -> list[tuple[tuple[Any, ...], Item]]:
        """Return the items of facts, bare and at the dose by turns, with the columns `ITEM`.

        Facts whose targets do not start with separate, different tokens are left out.
        """
        spans, doses = spans_of(probes), (0, self.dose)
        tokenizer = self.run.tokenizer
        prompts, unscored = make_prompts(facts, schemes, doses, tokenizer, seed=self.seed)
        if change is not None:
            wordings = [
                Changed(w.fact, w.scheme, w.sentence, w.facts, w.tokenizer, change)
                for w in prompts.wordings
            ]
            prompts = Prompts(wordings, doses)
        made, too_long = make_items(
            prompts,
            tokenizer,
            context_length=self.run.identity.context_length,
            vocabulary=self.run.identity.vocabulary,
            spans=spans,
        )
        require_found(made, spans)
        self.skipped += [*unscored, *too_long]
        kept, both = [], iter(made)
        for wording, bare, context in zip(made.prompts.wordings, both, both, strict=True):
            fact = wording.fact
            try:
                reason = ""
                if any(true == false for true, false in (bare.first_tokens, context.first_tokens)):
                    reason = SAME_FIRST_TOKEN
            except InputError as error:
                reason = str(error)
            if reason:
                self.skipped.append(Unscored(fact, wording.scheme, reason))
                continue
            of = (fact.case_id, fact.relation_id, fact.subject)
            both_doses = zip(doses, (bare, context), strict=True)
            kept += [((wording.scheme, dose, *of), x) for dose, x in both_doses]
        if not kept:
            raise InputError(
                f"none of the {len(facts)} facts of {facts.name} can be scored: "
                f"{self.skipped[-1].reason}."
            )
        return kept

    def _read(self, wanted: Mapping[Any, set[int]], probes: Sequence[Probe]) -> Any:
        options = ReadOptions(
            probes=probes,
            spans=spans_of(probes),
            sharing=self.execution.sharing,
            batch_tokens=self.execution.batch_tokens,
        )
        return read_stored(self.run, Requests.of(wanted), options, self.execution.store)[0]


def _parts(method: Method, what: Any) -> tuple[PromptChange | None, Sequence[Probe]]:
    return (what, ()) if method.changes == "prompt" else (None, check_probes(what))


def texts() -> list[str]:
    """Return the neutral passages, which were written for this measure."""
    text = resources.files("analyses.defence").joinpath("neutral.txt").read_text("utf-8")
    return text.splitlines()


def tuned(bench: Bench, methods: Sequence[Method], advance: Any) -> pd.DataFrame:
    """Return the measures of each setting of methods with several, on the validation facts."""
    tried = [(x, i, s) for x in methods if len(x.settings) > 1 for i, s in enumerate(x.settings)]
    made: dict[str, Made] = {"nothing": (NOTHING, bench.make(NOTHING, {}))}
    made |= {f"{x.name} {i}": (x, bench.make(x, s)) for x, i, s in tried}
    schemes = [bench.tune_scheme, *HELPFUL]
    items = bench.scores(bench.facts["validation"], schemes, made, advance)
    table = measures(items, [bench.tune_scheme.name]).set_index("method")
    names = {f"{x.name} {i}": {"method": x.name, "setting": i} for x, i, _ in tried}
    rows = [{**of, **table.loc[name, list(TUNED)]} for name, of in names.items()]
    return pd.DataFrame(rows, columns=["method", "setting", *TUNED])


def chosen(tuning: pd.DataFrame, methods: Sequence[Method]) -> pd.DataFrame:
    """Return the tuning table with the column `chosen`: for each model, one setting per method.

    It undoes most among the settings whose losses, as far as they were measured, are accepted; if
    there are none, it is the one that loses least. Methods that learn nothing from a model take
    the setting that is best on the other models, if there are any.
    """
    table = tuning.assign(chosen=False)
    learns = {method.name: method.learns for method in methods}
    groups: Any = table.groupby(["model", "method"], sort=False)
    for (model, name), own in groups:
        rows = table[(table["method"] == name) & (table["model"] != model)]
        if learns[name] or rows.empty:
            rows = own
        means: Any = rows.groupby("setting")[[*TUNED]].mean()
        loss = -means[[*LOSSES]].min(axis=1)
        allowed = means.loc[accepted(loss), "undone"].dropna()
        best = allowed.idxmax() if len(allowed) else loss.idxmin()
        table.loc[own.index[own["setting"] == best], "chosen"] = True
    return table
