"""The held-out test of a set of heads: does ablating it undo the hijack where it was not chosen?

Facts, relations and schemes that the search has not seen are scored with no head ablated, with the
set, and with random sets of the same size, all on the same facts. What the set does to bare recall
stands beside it: a set that undoes the hijack by making the model forget is no finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import pandas as pd
from matplotlib.figure import Figure

from hijacklens.errors import InputError, unknown
from hijacklens.facts.fact import FactSet, FactsRecord
from hijacklens.facts.halves import shared
from hijacklens.models.hooked import HookedLanguageModel
from hijacklens.progress import bar
from hijacklens.prompts.schemes import Scheme, SchemeRecord
from hijacklens.results.glance import Glance, Grid, fraction, signed
from hijacklens.results.provenance import Provenance
from hijacklens.results.result import Result
from hijacklens.results.stored import Stored
from hijacklens.scoring import efficacy
from hijacklens.scoring.execution import Execution
from hijacklens.scoring.hijack import hijack
from hijacklens.scoring.items import ITEM_COLUMNS, SKIPPED_COLUMNS, SkippedTable
from hijacklens.scoring.settings import HijackSettings
from probes.ablation import MeanOutputs, ablate
from probes.heads.contrasts import CHOSEN, NONE, contrasts, side_effects
from probes.heads.figures import held_out_figure
from probes.heads.sets import Head, draw, label

Overlap: TypeAlias = Literal["refuse", "leave-out"]
KINDS = {"layers": "random, in the same layers", "model": "random, anywhere in the model"}
"""Kind of random sets -> its name in the legend of a table."""
FRACTIONS = ("efficacy", "retention", "top_token")
"""Measures between 0 and 1; the others are in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundOn:
    """On what the heads of a test were found."""

    model: str
    weights_hash: str
    facts: FactsRecord
    scheme: SchemeRecord
    dose: int
    kind: str
    """What replaced the output of an ablated head: `mean` or `zero`."""
    relations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTestSettings(HijackSettings):
    """The settings of a held-out test."""

    heads: str
    """The set, such as `8.3 9.1`."""
    random_sets: int
    """How many of each kind."""
    search: FoundOn


SETS = Stored("sets.csv", dtypes=dict.fromkeys(("ablation", "kind", "heads"), str))


@dataclass(frozen=True, eq=False)
class HeadTest(Result):
    """What the model says of unseen facts without a set of heads, and without random ones.

    `summary()` has the hijack, `side_effects()` the bare query; scores are in nats.
    """

    items: Annotated[pd.DataFrame, Stored("items.parquet", columns=ITEM_COLUMNS)]
    """The items of `hijacklens.hijack` with one more column, `ablation`: `none`, `chosen`, or the
    name of a random set."""
    sets: Annotated[pd.DataFrame, SETS]
    """A row per ablation: its name, its kind (`none`, `chosen`, `layers`, `model`), its heads."""
    skipped: SkippedTable
    """Facts that were not tested, with the reason."""
    settings: HeadTestSettings
    provenance: Provenance
    figures: ClassVar = {"test": {}}
    derived: ClassVar = {"summary.csv": "summary", "side_effects.csv": "side_effects"}

    @property
    def kinds(self) -> dict[str, str]:
        """Name of each random set -> its kind."""
        random = self.sets[self.sets["kind"].isin(KINDS)]
        return dict(zip(random["ablation"], random["kind"], strict=True))

    def to_dataframe(self) -> pd.DataFrame:
        """The items: one row per ablation, fact, scheme and dose."""
        return self.items.copy()

    def summary(self, *, rule: efficacy.Rule = "first") -> pd.DataFrame:
        """What the heads do to the hijack: a row per scheme, dose, group of facts and measure.

        The measures are `efficacy` and `retention` (shares) and `shift` (nats; against the bare
        query under the same ablation). Columns: the value on the `bare` query, hijacked with
        `none` and with the `chosen` heads ablated; the paired `change` with its 95% bootstrap
        interval; `p` of McNemar's exact test (shares) or of Wilcoxon's signed-rank test, and
        corrected over the schemes and doses of the group (`p_holm`, `p_bh`); `recovered`, the
        share of the way from bare to hijacked that is undone, with its interval (`nan` where the
        hijack did not work in the first place). For each kind of
        random set: the mean, least and most of what the sets give, and `_p`, the share of sets
        that undo as much (never below 1 / (sets + 1)).

        `relations` is `all`, or `seen` and `new`: whether the heads were found on facts of the
        same relation.

        Args:
            rule: How targets are scored: `first`, `sum` or `mean`.

        Raises:
            InputError: An unknown rule.
        """
        search = self.settings.search
        return contrasts(
            self.items,
            self.kinds,
            rule=_known(rule),
            seen_relations=search.relations,
            seen_scheme=search.scheme.name,
            reverse=[
                scheme.name for scheme in self.settings.schemes if scheme.direction == "reverse"
            ],
            seed=self.settings.seed,
        )

    def side_effects(self, *, rule: efficacy.Rule = "first") -> pd.DataFrame:
        """What the ablation does to the bare query: `retention`, `logprob_true`, `top_token`.

        `logprob_true` is the mean log-probability of the true target under the rule, in nats,
        `top_token` the share of facts whose likeliest next token stays. Columns as in `summary`,
        but the `_p` of random sets says how many of them do as much *harm*.

        Args:
            rule: How targets are scored: `first`, `sum` or `mean`.

        Raises:
            InputError: An unknown rule.
        """
        return side_effects(
            self.items,
            self.kinds,
            rule=_known(rule),
            seen_relations=self.settings.search.relations,
            seed=self.settings.seed,
        )

    def plot(self, *, rule: efficacy.Rule = "first") -> Figure:
        """Efficacy, shift and bare recall: no ablation, the set, and every random set."""
        settings = self.settings
        title = (
            f"{settings.models[0].name} · {settings.facts.name}, "
            f"{self.items['case_id'].nunique()} facts · without heads {settings.heads}"
        )
        return held_out_figure(self.items, self.sets, rule=_known(rule), title=title)

    def findings(self) -> dict[str, Any]:
        """Return the counts."""
        return {"items": len(self.items), "skipped": len(self.skipped)}

    def glance(self, rule: efficacy.Rule = "first") -> Glance:
        """What the set does to the hijack and to bare recall, compared with random sets.

        Args:
            rule: How targets are scored: `first`, `sum` or `mean`.
        """
        settings, counts = self.settings, self.sets["kind"].value_counts()
        notes = []
        if self.kinds:
            sets = "; ".join(f"{kind}: {counts[kind]} {KINDS[kind]}" for kind in KINDS)
            notes.append(f"sets: {sets}; p: fraction of them that do as much")
        if len(self.skipped):
            reason = self.skipped["reason"].iloc[0]
            notes.append(f"skipped: {len(self.skipped)} (skipped.csv); first: {reason}")
        return Glance(
            f"held out: {settings.facts.name}, {self.items['case_id'].nunique()} facts · "
            f"{settings.models[0].name} without heads {settings.heads} · rule {rule}",
            (
                _effects(self.summary(rule=rule), title="the hijack"),
                _effects(self.side_effects(rule=rule), title="side effects on the bare query"),
            ),
            tuple(notes),
            ("summary()", "side_effects()", "plot()", "save(folder)"),
        )


def _effects(table: pd.DataFrame, *, title: str) -> Grid:
    """A row per measure. Side effects have no scheme, and no hijack that could be undone."""
    if table["relations"].nunique() == 2:  # all relations are new, or none is
        table = table.loc[table["relations"] != efficacy.ALL]
    numbers = ("bare", "none", "chosen", *(f"{kind}_mean" for kind in KINDS))
    rows = [
        row
        | {
            name: (fraction if row["measure"] in FRACTIONS else signed)(row[name])
            for name in numbers
            if name in row
        }
        for row in table.to_dict("records")
    ]
    columns = {
        "scheme": "{scheme}",
        "dose": "{dose:d}",
        "relations": "{relations} ({n})",
        "measure": "{measure}",
        "bare": "{bare:>}",
        "none": "{none:>}",
        "chosen": "{chosen:>}",
        "change": "{change:+.3f} [{change_low:+.3f}, {change_high:+.3f}]",
        "p_holm": "{p_holm:.2g}",
        "recovered": "{recovered:.0%}",
        **{f"{kind}_mean": f"{{{kind}_mean}} (p {{{kind}_p:.2g}})" for kind in KINDS},
    }
    return Grid.of(
        rows, {name: form for name, form in columns.items() if name in table}, title=title
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a test has to know of the search: the set, how it is ablated, what it was found on."""

    heads: tuple[Head, ...]
    means: MeanOutputs | None
    facts: FactSet = field(repr=False)
    settings: FoundOn = field(repr=False)


def run_test(
    model: HookedLanguageModel,
    found: Found,
    facts: FactSet,
    *,
    schemes: str | Scheme | Sequence[str | Scheme],
    doses: Iterable[int],
    random_sets: int,
    overlap: Overlap,
    seed: int,
    execution: Execution,
    quiet: bool,
) -> HeadTest:
    """Test a set of heads; `HeadSearch.test` says what the arguments mean."""
    if random_sets < 0:
        raise InputError(f"random_sets counts sets: 0, 1, 2, ...; {random_sets} is not one.")
    tested, left_out = _unseen(facts, found.facts, overlap)
    name = str(model.cfg.model_name)
    ablations: dict[str, tuple[str, tuple[Head, ...]]] = {
        NONE: (NONE, ()),
        CHOSEN: (CHOSEN, found.heads),
    }
    for kind in KINDS if random_sets else ():
        drawn = draw(
            found.heads,
            layers=int(model.cfg.n_layers),
            heads=int(model.cfg.n_heads),
            count=random_sets,
            matched=kind == "layers",
            seed=seed,
        )
        ablations |= {f"{kind}-{i}": (kind, heads) for i, heads in enumerate(drawn)}
    parts: list[pd.DataFrame] = []
    results = []
    with bar(total=len(ablations), unit="sets", label=name, quiet=quiet) as progress:
        for ablation, (_, heads) in ablations.items():
            kind = "mean" if found.means else "zero"
            probes = [ablate(heads=heads, kind=kind, means=found.means)] if heads else []
            result = hijack(
                model,
                tested,
                schemes=schemes,
                doses=doses,
                probes=probes,
                seed=seed,
                execution=execution,
                quiet=True,
            )
            parts.append(result.items.assign(ablation=ablation))
            results.append(result)
            progress.update(1)
    skipped = pd.concat([left_out.assign(model=name), *(r.skipped for r in results)])
    items = pd.concat(parts, ignore_index=True)
    keys = ["scheme", "case_id"]
    # A fact that some ablation leaves without a finite score is compared under none.
    per_fact = items.groupby(keys)["ablation"].transform("nunique")
    first = results[0]
    return HeadTest(
        items=items.loc[per_fact == len(ablations)].reset_index(drop=True),
        sets=pd.DataFrame(
            [(key, kind, label(heads)) for key, (kind, heads) in ablations.items()],
            columns=["ablation", "kind", "heads"],
        ),
        skipped=pd.DataFrame(skipped.drop_duplicates(), columns=list(SKIPPED_COLUMNS)),
        settings=HeadTestSettings(
            models=first.settings.models,
            facts=first.settings.facts,
            schemes=first.settings.schemes,
            doses=first.settings.doses,
            probes=(),
            seed=first.settings.seed,
            heads=label(found.heads),
            random_sets=random_sets,
            search=found.settings,
        ),
        provenance=Provenance.now(seed=seed),
    )


def _known(rule: efficacy.Rule) -> efficacy.Rule:
    if rule not in efficacy.RULES:
        raise unknown("rule", rule, efficacy.RULES)
    return rule


def _unseen(facts: FactSet, searched: FactSet, overlap: Overlap) -> tuple[FactSet, pd.DataFrame]:
    """The facts that the heads were not found on, and the others with the reason."""
    if overlap not in get_args(Overlap):
        raise unknown("treatment of overlap", overlap, get_args(Overlap))
    both = set(shared(facts, searched))
    if both and overlap == "refuse":
        raise InputError(
            f"{len(both)} of the {len(facts)} facts of {facts.name} are among those that the "
            f"heads were found on, such as case {min(both)}; a test on them is not held out. "
            "Give other facts (heads.halves splits a set), or overlap='leave-out' to list them."
        )
    reason = "the heads were found on this fact"
    rows = [
        (fact.case_id, fact.relation_id, fact.subject, "all", reason)
        for fact in facts
        if fact.case_id in both
    ]
    columns = ["case_id", "relation_id", "subject", "scheme", "reason"]
    kept = facts.where(case_ids=[fact.case_id for fact in facts if fact.case_id not in both])
    return kept, pd.DataFrame(rows, columns=columns)
